"""What of a model can be pruned, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from llm_pruner.discovery.groups import discover
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.models.forward import embedding_rows
from llm_pruner.models.load import load
from llm_pruner.settings.common import ModelSettings
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Group, IntArray

MANY_TOKENS, LARGE_SHARE = 100_000, 0.1
"""Tokens of a vocabulary for many languages, and the share of all parameters in its embeddings,
from which on most users do well to take some out."""


def tokens_go_first(tokens: int, embeddings: int, parameters: int) -> bool:
    """Whether a user does well to take out tokens before anything else of a model."""
    return tokens >= MANY_TOKENS and embeddings >= LARGE_SHARE * parameters


def inspect_model(model: ModelSettings) -> dict[str, Any]:
    """Return all groups of a model and all that is frozen, ready for JSON; no weights are read.

    Shares are of all parameters of the model.

    Raises:
        UserError: the model cannot be loaded.
        DiscoveryError: it cannot be run.
    """
    loaded = load(model, weights=False)
    discovery = discover(loaded.model)
    total = count_parameters(discovery)
    kinds = dict.fromkeys(group.kind for group in discovery.groups)
    return {
        "format_version": 1,
        "model": loaded.name,
        "parameters": total,
        "tokens": embedding_rows(loaded.model),
        "embeddings": model_size(loaded.model).embedding,
        "kinds": [_kind(kind, discovery, total) for kind in kinds],
        "groups": [_group(group, discovery, total) for group in discovery.groups],
        "frozen": [asdict(axis) for axis in discovery.frozen],
    }


def _kind(kind: str, discovery: Discovery, total: int) -> dict[str, Any]:
    """Sum up the groups of one kind; other kinds may hold the same parameters."""
    groups = [group for group in discovery.groups if group.kind == kind]
    free = [group for group in groups if group.frozen is None]
    parameters = _touched(free, discovery)
    return {
        "kind": kind,
        "groups": len(groups),
        "prunable_units": sum(group.size for group in free),
        "parameters": parameters,
        "share": parameters / total,
    }


def _group(group: Group, discovery: Discovery, total: int) -> dict[str, Any]:
    parameters = _touched([group], discovery)
    return {
        "name": group.name,
        "kind": group.kind,
        "layer": group.layer,
        "units": group.size,
        "parameters": parameters,
        "share": parameters / total,
        "frozen": group.frozen,
        "multiple": group.multiple,
        "least": group.least,
        "blocks": None if group.blocks is None else len(set(group.blocks.tolist())),
        "companions": {c.group: str(c.ratio) for c in group.companions},
        "members": [
            {
                "tensor": member.tensor,
                "dim": member.dim,
                "positions_per_unit": member.index.shape[1],
                "buffer": member.buffer,
            }
            for member in group.members
        ],
        "modules": list(group.modules),
    }


def _touched(groups: Iterable[Group], discovery: Discovery) -> int:
    """Return how many parameters lie in some unit of the groups; each counts once."""
    inside: set[str] = set()
    axes: dict[str, dict[int, list[IntArray]]] = {}
    for group in groups:
        for module in group.modules:
            inside.update(name for name in discovery.shapes if name.startswith(f"{module}."))
        for member in group.members:
            if not member.buffer:
                dims = axes.setdefault(member.tensor, {})
                dims.setdefault(member.dim, []).append(member.index.ravel())
    count = sum(math.prod(discovery.shapes[name]) for name in inside)
    for tensor in axes.keys() - inside:
        shape = discovery.shapes[tensor]
        # A weight is outside of all groups if no axis meets a unit at its position.
        outside = 1
        for dim, size in enumerate(shape):
            units = axes[tensor].get(dim)
            outside *= size if units is None else size - len(np.unique(np.concatenate(units)))
        count += math.prod(shape) - outside
    return count
