"""The result of a traced run: atoms, equations and notes, and the conclusions from all of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from llm_pruner.tracing.atoms import Atoms
from llm_pruner.tracing.provenance import WEIGHTS, descriptions
from llm_pruner.tracing.sizes import COMPARISONS, PLACE, Equation, Expr, evaluate, leaves
from llm_pruner.types import IntArray

Axes = list[IntArray]
Role = Literal[
    "head",
    "query_key",
    "value",
    "activation",
    "routing",
    "aligned",
    "even",
    "read",
    "filter",
    "weighed",
    "normalised",
]


@dataclass
class Ragged:
    """An expanded axis merged with a live one: replica (i, j) may go for each i separately.

    All copies hold the same values, so it only matters that equally many stay for every i.

    Attributes:
        outer: rows of the live axis, shape (a, k).
        pairs: atoms of the replicas, shape (a, b).
        inner: rows of the expanded axis, shape (b, 1), whose length the model's code reads.
    """

    outer: IntArray
    pairs: IntArray
    inner: IntArray


@dataclass
class Choice:
    """An axis from which a fixed number of positions is chosen by value, as a router does.

    Attributes:
        rows: rows of the axis, shape (n, k).
        count: number of positions chosen.
        available: number of positions to choose from; the others were masked.
    """

    rows: IntArray
    count: int
    available: int


@dataclass
class Trace:
    """Everything that a run recorded about a model.

    Attributes:
        tensors: name -> the rows of its axes.
        order: name -> when it was first used.
        equations: integers that sized axes.
        numbers: expressions whose values the code calculated with or compared -> line of code.
        checks: comparisons that must come out as before, with their line of code.
        lengths: rows of the axes whose sizes the code read; ("len", i) is lengths[i].
        attributes: attribute -> value.
        roles: how axes are used, which gives groups their kinds.
        residual: rows of the hidden state.
        unread: atoms of new tensors that nothing has read yet.
    """

    atoms: Atoms = field(default_factory=Atoms)
    tensors: dict[str, Axes] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    ragged: list[Ragged] = field(default_factory=list)
    numbers: dict[Expr, str] = field(default_factory=dict)
    checks: list[tuple[Expr, str]] = field(default_factory=list)
    lengths: list[IntArray] = field(default_factory=list)
    attributes: dict[Expr, int] = field(default_factory=dict)
    roles: dict[Role, list[IntArray]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    residual: IntArray | None = None
    unread: set[int] = field(default_factory=set)

    @property
    def values(self) -> dict[Expr, int]:
        """The value of each attribute and each length in the dense model."""
        lengths = {("len", number): len(rows) for number, rows in enumerate(self.lengths)}
        return {**self.attributes, **lengths}


def settle(trace: Trace, model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Draw the conclusions that need the whole trace; ``aliases``: other name -> first name."""
    _follow_read(trace, model)
    # New tensors that nothing reads follow the lengths of other axes that size them.
    trace.equations = [
        one
        for one in trace.equations
        if not trace.unread.intersection(one.rows[:1].ravel().tolist())
        or any(leaf[0] != "len" for leaf in leaves(one.expr))
    ]
    _freeze_unreached(trace, aliases)
    described, multiples = _described(trace, model, aliases)
    _pin_sizes(trace, described, multiples, _used_as_numbers(trace))
    _settle_copies(trace)


def _described(
    trace: Trace, model: nn.Module, aliases: Mapping[str, str]
) -> tuple[dict[Expr, IntArray], dict[Expr, Axes]]:
    """Return attributes of standard modules -> the axis, or the two axes, that they describe."""
    found: dict[Expr, IntArray] = {}
    multiples: dict[Expr, Axes] = {}
    for path, module in model.named_modules():
        names = (f"{path}.{weight}" for weight in WEIGHTS)
        known = (trace.tensors.get(aliases.get(name, name)) for name in names)
        axes = next((one for one in known if one is not None), [])
        stated = [(attribute, dim) for attribute, dim in descriptions(module) if dim < len(axes)]
        if isinstance(module, _ConvNd) and axes:
            channels = ("in_channels", "out_channels")[:: 1 if module.transposed else -1]
            stated.append((channels[0], 0))
            if module.groups == 1:
                stated.append((channels[1], 1))
            else:
                multiples["attr", path, channels[1]] = axes[:2]
        found |= {("attr", path, attribute): axes[dim] for attribute, dim in stated}
    return found, multiples


def _follow_read(trace: Trace, model: nn.Module) -> None:
    """Tie a tensor that was not read to one of its module that was and must shrink alike."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {
            f"{prefix}{key}": value
            for space in (vars(module), module._buffers, module._parameters)
            for key, value in space.items()
            if isinstance(value, torch.Tensor) and f"{prefix}{key}" in trace.tensors
        }
        read = [name for name in own if name in trace.order]
        for name in own:
            like = [one for one in read if _stands_for(own[one], own[name])]
            # Prefer the tensor that this is the original of (rotary frequencies).
            like.sort(key=lambda one: one != name.replace("original_", ""))
            first, *rest = (trace.tensors[one] for one in like or [name])
            agree = all(all(map(trace.atoms.same, one[::-1], first[::-1])) for one in rest)
            either = isinstance(own[name], nn.Parameter) and not agree
            if name in read or not like or either:
                continue
            left, right = trace.tensors[name], first
            new = len(left) - len(right)
            for rows in left[:new]:
                trace.atoms.freeze(rows, "not reached by the forward pass")
            for mine, other in zip(left[new:], right, strict=True):
                trace.atoms.unify(mine, other)
            trace.order[name] = trace.order[like[0]]


def _stands_for(read: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether another tensor of a module must shrink as one that was read.

    Rotary embeddings keep an equal copy of their frequencies. XLNet's attention keeps a bias for
    segments like the one for content, and reads it only if it is given segments.
    """
    if isinstance(read, nn.Parameter) != isinstance(other, nn.Parameter):
        return False
    if isinstance(read, nn.Parameter):
        return read.dim() > 1 and other.shape[-read.dim() :] == read.shape
    return read.shape == other.shape and torch.equal(read, other)


def _freeze_unreached(trace: Trace, aliases: Mapping[str, str]) -> None:
    """Freeze tensors that the run did not read, and those at the same place in their siblings.

    Other tokens may reach them (an expert that no token chose), and then they must still fit.
    """
    reached = set(trace.order) | {alias for alias, first in aliases.items() if first in trace.order}
    missed = [name for name in trace.tensors if name not in reached]
    siblings: dict[str, list[str]] = defaultdict(list)
    for name in trace.tensors:
        siblings[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    for name in missed:
        for other in siblings[re.sub(r"\.\d+\.", ".*.", name)]:
            reason = "not reached by the forward pass"
            for rows in trace.tensors[other]:
                trace.atoms.freeze(rows, reason if other == name else f"{name} was {reason}")


def _may_turn(expr: Expr, old: Mapping[Expr, int]) -> bool:
    """Whether a comparison of one size with a constant changes for a smaller size above 1.

    Code that asks whether there is more than one (to repeat or to loop) is right either way.
    """
    (leaf,) = set(leaves(expr))
    now = evaluate(expr, old)
    return any(evaluate(expr, {leaf: value}) != now for value in range(2, old[leaf]))


def _used_as_numbers(trace: Trace) -> dict[Expr, str]:
    """Freeze axes whose length is used as a number; return attributes used so -> reason."""
    old = trace.values
    found: dict[Expr, str] = {}
    for expr, where in trace.numbers.items():
        how = "used as a number"
        if expr[0] == PLACE:
            expr = expr[1]
        if expr[0] in COMPARISONS:
            if len(set(leaves(expr))) > 1:
                one, other = sorted(expr[1:], key=lambda side: side[0] == "len")
                equal = expr[0] in ("==", "!=") and evaluate(one, old) == evaluate(other, old)
                if not (equal and other[0] == "len" and one[0] in ("len", "attr")):
                    trace.checks.append((expr, where))
                elif one[0] == "attr":
                    rows = trace.lengths[other[1]]
                    trace.equations.append(Equation(one, rows, "a comparison"))
                continue  # lengths of two tensors may differ; the twin shows whether they may
            try:
                if not _may_turn(expr, old):
                    continue
                if any(side[0] == "%" and not evaluate(side, old) for side in expr[1:]):
                    trace.checks.append((expr, where))  # an even size stays even
                    continue
            except ZeroDivisionError:
                pass
            how = "compared with a number"
        for leaf in leaves(expr):
            if leaf[0] == "len":
                rows = trace.lengths[leaf[1]]
                trace.atoms.freeze(rows, f"its size is {how} in the code ({where})")
            else:
                name = leaf[2].removeprefix("config.")
                found.setdefault(leaf, f"{name} is {how} in the code ({where})")
    return found


def _pin_sizes(
    trace: Trace,
    described: Mapping[Expr, IntArray],
    multiples: Mapping[Expr, Axes],
    as_number: Mapping[Expr, str],
) -> None:
    """Freeze axes that are sized by attributes which the code uses as numbers."""
    for leaf, reason in as_number.items():
        own = [described[leaf]] if leaf in described else []
        for rows in (*own, *multiples.get(leaf, ())):
            trace.atoms.freeze(rows, reason)
    # A module's description of its own weight changes with it, so what it sizes must shrink too.
    stated = (*(equation.expr for equation in trace.equations), *dict(trace.checks))
    sizing = {leaf for expr in stated for leaf in leaves(expr)}
    for leaf in sizing & described.keys():
        trace.equations.append(Equation(leaf, described[leaf], "its own weight"))
    # An axis that such an attribute sizes alone pins it; products with it are then free.
    alone = {equation.expr for equation in trace.equations if equation.expr in as_number}
    for equation in trace.equations:
        for leaf in leaves(equation.expr):
            if leaf in as_number and (equation.expr == leaf or leaf not in alone):
                trace.atoms.freeze(equation.rows, as_number[leaf])


def _settle_copies(trace: Trace) -> None:
    """Freeze the copies of an expanded axis if it is frozen, and unify them if it is tied."""
    atoms = trace.atoms
    changed = True
    while changed:
        # Freezing one replica axis may touch another.
        changed = False
        for ragged in trace.ragged:
            flat: IntArray = ragged.pairs.reshape(-1, 1)
            if atoms.resolve(ragged.inner).size == 0:
                if atoms.resolve(flat).size:
                    atoms.freeze(flat, atoms.reason(ragged.inner) or "its copies are fixed")
                    changed = True
            elif not atoms.is_replica(ragged.inner):
                before = atoms.resolve(flat)
                for pairs in ragged.pairs:
                    atoms.unify(pairs[:, None], ragged.inner)
                changed |= not np.array_equal(before, atoms.resolve(flat))
