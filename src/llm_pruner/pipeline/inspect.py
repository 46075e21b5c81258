"""What of a model can be pruned, as plain data."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from llm_pruner.groups import discover
from llm_pruner.pipeline.settings import ModelSettings
from llm_pruner.removal import count_parameters
from llm_pruner.sources import load_model
from llm_pruner.types import Discovery, Group

FORMAT_VERSION = 1


def inspect_model(model: ModelSettings) -> dict[str, Any]:
    """Return all groups of a model and all that is frozen, ready for JSON.

    Raises:
        UserError: the model cannot be loaded.
        DiscoveryError: it cannot be run.
    """
    loaded = load_model(
        model.source,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        tokenizer_required=False,
    )
    return describe(loaded.name, discover(loaded.model))


def describe(name: str, discovery: Discovery) -> dict[str, Any]:
    """Return a discovery as plain data; shares are of all parameters of the model."""
    total = count_parameters(discovery)
    return {
        "format_version": FORMAT_VERSION,
        "model": name,
        "parameters": total,
        "groups": [_group(group, discovery, total) for group in discovery.groups],
        "frozen": [
            {
                "tensor": axis.tensor,
                "dim": axis.dim,
                "positions": axis.positions,
                "size": axis.size,
                "reason": axis.reason,
            }
            for axis in discovery.frozen
        ],
    }


def _group(group: Group, discovery: Discovery, total: int) -> dict[str, Any]:
    parameters = touched(group, discovery)
    return {
        "name": group.name,
        "kind": group.kind,
        "layer": group.layer,
        "units": group.size,
        "parameters": parameters,
        "share": parameters / total,
        "frozen": group.frozen,
        "multiple": group.multiple,
        "blocks": None if group.blocks is None else len(Counter(group.blocks.tolist())),
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


def touched(group: Group, discovery: Discovery) -> int:
    """Return how many parameters lie in some unit of the group; shared positions count once."""
    if group.modules:
        inside = tuple(f"{module}." for module in group.modules)
        return sum(math.prod(s) for name, s in discovery.shapes.items() if name.startswith(inside))
    count = 0
    by_tensor: dict[str, dict[int, int]] = {}
    for member in group.members:
        if not member.buffer:
            by_tensor.setdefault(member.tensor, {})[member.dim] = len(set(member.index.ravel()))
    for tensor, dims in by_tensor.items():
        shape = discovery.shapes[tensor]
        # A weight is outside the group if none of its axes meets a unit.
        outside = math.prod(shape) if not dims else 1
        for dim, size in enumerate(shape):
            outside *= size - dims[dim] if dim in dims else size
        count += math.prod(shape) - outside
    return count
