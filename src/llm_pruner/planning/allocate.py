"""Importance and a target give the units to remove.

Scope ``local`` takes the same share of every chosen group. With a target in parameters that share
is found by bisection on the exact parameter count; groups with few units (heads) take the nearest
whole number and finely divided ones (FFN channels) take up the rest, equally in all layers if that
meets the target. Where it does not, groups of one structure differ by one unit.

Scope ``global`` ranks the units of all chosen groups by

    (importance of the unit + importance of what must go with it) / parameters it removes

with the parameters counted in the model as it is before any removal, and takes them from the
bottom. The importance is used as it comes: only criteria whose values are comparable across groups,
such as estimates of the change in loss, rank well this way; norms do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from llm_pruner.errors import PlanError, UserError
from llm_pruner.planning.candidates import Ladder, Ladders, build_ladders
from llm_pruner.planning.constraints import check, whole
from llm_pruner.planning.costs import Cost, ParameterCounter
from llm_pruner.planning.match_target import (
    Search,
    density,
    make_queue,
    share_after,
    step_prices,
)
from llm_pruner.planning.numbering import Survivors
from llm_pruner.planning.selection import choose_groups
from llm_pruner.planning.target import Selection, Target, exact
from llm_pruner.types import Discovery, IntArray, Scores

TOLERANCE = 0.005
"""How far the removed share of all parameters may lie from the target."""


def allocate(
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    target: Target,
    survivors: Survivors | None = None,
    cost: Cost | None = None,
) -> dict[str, IntArray]:
    """Return the units to remove, complete: blocks level, companions included.

    A unit ratio removes floor(n * unit_ratio) of a group's n units, rounded to the nearest size
    that ``round_to`` allows; of query heads, that share of each key-value head's; of layers, of
    those that are not protected. With one ranking over all groups (scope ``global``) it is the
    share of each kind over all chosen groups. A target in parameters is met within 0.5 points of
    the dense model's parameters. Equal inputs give equal results; ties go by unit index.

    Args:
        discovery: the model to prune, which may have been pruned before.
        scores: importance per unit of every chosen group and of what follows it.
        selection: structures, scope, layers, rounding.
        target: how much to remove, of the dense model and all steps together.
        survivors: what earlier steps left of the dense model; None if this is the dense model.
        cost: what the target counts; None for parameters. Needed for ``kv_cache``.

    Raises:
        UserError: a target that cannot be reached (naming the nearest that can), a group that
            would lose nothing under a unit ratio, or what `choose_groups` refuses.
        PlanError: a breach of the rules that `planning.constraints.check` lists.
    """
    survivors = survivors or Survivors.dense(discovery)
    cost = cost or _parameters(discovery, survivors, target)
    chosen = choose_groups(discovery, selection, survivors)
    ladders = build_ladders(discovery, chosen, scores, selection, survivors)
    if target.unit_ratio is not None:
        if selection.split is not None:
            raise UserError(
                f"{target} and a split say different things; give a target in parameters "
                "(ratio or params) with the split"
            )
        steps = _unit_steps(ladders, cost, selection, target)
    else:
        ladders = _capped(ladders, cost, selection, target)
        steps = _cost_steps(ladders, cost, selection, target)
    found = ladders.removal(steps)
    removal = {
        group.name: np.sort(found[group.name])
        for group in discovery.groups
        if len(found.get(group.name, ()))
    }
    problems = check(discovery, removal)
    if problems:
        raise PlanError(problems)
    return removal


def _parameters(discovery: Discovery, survivors: Survivors, target: Target) -> Cost:
    if target.kv_cache is not None:
        raise UserError(f"{target} needs to know what each unit adds to the cache; give its cost")
    return Cost(ParameterCounter(discovery), survivors.parameters)


def check_reachable(
    discovery: Discovery, selection: Selection, target: Target, cost: Cost | None = None
) -> None:
    """Raise what `allocate` would raise for this model whatever the importance is.

    For a look ahead, before the importance is estimated. With scope ``local`` that is everything;
    with one ranking over all groups it is not whether there is a removal within 0.5 points of the
    target.

    Raises:
        UserError: as `allocate`.
    """
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    if selection.scope == "local":
        allocate(discovery, scores, selection, target, cost=cost)
        return
    survivors = Survivors.dense(discovery)
    chosen = choose_groups(discovery, selection, survivors)
    ladders = build_ladders(discovery, chosen, scores, selection, survivors)
    if target.unit_ratio is None:
        _begin_search(ladders, cost or _parameters(discovery, survivors, target), target)
        return
    for ladder in ladders.all:
        _refuse_nothing(ladder, exact(target.unit_ratio), target)


def _unit_steps(
    ladders: Ladders,
    cost: Cost,
    selection: Selection,
    target: Target,
) -> dict[str, int]:
    assert target.unit_ratio is not None
    ratio = exact(target.unit_ratio)
    if not target.loose:
        for ladder in ladders.all:
            _refuse_nothing(ladder, ratio, target)
    if selection.scope == "local":
        return {
            ladder.group.name: ladder.nearest(_quota(ladder, ratio) - ladder.gone)
            for ladder in ladders.all
        }
    prices = step_prices(ladders, cost.counter)
    steps: dict[str, int] = {}
    for kind in dict.fromkeys(ladder.group.kind for ladder in ladders.all):
        same = [ladder for ladder in ladders.all if ladder.group.kind == kind]
        quota = int(sum(ladder.dense for ladder in same) * ratio)
        quota -= sum(ladder.gone for ladder in same)
        queue = make_queue(
            [[ladder] for ladder in same],
            prices,
            lambda ladder: (density(ladder, prices[ladder.group.name]),),
        )
        levels = np.zeros(len(same), dtype=np.int64)
        for owner in queue.sequence:
            rung = np.diff(same[owner].counts)[levels[owner]]
            if rung > quota:
                break
            levels[owner] += 1
            quota -= int(rung)
        for ladder, level in zip(same, levels, strict=True):
            steps[ladder.group.name] = int(ladder.counts[level])
    return steps


def _quota(ladder: Ladder, ratio: Fraction) -> int:
    return int(ladder.dense * ratio)


def _refuse_nothing(ladder: Ladder, ratio: Fraction, target: Target) -> None:
    """Raise if a unit ratio, over all steps, leaves a group whole: the user asked to prune it."""
    if ladder.gone or ladder.nearest(_quota(ladder, ratio)):
        return
    group = ladder.group
    of = f"{ladder.dense} {group.kind}" + (" per block" if group.blocks is not None else "")
    head = f"{target} removes 0 of {of} in {group.name}"
    if len(ladder.counts) == 1:
        raise UserError(
            f"{head}: nothing can be removed there; choose other layers or leave {group.kind} out"
        )
    least = int(ladder.counts[1]) // 2 + 1 if ladder.counts[1] > 1 else 1
    share = whole(Fraction(least, ladder.dense) * 1000) / 1000
    raise UserError(f"{head}; use at least {share:.3f}, or leave {group.kind} out")


def _cost_steps(
    ladders: Ladders,
    cost: Cost,
    selection: Selection,
    target: Target,
) -> dict[str, int]:
    search = _begin_search(ladders, cost, target)
    prices = step_prices(ladders, search.counter)
    if selection.split is None:
        _search(search, ladders.all, prices, selection)
    else:
        _search_split(search, ladders, prices, selection, selection.split)
    if search.best is None or (search.error > search.tolerance and not target.loose):
        raise UserError(_unreachable(search, target, cost, ladders))
    return search.best[1]


def _search_split(
    search: Search,
    ladders: Ladders,
    prices: dict[str, int],
    selection: Selection,
    split: Mapping[str, float],
) -> None:
    """Meet each structure's share, the largest last, so that it takes up what the others miss."""
    total, goal = search.counter.total, search.target
    order = sorted((name for name in split if split[name] > 0), key=lambda name: split[name])
    search.best, search.base = None, {ladder.group.name: 0 for ladder in ladders.all}
    removed = 0.0
    for name in order:
        same = tuple(ladder for ladder in ladders.all if ladder.group.kind == name)
        removed += split[name] * (total - goal)
        last = name == order[-1]
        part = replace(
            search,
            target=goal if last else total - round(removed),
            allow_nothing=search.allow_nothing or not last,
            best=None,
        )
        _search(part, same, prices, selection)
        if part.best is None:
            return
        search.base, search.best = part.best[1], part.best


def _search(
    search: Search,
    ladders: Sequence[Ladder],
    prices: dict[str, int],
    selection: Selection,
) -> None:
    single = [[ladder] for ladder in ladders]
    if selection.scope == "global":
        search.run(make_queue(single, prices, lambda x: (density(x, prices[x.group.name]),)))
    else:
        together: dict[object, list[Ladder]] = {}
        for ladder in ladders:
            shape = (ladder.group.kind, ladder.dense, ladder.gone, ladder.counts.tobytes())
            together.setdefault(shape, []).append(ladder)
        even = make_queue(list(together.values()), prices, lambda x: (share_after(x),))
        search.run(even)
        if search.error > search.tolerance and not selection.uniform:
            search.run(
                make_queue(
                    single, prices, lambda x: (share_after(x), density(x, prices[x.group.name]))
                )
            )
        if search.error > search.tolerance:
            search.run_all(even)


def _capped(
    ladders: Ladders,
    cost: Cost,
    selection: Selection,
    target: Target,
) -> Ladders:
    """Return the ladders without the rungs beyond the selection's ``spread``."""
    if selection.spread is None or selection.scope != "global":
        return ladders
    search = _begin_search(ladders, cost, target)
    split = selection.split or dict.fromkeys(selection.structures, 1.0)
    counter, capped = search.counter, []
    spans: dict[str, int] = {}
    for kind in dict.fromkeys(ladder.group.kind for ladder in ladders.all):
        last = {x.group.name: int(x.counts[-1]) for x in ladders.all if x.group.kind == kind}
        spans[kind] = counter.total - counter.count(ladders.removal(last))
    reach = sum(span for kind, span in spans.items() if split.get(kind, 0) > 0)
    for ladder in ladders.all:
        kind = ladder.group.kind
        part, span = (1.0, reach) if selection.split is None else (split[kind], spans[kind])
        share = part * (counter.total - search.target) / max(span, 1)
        spread = selection.spread
        limit = max(share, min(spread * share, 1 - (1 - share) / spread))
        most = np.ceil(limit * ladder.counts[-1])
        counts = ladder.counts[ladder.counts <= most]
        capped.append(
            replace(ladder, counts=counts, importance=ladder.importance[: int(counts[-1])])
        )
    return replace(ladders, all=tuple(capped))


def _begin_search(ladders: Ladders, cost: Cost, target: Target) -> Search:
    """Return a search that knows the largest removal, after checking that it is large enough."""
    search = Search(
        ladders,
        cost.counter,
        target=target.kept(cost.dense),
        tolerance=TOLERANCE * cost.dense,
        allow_nothing=target.loose or cost.counter.total < cost.dense,
    )
    everything = {ladder.group.name: int(ladder.counts[-1]) for ladder in ladders.all}
    least = search.try_steps(everything)
    if least - search.target > search.tolerance and not target.loose:
        raise UserError(
            f"{target} cannot be reached: pruning {_words(ladders)} to the last unit leaves "
            f"{_size(least, cost)}; ask for less, protect fewer layers or add structures"
        )
    return search


def _unreachable(search: Search, target: Target, cost: Cost, ladders: Ladders) -> str:
    more = [count for count in search.counts if count > search.target]
    less = [count for count in search.counts if count <= search.target]
    nearest = [f"{_size(min(more), cost)} (less)"] if more else []
    nearest += [f"{_size(max(less), cost)} (more)"] if less else []
    return (
        f"{target} cannot be reached within {100 * TOLERANCE:g} points by pruning "
        f"{_words(ladders)}; the nearest that can: {' and '.join(nearest)}; "
        "ask for one of these or add structures"
    )


def _size(count: int, cost: Cost) -> str:
    return f"{count:,} {cost.unit}, ratio {1 - count / cost.dense:.4f}"


def _words(ladders: Ladders) -> str:
    return ", ".join(dict.fromkeys(ladder.group.kind for ladder in ladders.all))
