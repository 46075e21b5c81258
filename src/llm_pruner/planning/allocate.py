"""Importance and a target give the units to remove.

Scope ``local`` takes the same share of every chosen group. With a target in parameters that share
is found by bisection on the exact parameter count; finely divided groups (FFN channels) take up
what coarse ones (heads) leave.

Scope ``global`` ranks the units of all chosen groups by

    (importance of the unit + importance of what must go with it) / parameters it removes

and takes them from the bottom. Only criteria whose values are comparable across groups, such as
estimates of the change in loss, rank well this way; norms do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np

from llm_pruner.errors import PlanError, UserError
from llm_pruner.planning.candidates import AllCandidates, Candidates, find_candidates
from llm_pruner.planning.constraints import check, whole
from llm_pruner.planning.costs import Cost
from llm_pruner.planning.match_target import (
    TOLERANCE,
    Prices,
    Search,
    density,
    increment_prices,
    make_queue,
    share_after,
)
from llm_pruner.planning.numbering import Numbering
from llm_pruner.planning.selection import Selection, Target, exact
from llm_pruner.types import Discovery, IntArray, Scores


def allocate(
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    target: Target,
    numbering: Numbering | None = None,
    cost: Cost | None = None,
) -> dict[str, IntArray]:
    """Return the units to remove, complete: blocks level, companions included.

    A unit ratio removes floor(n * unit_ratio) of a group's n units, rounded to the nearest size
    that ``round_to`` allows; with scope ``global`` that share of each kind. A target in parameters
    is met within 0.5 points of the dense model's parameters. Ties go by unit index.

    Args:
        discovery: the model to prune, which may have been pruned before.
        scores: importance per unit of every chosen group and of what follows it.
        selection: structures, scope, layers, rounding.
        target: how much to remove, of the dense model and all steps together.
        numbering: what earlier steps left of the dense model; None if this is the dense model.
        cost: what the target counts; None for parameters. Needed for ``kv_cache``.

    Raises:
        UserError: the target cannot be reached (naming the nearest that can), a group or structure
            would lose nothing, or as `choose_groups`.
        PlanError: a breach of the rules of `planning.constraints.check`.
    """
    numbering = numbering or Numbering.dense(discovery)
    cost = cost or _parameters(discovery, numbering, target)
    candidates = find_candidates(discovery, scores, selection, numbering, cost)
    selection = _of_those_left(selection, candidates)
    if target.unit_ratio is None:
        steps = _cost_steps(candidates, cost, selection, target)
    else:
        steps = _unit_steps(candidates, cost, selection, target)
    found = candidates.removal(steps)
    removal = {
        group.name: np.sort(found[group.name])
        for group in discovery.groups
        if len(found.get(group.name, ()))
    }
    problems = check(discovery, removal)
    if problems:
        raise PlanError(problems)
    return removal


def _of_those_left(selection: Selection, candidates: AllCandidates) -> Selection:
    """Return the selection with the budget of structures that are done shared out to the others."""
    kinds, split = candidates.by_kind(), selection.split
    if split is None or split.keys() <= kinds.keys():
        return selection
    whole = sum(split[kind] for kind in kinds)
    return replace(
        selection,
        structures=tuple(kinds),
        layer_ranges={kind: of for kind, of in selection.layer_ranges.items() if kind in kinds},
        split={kind: split[kind] / whole if whole else 1 / len(kinds) for kind in kinds},
    )


def _parameters(discovery: Discovery, numbering: Numbering, target: Target) -> Cost:
    if target.kv_cache is not None:
        raise UserError(f"{target} needs to know what each unit adds to the cache; give its cost")
    return Cost.of_parameters(discovery, numbering.parameters)


def check_reachable(
    discovery: Discovery, selection: Selection, target: Target, cost: Cost | None = None
) -> None:
    """Raise what `allocate` would raise for this model whatever the importance is."""
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    if selection.scope == "local":
        allocate(discovery, scores, selection, target, cost=cost)
        return
    numbering = Numbering.dense(discovery)
    candidates = find_candidates(discovery, scores, selection, numbering)
    if target.unit_ratio is None:
        cost = cost or _parameters(discovery, numbering, target)
        _begin_search(candidates, cost, target)
        return
    for same in candidates.by_kind().values():
        _refuse_nothing(same, exact(target.unit_ratio), target)


def _spans(search: Search) -> dict[str, int]:
    candidates, cost = search.candidates, search.cost
    spans = {}
    for kind, same in candidates.by_kind().items():
        last = {one.group.name: int(one.counts[-1]) for one in same}
        spans[kind] = cost.total - cost.left(candidates.removal(last))
    return spans


def with_equal_split(
    discovery: Discovery, selection: Selection, target: Target, cost: Cost | None = None
) -> Selection:
    """Return a selection in which one ranking takes the same share of each structure."""
    if selection.scope == "local" or len(selection.structures) == 1:
        return selection
    numbering = Numbering.dense(discovery)
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    candidates = find_candidates(discovery, scores, selection, numbering)
    cost = cost or _parameters(discovery, numbering, target)
    spans = _spans(_begin_search(candidates, cost, target))
    total = sum(spans.values())
    return replace(selection, split={kind: span / total for kind, span in spans.items()})


def _unit_steps(
    candidates: AllCandidates, cost: Cost, selection: Selection, target: Target
) -> dict[str, int]:
    assert target.unit_ratio is not None
    ratio = exact(target.unit_ratio)
    local, kinds = selection.scope == "local", [*candidates.by_kind().values()]
    if not target.loose:
        for same in [[one] for one in candidates.all] if local else kinds:
            _refuse_nothing(same, ratio, target)
    if local:
        return {
            one.group.name: one.nearest(int(one.dense * ratio) - one.gone) for one in candidates.all
        }
    prices = increment_prices(candidates, cost)
    steps: dict[str, int] = {}
    for same in kinds:
        quota = int(sum(one.dense for one in same) * ratio) - sum(one.gone for one in same)
        queue = make_queue([[one] for one in same], prices, partial(density, prices=prices))
        places = [0] * len(same)
        for owner in queue.sequence:
            increment = int(np.diff(same[owner].counts)[places[owner]])
            if increment >= 2 * quota:  # nearer without it
                break
            places[owner] += 1
            quota -= increment
        for one, place in zip(same, places, strict=True):
            steps[one.group.name] = int(one.counts[place])
    return steps


def _refuse_nothing(same: Sequence[Candidates], ratio: Fraction, target: Target) -> None:
    dense = sum(one.dense for one in same)
    # The coarsest, since importance decides which of them would be the first.
    step = max((int(one.counts[1]) for one in same if len(one.counts) > 1), default=0)
    if any(one.gone for one in same) or 0 < step < 2 * int(dense * ratio):
        return
    group = same[0].group
    least = whole(Fraction(step // 2 + 1, dense) * 1000) / 1000
    more = f"use at least {least:.3f}, or " if step else ""
    raise UserError(
        f"{target} removes 0 of {dense} {group.kind} in {group.name}; {more}leave {group.kind} out"
    )


def _cost_steps(
    candidates: AllCandidates, cost: Cost, selection: Selection, target: Target
) -> dict[str, int]:
    search = _begin_search(candidates, cost, target)
    if selection.spread is None or selection.scope != "global":
        return _searched(search, selection, target)
    capped = [_capped(search, selection, selection.spread, beyond) for beyond in (0, 1)]
    try:
        return _searched(_begin_search(capped[0], cost, target), selection, target)
    except UserError:  # of few sizes, too little is below the limit
        try:
            return _searched(_begin_search(capped[1], cost, target), selection, target)
        except UserError:
            _searched(search, selection, target)  # raises what holds for any spread
    raise UserError(
        f"{target} cannot be reached with spread={selection.spread:g}, by which no layer loses "
        "more than that times the average; give a larger one, or ask for less"
    )


def _searched(search: Search, selection: Selection, target: Target) -> dict[str, int]:
    prices = increment_prices(search.candidates, search.cost)
    if selection.split is None:
        _search(search, search.candidates.all, prices, selection)
    else:
        _search_split(search, prices, selection, selection.split)
    if search.best is None or not (search.met or target.loose):
        raise UserError(_unreachable(search, target))
    return search.best[1]


def _search_split(
    search: Search, prices: Prices, selection: Selection, split: Mapping[str, float]
) -> None:
    """Meet each structure's share, the largest last; each takes up what those before it miss."""
    total, goal, kinds = search.cost.total, search.target, search.candidates.by_kind()
    order = sorted((name for name in split if split[name] > 0), key=lambda name: split[name])
    search.best, search.base = None, dict.fromkeys(search.candidates.most, 0)
    removed = 0.0
    for name in order:
        removed += split[name] * (total - goal)
        last = name == order[-1]
        part = replace(
            search,
            target=goal if last else total - round(removed),
            allow_nothing=search.allow_nothing or not last,
            counts=set(),
            best=None,
        )
        _search(part, kinds[name], prices, selection)
        if part.best is None:
            return
        before = total if search.best is None else search.best[0]
        # What goes with each size of this structure if that is its share.
        shared = {total - round((before - count) / split[name]) for count in part.counts}
        search.base, search.best, search.counts = part.best[1], part.best, shared - {total}


def _search(
    search: Search, candidates: Sequence[Candidates], prices: Prices, selection: Selection
) -> None:
    single = [[one] for one in candidates]
    by_density = partial(density, prices=prices)
    if selection.scope == "global":
        search.run(make_queue(single, prices, by_density))
        return
    together: dict[object, list[Candidates]] = {}
    for one in candidates:
        shape = (one.group.kind, one.dense, one.gone, one.counts.tobytes())
        together.setdefault(shape, []).append(one)
    even = make_queue(list(together.values()), prices, share_after)
    search.run(even)
    if not search.met and not selection.uniform:
        search.run(make_queue(single, prices, share_after, by_density))
    if not search.met:
        search.run_all(even)


def _capped(search: Search, selection: Selection, spread: float, beyond: int) -> AllCandidates:
    """Return the candidates within the ``spread`` of all steps together, but for so many."""
    candidates, cost, split = search.candidates, search.cost, selection.split
    kinds, spans = candidates.by_kind(), _spans(search)
    everywhere = cost.total - cost.left(candidates.removal(candidates.most))
    capped = []
    for one in candidates.all:
        kind = one.group.kind
        part, span, gone = 1.0, float(everywhere), float(cost.dense - cost.total)
        if split is not None:
            left = sum(other.counts[-1] for other in kinds[kind])
            part, span = split[kind], spans[kind]
            gone = span * sum(other.gone for other in kinds[kind]) / max(left, 1)
        share = (part * (cost.total - search.target) + gone) / max(span + gone, 1)
        limit = max(share, min(spread * share, 1 - (1 - share) / spread))
        after = one.gone + one.counts
        within = max(1, int(np.sum(after <= np.ceil(limit * after[-1]))))
        counts = one.counts[: within + beyond]
        capped.append(replace(one, counts=counts, importance=one.importance[: int(counts[-1])]))
    return replace(candidates, all=tuple(capped))


def _begin_search(candidates: AllCandidates, cost: Cost, target: Target) -> Search:
    search = Search(
        candidates,
        cost,
        target=target.kept(cost.dense),
        allow_nothing=target.loose or cost.total < cost.dense,
    )
    least = search.try_steps(candidates.most)
    if least - search.target > TOLERANCE * cost.dense and not target.loose:
        raise UserError(
            f"{target} cannot be reached: pruning {_words(candidates)} to the last unit leaves "
            f"{_size(least, cost)}; ask for less, protect fewer layers or add structures"
        )
    return search


def _unreachable(search: Search, target: Target) -> str:
    more = [count for count in search.counts if count > search.target]
    less = [count for count in search.counts if count <= search.target]
    nearest = [f"{_size(min(more), search.cost)} (less)"] if more else []
    nearest += [f"{_size(max(less), search.cost)} (more)"] if less else []
    return (
        f"{target} cannot be reached within {100 * TOLERANCE:g} points by pruning "
        f"{_words(search.candidates)}; the nearest that can: {' and '.join(nearest)}; "
        "ask for one of these or add structures"
    )


def _size(count: int, cost: Cost) -> str:
    return f"{count:,} {cost.unit}, ratio {1 - count / cost.dense:.4f}"


def _words(candidates: AllCandidates) -> str:
    return ", ".join(candidates.by_kind()) or "nothing"
