"""What is asked for: how much to remove (`Target`), where from (`Selection`), and which groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np

from llm_pruner.errors import UserError, require_kind
from llm_pruner.planning.numbering import Numbering
from llm_pruner.settings.words import STRUCTURES, known_structure
from llm_pruner.types import Discovery, Group, IntArray, bound_to

Scope = Literal["local", "global"]

_KINDS = ("unit_ratio", "ratio", "params", "kv_cache")


@dataclass(frozen=True)
class Target:
    """How much to remove: exactly one of the first four is set.

    Attributes:
        unit_ratio: share of units to remove in each chosen layer, in (0, 1) (LLM-Pruner, arXiv
            2305.11627). A group of n units loses floor(n * unit_ratio).
        ratio: share of all parameters of the dense model to remove, in (0, 1).
        params: number of parameters to keep.
        kv_cache: share of what the dense model's cache grows by with each token to remove, in
            (0, 1).
        loose: an intermediate goal of several steps: take the nearest that can be reached
            (removing nothing included) where a final goal would raise.

    Raises:
        UserError: none or several are set, or what is set is no such number.
    """

    unit_ratio: float | None = None
    ratio: float | None = None
    params: int | None = None
    kv_cache: float | None = None
    loose: bool = False

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise UserError(
                f"the target needs exactly one of {', '.join(_KINDS)}; got {str(self) or 'none'}"
            )
        ((name, value),) = given.items()
        require_kind(name, value, Real, "a number")
        if name != "params" and not 0 < value < 1:
            raise UserError(
                f"{name}={value} is outside (0, 1); give the share to remove, such as 0.2"
            )
        if name == "params" and not value >= 1:
            raise UserError(f"params={value} keeps nothing; give the number to keep")

    def _given(self) -> dict[str, float]:
        values = {name: getattr(self, name) for name in _KINDS}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._given().items())

    def kept(self, dense: int) -> int:
        """Return how much to keep of ``dense`` parameters, or bytes of cache per token.

        Raises UserError if ``params`` is not below ``dense``. Not for a ``unit_ratio``.
        """
        share = self.ratio if self.kv_cache is None else self.kv_cache
        if share is not None:
            return dense - round(dense * exact(share))
        assert self.params is not None
        if self.params >= dense:
            raise UserError(
                f"params={self.params:,} is not below the {dense:,} parameters of the "
                "model; give the smaller number to keep"
            )
        return self.params


@dataclass(frozen=True)
class Selection:
    """Which units compete, and how.

    Attributes:
        structures: kinds to prune, of `STRUCTURES`, or one.
        scope: ``local`` ranks inside each group and takes the same share from each; ``global``
            ranks the units of all chosen groups together by importance per removed parameter.
        protect_first: decoder layers at the start that stay whole.
        protect_last: decoder layers at the end that stay whole.
        layer_ranges: structure -> (first, last) layer to prune, both included, counted from 0;
            replaces the protection for that structure.
        round_to: the number of units kept in a group of channels (ffn, hidden, head_dim, other)
            is a multiple of this, unless the group is left alone.
        heads_to: the same of key-value heads.
        split: structure -> its share of the parameters that are removed; None lets the ranking
            decide (``global``) or takes the same share of units everywhere (``local``). For targets
            in parameters alone.
        spread: with ``global``, no group loses more than this many times the share of its units
            that would be lost if all lost the same, nor keeps less than one in this many of what
            would be kept, all steps together; None for no limit.
        uniform: groups of one structure keep the same number of units in all layers, so that a
            plain config can say the sizes; with ``local`` and without protection or ranges.

    Raises:
        UserError: one of these has no such value.
    """

    structures: tuple[str, ...]
    scope: Scope = "local"
    protect_first: int = 0
    protect_last: int = 0
    layer_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    round_to: int = 1
    heads_to: int = 1
    split: Mapping[str, float] | None = None
    spread: float | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        given: object = self.structures
        if isinstance(given, str):
            object.__setattr__(self, "structures", (given,))
        if not self.structures:
            raise UserError(f"no structures given; choose from {', '.join(STRUCTURES)}")
        for name in self.structures:
            known_structure(name)
            if self.structures.count(name) > 1:
                raise UserError(f"structure {name!r} is given twice; name it once")
        if self.scope not in get_args(Scope):
            raise UserError(f"scope={self.scope!r} is unknown; use local or global")
        for name in ("protect_first", "protect_last", "round_to", "heads_to"):
            require_kind(name, getattr(self, name), Integral, "a whole number")
        require_kind("spread", self.spread, Real | None, "a number, such as 2")
        shares = "a share for each structure, such as {'heads': 0.3, 'ffn': 0.7}"
        require_kind("split", self.split, Mapping | None, shares)
        if self.protect_first < 0 or self.protect_last < 0:
            raise UserError(
                f"protect_first={self.protect_first}, protect_last={self.protect_last}: "
                "a number of layers cannot be negative"
            )
        for name, multiple in (("round_to", self.round_to), ("heads_to", self.heads_to)):
            if multiple < 1:
                raise UserError(f"{name}={multiple} is not a multiple to round to; use 1 or more")
        for name in self.layer_ranges:
            if name not in self.structures:
                raise UserError(
                    f"a layer range is given for {name}, which is not pruned; add it to the "
                    f"structures ({', '.join(self.structures)}) or drop the range"
                )
            ends = self.layer_ranges[name]
            numbers = isinstance(ends, tuple | list) and all(isinstance(n, Integral) for n in ends)
            if not numbers or len(ends) != 2 or min(ends) < 0:
                raise UserError(
                    f"layer range {name}={ends!r} names no layers; give the first and the last, "
                    "counted from 0, such as (0, 11)"
                )
        protects = self.protect_first > 0 or self.protect_last > 0
        if self.uniform and (self.scope != "local" or self.layer_ranges or protects):
            raise UserError(
                "uniform layers need scope local and no protected layers or layer ranges; drop "
                "these or uniform"
            )
        if self.spread is not None and not self.spread >= 1:
            raise UserError(
                f"spread={self.spread} cannot reach the target; use 1 (all alike) or more"
            )
        if self.split is not None:
            self._check_split(self.split)

    def _check_split(self, split: Mapping[str, float]) -> None:
        for name, share in split.items():
            if name not in self.structures:
                raise UserError(
                    f"a share is given for {name}, which is not pruned; add it to the structures "
                    f"({', '.join(self.structures)}) or drop the share"
                )
            require_kind(f"the share of {name}", share, Real, "a number")
            if not 0 <= share <= 1:
                raise UserError(f"share {name}={share} is outside 0 to 1; give a part of 1")
        missing = [name for name in self.structures if name not in split]
        if missing:
            raise UserError(
                f"no share is given for {', '.join(missing)}; name every structure in the split"
            )
        if abs(sum(split.values()) - 1) > 1e-6:
            raise UserError(
                f"the shares of the split add up to {sum(split.values()):g}; they must give 1"
            )


def exact(ratio: float) -> Fraction:
    """Return the decimal number that a user wrote: 0.29 is 29/100, not the nearest double."""
    return Fraction(repr(float(ratio)))


def step_targets(dense_params: int, target: Target, steps: int) -> list[Target]:
    """Return the cumulative target of each step, linear in what is removed; the last is ``target``.

    A unit ratio stays a share of the dense units, so `allocate` needs the `Numbering` of the
    steps before, and a share of the cache a share of the dense cache. The other targets become
    numbers of parameters to keep.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"steps={steps} prunes nothing; use 1 or more")

    def part(step: int) -> Target:
        if target.unit_ratio is not None:
            return Target(unit_ratio=float(exact(target.unit_ratio) * step / steps), loose=True)
        if target.kv_cache is not None:
            return Target(kv_cache=float(exact(target.kv_cache) * step / steps), loose=True)
        removed = dense_params - target.kept(dense_params)
        return Target(params=dense_params - removed * step // steps, loose=True)

    return [*map(part, range(1, steps)), target]


def choose_groups(
    discovery: Discovery, selection: Selection, numbering: Numbering | None = None
) -> tuple[Group, ...]:
    """Return the groups that may lose units, in the order of the discovery.

    Frozen groups are left out as long as their structure has others. Protection and ranges count
    the layers of the dense model. Once something is gone, a structure of which nothing is left to
    prune has done its part, as long as there are others.

    Raises:
        UserError: a structure that the model lacks or that is frozen everywhere (with the reason),
            no layer left to prune, a range beyond the last layer or for what spans all layers;
            groups that lose units with others, which are protected; layers beside others in a
            model with several lists of them.
    """
    numbering = numbering or Numbering.dense(discovery)
    lists = sum(group.kind == "layers" for group in discovery.groups)
    if "layers" in selection.structures and len(selection.structures) > 1 < lists:
        raise UserError(
            f"this model has {lists} lists of layers, in which a number stands for different "
            "layers; prune layers in a run of their own (--structures layers)"
        )
    chosen: set[str] = set()
    for structure in selection.structures:
        try:
            groups = _groups_of(structure, discovery, selection, numbering)
        except UserError as error:
            if not numbering.begun:
                raise
            done = error
        else:
            chosen.update(group.name for group in groups)
    if not chosen:
        raise done
    return tuple(group for group in discovery.groups if group.name in chosen)


def _groups_of(
    structure: str, discovery: Discovery, selection: Selection, numbering: Numbering
) -> list[Group]:
    """Return the groups of one structure that may lose units."""
    longest = max(numbering.lengths.values(), default=0)
    first, last = _checked_layers(selection, structure, longest)
    groups = [group for group in discovery.groups if group.kind == structure]
    if not groups:
        kinds = dict.fromkeys(g.kind for g in discovery.groups if g.kind != "value_dim")
        raise UserError(
            f"this model has no {structure} to prune; it has {', '.join(kinds) or 'nothing'} "
            f"(llm-pruner inspect lists what is frozen, and why)"
        )
    free = [group for group in groups if group.frozen is None]
    if not free:
        raise UserError(
            f"{structure} cannot be pruned in this model: {groups[0].frozen}; "
            f"leave {structure} out of the structures"
        )
    spans_all = structure != "layers" and all(group.layer is None for group in free)
    if structure in selection.layer_ranges and spans_all:
        raise UserError(f"{structure} spans all layers, so it takes no layer range; drop the range")
    inside = [group for group in free if _can_lose(group, selection, numbering)]
    if not inside:
        raise UserError(
            f"no {structure} in layers {first} to {last} can be pruned; choose other layers"
        )
    names, by_name = {group.name for group in inside}, {group.name: group for group in free}
    for group in inside:
        for other in bound_to(group.name, by_name).keys() - names:
            raise UserError(
                f"{group.name} loses the same units as {other}, which is not among the layers to "
                f"prune; choose all layers (--protect-first 0 --protect-last 0), or leave "
                f"{structure} out of the structures"
            )
    return inside


def scored_groups(discovery: Discovery, selection: Selection, numbering: Numbering) -> set[str]:
    """Return the names of groups that may lose units, and of those that lose some with them."""
    chosen = choose_groups(discovery, selection, numbering)
    return {name for group in chosen for name in bound_to(group.name, discovery.by_name)}


def _can_lose(group: Group, selection: Selection, numbering: Numbering) -> bool:
    """Whether layers that are neither protected nor out of range hold a group, or are its units."""
    if group.kind == "layers":
        dense = numbering.groups[numbering.names[group.name]]
        return len(removable_layers(dense, selection, numbering)) > 0
    if group.layer is None:
        return True
    first, last = _layers(selection, group.kind, numbering.lengths[group.path])
    return first <= int(numbering.layers[group.path][group.layer]) <= last


def removable_layers(dense: Group, selection: Selection, numbering: Numbering) -> IntArray:
    """Return the units of the dense ``layers`` that are neither protected nor out of range."""
    numbers = dense.layers
    first, last = _layers(selection, "layers", numbering.lengths[dense.path])
    return np.flatnonzero((numbers >= first) & (numbers <= last)).astype(np.int64)


def _layers(selection: Selection, structure: str, total: int) -> tuple[int, int]:
    """Return the first and last layer, of so many, that a structure is pruned in, if any is."""
    unprotected = selection.protect_first, total - 1 - selection.protect_last
    return selection.layer_ranges.get(structure, unprotected)


def _checked_layers(selection: Selection, structure: str, total: int) -> tuple[int, int]:
    """Return the first and last layer, of the longest list, that a structure is pruned in."""
    first, last = _layers(selection, structure, total)
    if structure in selection.layer_ranges:
        if last < first:
            raise UserError(f"layer range {structure}={first}-{last} runs backwards; swap its ends")
        if last >= total:
            raise UserError(
                f"layer range {structure}={first}-{last} goes past the last layer; "
                f"the model has {total} layers, 0 to {total - 1}"
            )
    elif last < first and total:
        raise UserError(
            f"protect_first={selection.protect_first} and protect_last={selection.protect_last} "
            f"cover all {total} layers, so nothing is left to prune; protect fewer"
        )
    return first, last
