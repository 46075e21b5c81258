"""What each layer costs, by trial: one layer at a time goes without its least important units.

Scores say well which units of a layer matter least, and less well what it loses with many of them.
So every group goes without a few shares of its units, alone and without a refit, and the divergence
from the dense model on held-out text is measured; between these points the damage is taken to bend
upwards, and a ranking over all layers removes where its slope is least.

Units are taken away by zeros in what reads them, so all trials are runs of the dense model; read
block by block, they go in step. That budgets are searched by the divergence of logits is from
Týr-the-Pruner (NeurIPS 2025), which tries whole models, refitted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_pruner.models.blockwise import Chain, NotBlockwise, find_chain
from llm_pruner.models.forward import first_tensor, undisturbed
from llm_pruner.models.linear_modules import consumers_of, input_dim, linear_modules
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.planning.allocate import allocate
from llm_pruner.planning.candidates import AllCandidates, Candidates, find_candidates
from llm_pruner.planning.costs import Cost
from llm_pruner.planning.numbering import Numbering
from llm_pruner.planning.selection import Selection, Target
from llm_pruner.search.divergence import Change, DivergenceMeter, in_parts
from llm_pruner.surgery.cut import cut_copy
from llm_pruner.types import Discovery, FloatArray, Group, Removal, Scores

_KINDS = ("heads", "query_heads", "value_dim", "ffn")
"""Kinds of groups whose units are gone where what reads them reads zeros."""

_LOG = logging.getLogger(__name__)

LEVELS = (0.16, 0.4, 0.6, 0.8)
"""Shares of a group's removable units that are tried."""

TOKENS, FEWEST = 1024, 512
"""Held-out tokens that trials are judged on, at most and at least."""

_LENGTH = 128
"""Tokens of a sample at least: the first of a text are harder to tell than those that follow."""

MOST = 512
"""Groups that are tried; of more, such as thousands of experts one by one, none is."""

WORK = 2 * 10**11
"""Tokens times parameters that a trial may take: on a large model as long as on a small one."""

_BEYOND = 2.0
"""Times the damage at the largest level that the loss of all removable units is taken to do."""

_SMALL = 1e-9
"""What the largest of the scores becomes that are only to keep their order."""


@dataclass(frozen=True)
class Damage:
    """What a group costs.

    Attributes:
        steps: numbers of steps (see `planning.candidates`) that were tried, ascending.
        divergence: mean over tokens of KL(dense || without them) in nats, for each.
    """

    steps: tuple[int, ...]
    divergence: tuple[float, ...]

    def slopes(self, steps: int) -> FloatArray:
        """Return what each of the first ``steps`` steps adds, ascending, in nats.

        It is the slope of the largest convex curve from 0 that lies nowhere above the measured
        points, interpolated between the middles of its pieces.
        """
        x = np.array([0, *self.steps], dtype=np.float64)
        y = np.array([0, *self.divergence]).clip(0)
        if x[-1] < steps:
            x, y = np.append(x, steps), np.append(y, _BEYOND * y[-1])
        corners = [0]
        for at in range(1, len(x)):
            while len(corners) > 1 and _slope(x, y, *corners[-2:]) >= _slope(x, y, corners[-1], at):
                corners.pop()
            corners.append(at)
        pieces = list(pairwise(corners))
        middles = [(x[a] + x[b]) / 2 for a, b in pieces]
        return np.interp(np.arange(steps) + 0.5, middles, [_slope(x, y, *one) for one in pieces])


def _slope(x: FloatArray, y: FloatArray, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))


def measure_layers(
    model: nn.Module,
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    numbering: Numbering,
    held_out: torch.Tensor,
    known: Mapping[str, Damage] | None = None,
) -> dict[str, Damage]:
    """Return the damage that each group alone does, by its name.

    Groups are left out that can lose nothing, or that others than linear modules read; all of them
    if they are too many.

    Args:
        scores: the order in which units go.
        held_out: tokens that the scores did not see, shape (samples, seq_len).
        known: what was measured before, which is returned as well.
    """
    found = dict(known or {})
    candidates = find_candidates(discovery, scores, selection, numbering)
    new = [one for one in _competing(candidates, selection) if one.group.name not in found]
    if not 0 < len(new) <= MOST:
        return found
    some = judged(held_out, sum(parameter.numel() for parameter in model.parameters()))
    meter, tails = DivergenceMeter(model, some), _Tails(model, some)
    trials: list[tuple[str, int]] = []
    changes: list[Change] = []
    linear = linear_modules(model)
    for one in new:
        levels = {one.nearest(round(level * one.counts[-1])) for level in LEVELS} - {0}
        for count in sorted(levels):
            removal = candidates.removal({one.group.name: count})
            features = [
                (consumer.module, torch.from_numpy(consumer.index[units].ravel()))
                for name, units in removal.items()
                for consumer in consumers_of(model, discovery.group(name), linear)
            ]
            if features and all(_is_linear(model, discovery.group(name)) for name in removal):
                trials.append((one.group.name, count))
                changes.append(partial(_without, features, tails))
    with tails.opened():
        divergence = meter.of_each(model, changes, "trials: one layer")
    for name, same in groupby(zip(trials, divergence, strict=True), key=lambda pair: pair[0][0]):
        steps, damage = zip(*((count, of) for (_, count), of in same), strict=True)
        if np.isfinite(damage).all():
            found[name] = Damage(steps, damage)
    return found


def judged(held_out: torch.Tensor, parameters: int) -> torch.Tensor:
    """Return what the trials of a model of this size are judged on, of (samples, seq_len)."""
    tokens = min(TOKENS, max(FEWEST, WORK // parameters))
    length = min(held_out.shape[1], max(_LENGTH, tokens // len(held_out)))
    return held_out[:: -(-len(held_out) * length // tokens), :length]


def _competing(candidates: AllCandidates, selection: Selection) -> list[Candidates]:
    split = selection.split
    return [one for one in candidates.all if split is None or split.get(one.group.kind, 0) > 0]


def _is_linear(model: nn.Module, group: Group) -> bool:
    """Whether nothing but linear modules makes or reads a group, beside vectors as long as it."""
    weights = [member.tensor for member in group.members if not member.buffer]
    return group.kind in _KINDS and all(
        input_dim(model.get_submodule(name.rpartition(".")[0])) is not None for name in weights
    )


class _Tails:
    """Runs of a model from a block on, since all before is as dense; all, if no chain in memory."""

    def __init__(self, model: nn.Module, samples: torch.Tensor) -> None:
        self._chain: Chain | None = None
        if is_model_streamed(model):
            return
        ids = samples.to(next(model.parameters()).device, torch.long)
        with undisturbed(model), suppress(NotBlockwise):
            with torch.enable_grad():
                self._chain = find_chain(model, ids, {})
            with torch.no_grad(), self._chain.opened():
                self._before = [self._chain.states(one) for one in in_parts(ids)]
            names = {id(module): name for name, module in model.named_modules()}
            self._places = {names[id(block)]: n for n, block in enumerate(self._chain.blocks)}

    def opened(self) -> AbstractContextManager[None]:
        """Inside, runs can begin at a block."""
        return nullcontext() if self._chain is None else self._chain.opened()

    def of(self, modules: Iterable[str], part: int) -> AbstractContextManager[None]:
        """Inside, the model runs from the block that is the first with one of these modules."""
        if self._chain is None:
            return nullcontext()
        first = min(
            (
                n
                for name in modules
                for place, n in self._places.items()
                if name.startswith(f"{place}.")
            ),
            default=0,
        )
        return self._chain.resumed(first, self._before[part][first])


@contextmanager
def _without(
    features: Sequence[tuple[str, torch.Tensor]], tails: _Tails, model: nn.Module, part: int
) -> Iterator[None]:
    """Inside, linear modules read zeros for some features."""

    def zero(
        gone: torch.Tensor, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        read = first_tensor(args, named)
        less = read.index_fill(-1, gone.to(read.device), 0)
        changed = {key: less if one is read else one for key, one in named.items()}
        return tuple(less if one is read else one for one in args), changed

    with ExitStack() as hooks, tails.of((name for name, _ in features), part):
        for name, gone in features:
            module = model.get_submodule(name)
            before = partial(zero, gone)
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        yield


def allocate_by_damage(
    model: nn.Module,
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    target: Target,
    numbering: Numbering,
    cost: Cost | None,
    damage: Mapping[str, Damage],
    held_out: torch.Tensor,
) -> Removal:
    """Return the removal by measured damage, or by the scores if that leaves the model nearer.

    Each is carried out on a copy, which shares its weights, and judged on held-out tokens.

    Args:
        target, cost: as `planning.allocate` takes them.
        damage: what `measure_layers` found.
        held_out: tokens that the scores did not see, shape (samples, seq_len).

    Raises:
        UserError, PlanError: as `planning.allocate`.
    """
    priced = by_damage(discovery, scores, selection, numbering, damage)
    removals = [
        allocate(discovery, one, selection, target, numbering, cost) for one in (scores, priced)
    ]
    meter = DivergenceMeter(model, held_out)
    by_scores, by_trials = (meter.of(cut_copy(model, discovery, removal)) for removal in removals)
    _LOG.info("divergence by scores %.4f, by trials of layers %.4f", by_scores, by_trials)
    return removals[int(by_trials < by_scores)]


def by_damage(
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    numbering: Numbering,
    damage: Mapping[str, Damage],
) -> Scores:
    """Return scores in the same order whose sums are the measured damage; infinite ones stay.

    So do all of a structure that was not measured, and of those that compete with it.
    """
    candidates = find_candidates(discovery, scores, selection, numbering)
    compete = _competing(candidates, selection)
    measured = [one for one in compete if one.group.name in damage]
    apart = {one.group.kind for one in measured}
    missing = [one for one in compete if one not in measured and len(one.counts) > 1]
    if any(selection.split is None or one.group.kind in apart for one in missing):
        return scores
    # What goes with a unit has its price in the damage, and only keeps its order.
    finite = [values[np.isfinite(values)] for values in scores.values()]
    largest = max((float(values.max()) for values in finite if len(values)), default=0)
    found = {name: values * (_SMALL / max(largest, 1e-30)) for name, values in scores.items()}
    for one in measured:
        name = one.group.name
        found[name] = np.where(np.isinf(scores[name]), scores[name], _spread(one, damage[name]))
    return found


def _spread(one: Candidates, damage: Damage) -> FloatArray:
    """Return the scores of a group's units, shape (size,): what each adds to the damage."""
    slopes = damage.slopes(int(one.counts[-1])) / len(one.order)
    found = np.empty(one.group.size)
    for units in one.order.values():
        place = np.arange(len(units))
        # Rising, since ties go by index.
        found[units] = slopes[place.clip(max=len(slopes) - 1)] * (1 + 1e-9 * place) + 1e-15 * place
    return found
