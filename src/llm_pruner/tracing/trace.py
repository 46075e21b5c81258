"""What a run states about a model, and what follows from all of it."""

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
    """An expanded axis merged with a live one: replica (i, j) may go for each i on its own.

    All copies hold the same values, so what matters is only how many stay, and that it is equally
    many for every i that stays.

    Attributes:
        outer: rows of the live axis, shape (a, k).
        pairs: atoms of the replicas, shape (a, b).
        inner: rows of the expanded axis, shape (b, 1); its length is what the model's code reads.
    """

    outer: IntArray
    pairs: IntArray
    inner: IntArray


@dataclass
class Choice:
    """An axis from which a fixed number of positions is chosen by value, as a router does.

    Attributes:
        rows: rows of the axis, shape (n, k).
        count: how many are chosen.
        available: how many of the n could be chosen; the others were masked.
    """

    rows: IntArray
    count: int
    available: int


@dataclass
class Trace:
    """What a run states about a model, before it is made into groups."""

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
    """Atoms of tensors that were made anew, until their values or sizes are read."""

    @property
    def values(self) -> dict[Expr, int]:
        """The value of each attribute and each length, as the model is."""
        lengths = {("len", number): len(rows) for number, rows in enumerate(self.lengths)}
        return {**self.attributes, **lengths}


def settle(trace: Trace, model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Draw the conclusions that need the whole trace; aliases: other names -> first name."""
    _follow_read(trace, model)
    _forget_unread(trace)
    _freeze_unreached(trace, aliases)
    described, multiples = _described(trace, model, aliases)
    _pin_sizes(trace, described, multiples, _used_as_numbers(trace))
    _settle_copies(trace)


def _described(
    trace: Trace, model: nn.Module, aliases: Mapping[str, str]
) -> tuple[dict[Expr, IntArray], dict[Expr, Axes]]:
    """Return the rows of the axes, or products of two, whose sizes standard modules state."""
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
    """Let a tensor that was not read follow what was in its module, if that shrinks alike."""
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
            # Rotary embeddings of several kinds keep the first frequencies of each.
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

    Rotary embeddings keep an equal copy of their frequencies, to go back to it. Attention keeps a
    bias for segments beside one for content, of the same last axes, and reads it if given segments.
    """
    if isinstance(read, nn.Parameter) != isinstance(other, nn.Parameter):
        return False
    if isinstance(read, nn.Parameter):
        return read.dim() > 1 and other.shape[-read.dim() :] == read.shape
    return read.shape == other.shape and torch.equal(read, other)


def _forget_unread(trace: Trace) -> None:
    """Drop the sizes of new tensors that nothing reads, where other axes give them.

    They have as many positions as are left there, whatever goes.
    """
    trace.equations = [
        one
        for one in trace.equations
        if not trace.unread.intersection(one.rows[:1].ravel().tolist())
        or any(leaf[0] != "len" for leaf in leaves(one.expr))
    ]


def _freeze_unreached(trace: Trace, aliases: Mapping[str, str]) -> None:
    """Freeze tensors that the run did not read, and those at the same place in their siblings.

    What was not read may be read with other tokens (an expert that no token chose), and would not
    fit then if its siblings shrank.
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


def _state_equal(trace: Trace, left: Expr, right: Expr) -> None:
    """Record that code compares a size with an attribute, and goes on only if they are equal."""
    if right[0] == "len":
        left, right = right, left
    if left[0] == "len" and right[0] == "attr":
        trace.equations.append(Equation(right, trace.lengths[left[1]], "a comparison"))


def _are_equal(expr: Expr, old: Mapping[Expr, int]) -> bool:
    """Whether a comparison asks if two sizes are equal, or not, and they are."""
    left, right = (evaluate(side, old) for side in expr[1:])
    return expr[0] in ("==", "!=") and left == right


def _may_turn(expr: Expr, old: Mapping[Expr, int]) -> bool:
    """Whether a comparison of one size with a constant comes out otherwise if the size shrinks.

    Whether there is more than one is asked everywhere, and answered right either way: code that
    repeats or loops does so once.
    """
    (leaf,) = set(leaves(expr))
    now = evaluate(expr, old)
    return any(evaluate(expr, {leaf: value}) != now for value in range(2, old[leaf]))


def _used_as_numbers(trace: Trace) -> dict[Expr, str]:
    """Freeze axes whose length is used as a number; return attribute -> why it is a number, too."""
    old = trace.values
    found: dict[Expr, str] = {}
    for expr, where in trace.numbers.items():
        how = "used as a number"
        if expr[0] == PLACE:
            expr = expr[1]
        if expr[0] in COMPARISONS:
            if len(set(leaves(expr))) > 1:
                sides = {side[0] for side in expr[1:]}
                if _are_equal(expr, old) and sides in ({"len"}, {"len", "attr"}):
                    # Two tensors may differ in size where they did not; the twin says if they may.
                    _state_equal(trace, expr[1], expr[2])
                else:
                    trace.checks.append((expr, where))
                continue
            try:
                if not _may_turn(expr, old):
                    continue
                if any(side[0] == "%" and not evaluate(side, old) for side in expr[1:]):
                    trace.checks.append((expr, where))  # pairs, say, stay pairs
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
    """Freeze axes that are sized by attributes that are used as numbers, which say why."""
    for leaf, reason in as_number.items():
        own = [described[leaf]] if leaf in described else []
        for rows in (*own, *multiples.get(leaf, ())):
            trace.atoms.freeze(rows, reason)
    # What a module states of itself is stated anew, so what it sizes elsewhere must shrink as well.
    stated = (*(equation.expr for equation in trace.equations), *dict(trace.checks))
    sizing = {leaf for expr in stated for leaf in leaves(expr)}
    for leaf in sizing & described.keys():
        trace.equations.append(Equation(leaf, described[leaf], "its own weight"))
    # Where an attribute sizes an axis alone, that axis pins it: products with it are then free.
    alone = {equation.expr for equation in trace.equations if equation.expr in as_number}
    for equation in trace.equations:
        for leaf in leaves(equation.expr):
            if leaf in as_number and (equation.expr == leaf or leaf not in alone):
                trace.atoms.freeze(equation.rows, as_number[leaf])


def _settle_copies(trace: Trace) -> None:
    """Let the copies of an expanded axis be one with it, or stay with it, where they have to."""
    atoms = trace.atoms
    changed = True
    while changed:
        # Freezing one replica axis may touch another, so go on until nothing changes.
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
