"""Values that rooms hand to each other.

A *group* is a set of axes removed together, a *member* one tensor axis in it, a *unit* what one
index removes (a head, a channel, a layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

Kind = Literal[
    "heads",  # key-value heads with all query heads that read them; single heads without sharing
    "query_heads",  # single query heads inside a key-value group
    "ffn",  # intermediate channels of a feed-forward network
    "hidden",  # channels of the residual stream
    "head_dim",  # query-key channels inside every head (rotary pairs where there is a rotation)
    "value_dim",  # value channels inside every head; follow head_dim where one attribute sizes both
    "experts",
    "layers",
    "other",
]

Removal = Mapping[str, IntArray]
"""Group name -> sorted unit indices to remove, in the numbering of the traced model."""

Place = tuple[str, int | None]
"""A decoder layer: the list of modules that it is in, and its number there."""

Scores = Mapping[str, FloatArray]
"""Group name -> importance per unit, shape (size,); higher means keep."""


@dataclass(frozen=True)
class Member:
    """One tensor axis of a group.

    Attributes:
        tensor: name of the parameter or buffer (the first name, if it is tied).
        index: shape (units, k); row u holds the positions along axis ``dim`` that unit u owns.
        order: place of the tensor's first use in the forward pass.
        buffer: true for buffers and plain tensor attributes, which carry no importance.
        reads: whether a product of the tensor and an activation sums over the axis.
    """

    tensor: str
    dim: int
    index: IntArray
    order: int
    buffer: bool = False
    reads: bool = False


@dataclass(frozen=True)
class Companion:
    """A group that must lose ``ratio`` units for each unit that this group loses."""

    group: str
    ratio: Fraction


@dataclass(frozen=True)
class Group:
    """Axes that are removed together; all units have the same shape.

    Attributes:
        name: unique and stable, such as ``layers.3.ffn`` or ``hidden``.
        kind: what a unit is.
        layer: index of the decoder layer, or None when the group spans several.
        size: number of units.
        members: the tensor axes; empty for ``layers``.
        blocks: shape (size,), or None. Units of one block compete among themselves: every block
            that keeps any unit must lose the same number (query heads inside key-value groups).
        companions: groups whose removed counts are bound to this one's.
        frozen: why no unit may be removed, or None.
        multiple: the number of units kept must be a multiple of this (grouped expert products need
            strides of 16 bytes).
        least: the number of units that must be kept at least, as a router chooses so many.
        modules: for ``layers`` only, the qualified module name of each unit.
        owner: name of the group whose units are the blocks (key-value heads), if there is one.
        path: the list of modules that ``layer`` counts in, or whose children the ``layers`` are.
    """

    name: str
    kind: Kind
    layer: int | None
    size: int
    members: tuple[Member, ...]
    blocks: IntArray | None = None
    companions: tuple[Companion, ...] = ()
    frozen: str | None = None
    multiple: int = 1
    least: int = 1
    modules: tuple[str, ...] = ()
    owner: str | None = None
    path: str = ""

    @property
    def place(self) -> Place:
        """The decoder layer that the group lies in; lists of layers are numbered each from 0."""
        return self.path, self.layer

    @property
    def label(self) -> str:
        """The name without the layer: ``layers.3.ffn`` is ``ffn``."""
        return self.name.removeprefix(f"layers.{self.layer}.")

    @property
    def layers(self) -> IntArray:
        """Shape (size,): for ``layers`` only, the number of the decoder layer that a unit is."""
        numbers = [name.rpartition(".")[2] for name in self.modules]
        if not numbers or not all(number.isdigit() for number in numbers):
            return np.arange(self.size, dtype=np.int64)
        return np.array(numbers, dtype=np.int64)

    def name_at(self, layer: int) -> str:
        """Return the name that the group has if its layer has another number."""
        return self.name if self.layer is None else f"layers.{layer}.{self.label}"


@dataclass(frozen=True)
class Layer:
    """What is left of one decoder layer, or (None) of the groups that span all layers.

    ``sizes`` is short name of a group (``heads``, ``ffn``) -> (kept, dense) number of units.
    """

    layer: int | None
    removed: bool = False
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """Parameter counts of a model, a tied parameter once; None what is not known."""

    total: int
    embedding: int | None = None
    blocks: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class SplitTrial:
    """A trial removal: how the budget was split between structures, and the damage.

    Attributes:
        split: structure -> share of the removed parameters.
        divergence: mean over held-out tokens of KL(dense || pruned), in nats.
        refitted: whether least squares had repaired it.
        taken: whether the model was pruned with this split.
    """

    split: dict[str, float]
    divergence: float
    refitted: bool = False
    taken: bool = False


@dataclass(frozen=True)
class FrozenAxis:
    """A tensor axis, or a part of it, that cannot be pruned."""

    tensor: str
    dim: int
    positions: int
    size: int
    reason: str


@dataclass(frozen=True)
class Discovery:
    """What can be removed from one model.

    Attributes:
        groups: in the order of the forward pass.
        frozen: axes that belong to no group, with the reason.
        shapes: shape of every parameter, tied ones once, by its first name.
        buffers: shape of every buffer and plain tensor attribute.
        aliases: other names of tied parameters -> first name.
        graph: the trace behind it, for ``tracing`` and ``surgery`` alone.
    """

    groups: tuple[Group, ...]
    frozen: tuple[FrozenAxis, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    graph: Any = field(repr=False, default=None)

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        """The groups by their names."""
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> Group:
        """Return the group of that name; KeyError if there is none."""
        return self.by_name[name]


@dataclass(frozen=True)
class Edits:
    """All that a removal changes in a model, by names in the *pruned* model, ready for JSON.

    Attributes:
        shapes: new shape of every parameter that changes.
        buffers: buffer -> {dim: kept positions} for buffers and plain tensor attributes.
        attributes: module -> {attribute: new value}; a dotted attribute such as
            ``config.num_heads`` is set on the module's own copy of that object.
        layers: module list -> kept indices, in dense numbering; absent if all are kept.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def bound_to(name: str, groups: Mapping[str, Group]) -> dict[str, Fraction]:
    """Return the groups that lose units with one, itself first -> units for each of its own."""
    ratios = {name: Fraction(1)}
    pending = [name]
    while pending:
        leader = pending.pop()
        for companion in groups[leader].companions:
            if companion.group in groups and companion.group not in ratios:
                ratios[companion.group] = ratios[leader] * companion.ratio
                pending.append(companion.group)
    return ratios
