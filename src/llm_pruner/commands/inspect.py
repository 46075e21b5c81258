"""What of a model can be pruned, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from llm_pruner.discovery.groups import discover
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.models.forward import embedding_rows
from llm_pruner.models.load import load
from llm_pruner.planning.costs import ParameterCounter
from llm_pruner.settings.common import ModelSettings
from llm_pruner.types import Discovery, Group

MANY_TOKENS, LARGE_SHARE = 100_000, 0.1
"""Tokens of a vocabulary for many languages, and the share of all parameters in its embeddings,
from which on most users do well to take some out."""


def tokens_go_first(tokens: int, embeddings: int, parameters: int) -> bool:
    """Whether a user does well to take out tokens before anything else of a model."""
    return tokens >= MANY_TOKENS and embeddings >= LARGE_SHARE * parameters


def inspect_model(model: ModelSettings) -> dict[str, Any]:
    """Return all groups of a model and all that is frozen, ready for JSON; no weights are read.

    Shares are of all parameters. Raises UserError if it cannot be loaded, DiscoveryError if run.
    """
    loaded = load(model, weights=False)
    discovery = discover(loaded.model)
    counter = ParameterCounter(discovery)
    kinds = dict.fromkeys(group.kind for group in discovery.groups)
    return {
        "format_version": 1,
        "model": loaded.name,
        "parameters": counter.total,
        "tokens": embedding_rows(loaded.model),
        "embeddings": model_size(loaded.model).embedding,
        "kinds": [_kind(kind, discovery, counter) for kind in kinds],
        "groups": [_group(group, counter) for group in discovery.groups],
        "frozen": [asdict(axis) for axis in discovery.frozen],
    }


def _kind(kind: str, discovery: Discovery, counter: ParameterCounter) -> dict[str, Any]:
    """Sum up the groups of one kind; other kinds may hold the same parameters."""
    groups = [group for group in discovery.groups if group.kind == kind]
    free = [group for group in groups if group.frozen is None]
    units = sum(group.size for group in free)
    return {"kind": kind, "groups": len(groups), "prunable_units": units, **_share(free, counter)}


def _group(group: Group, counter: ParameterCounter) -> dict[str, Any]:
    members = [
        {
            "tensor": member.tensor,
            "dim": member.dim,
            "positions_per_unit": member.index.shape[1],
            "buffer": member.buffer,
        }
        for member in group.members
    ]
    return {
        "name": group.name,
        "kind": group.kind,
        "layer": group.layer,
        "units": group.size,
        **_share([group], counter),
        "frozen": group.frozen,
        "multiple": group.multiple,
        "least": group.least,
        "blocks": None if group.blocks is None else len(set(group.blocks.tolist())),
        "companions": {c.group: str(c.ratio) for c in group.companions},
        "members": members,
        "modules": list(group.modules),
    }


def _share(groups: Iterable[Group], counter: ParameterCounter) -> dict[str, Any]:
    """Return how many parameters lie in some unit of the groups; each counts once."""
    left = counter.count({one.name: np.arange(one.size) for one in groups})
    touched = counter.total - left
    return {"parameters": touched, "share": touched / counter.total}
