"""Which members of a group tell its importance: those that read its axis, or multiply last."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from llm_pruner.models.linear_modules import Consumer
from llm_pruner.types import Group, Member

_IN_LAYER = re.compile(r".*?\.\d+\.")


def other_readers(
    group: Group, consumers: Sequence[Consumer], weights: Mapping[str, nn.Parameter]
) -> list[Member]:
    """Return the members that read the group's axis beside the weights of linear modules."""
    linear = {id(weights[f"{one.module}.weight"]) for one in consumers}
    read = [one for one in group.members if one.reads and not one.buffer]
    return [one for one in read if id(weights[one.tensor]) not in linear]


def last_members(group: Group) -> list[Member]:
    """Return the members, but for buffers, that multiply last, and the bias that is added then."""
    members = [member for member in group.members if not member.buffer]
    weights = [member for member in members if not _is_bias(member)] or members
    last = max((member.order for member in weights), default=0)
    chosen = [member for member in weights if member.order == last]
    stems = {_stem(member, "weight") for member in chosen}
    return [one for one in members if one in chosen or _stem(one, "bias") in stems]


def last_of_each_layer(group: Group, weights: Mapping[str, nn.Parameter]) -> list[Member]:
    """Return the members, but for norms, that multiply last in each layer."""
    layers: dict[str, list[Member]] = {}
    for member in group.members:
        place = _IN_LAYER.match(member.tensor)
        if not member.buffer:
            layers.setdefault(place[0] if place else "", []).append(member)
    found: list[Member] = []
    for members in layers.values():
        matrices = [one for one in members if _is_bias(one) or weights[one.tensor].ndim > 1]
        inside = members if all(map(_is_bias, matrices)) else matrices
        found += last_members(replace(group, members=tuple(inside)))
    return found


def _is_bias(member: Member) -> bool:
    return member.tensor.endswith("bias")


def _stem(member: Member, kind: str) -> str:
    return member.tensor.removesuffix(kind).rstrip("._")
