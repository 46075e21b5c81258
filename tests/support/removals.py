"""Random removals that respect what binds groups together, and what is left after one."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction

import numpy as np
from torch import nn

from llm_pruner import types
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.types import Discovery, Group, IntArray


def bound_to(discovery: Discovery, group: Group) -> dict[str, Fraction]:
    """Return group -> units lost per unit that ``group`` loses, itself included."""
    return types.bound_to(group.name, {one.name: one for one in discovery.groups})


def scenes_apart(discovery: Discovery) -> list[Discovery]:
    """Return the discovery once for each way in which the model was run, with that one alone."""
    graph = discovery.graph
    return [replace(discovery, graph=replace(graph, scenes=(one,))) for one in graph.scenes]


def pick(
    discovery: Discovery, kinds: Collection[str] | None = None, *, seed: int = 0
) -> dict[str, IntArray]:
    """Remove about a third of the units of every group of the given kinds (of all by default)."""
    rng = np.random.default_rng(seed)
    removal: dict[str, IntArray] = {}
    for group in discovery.groups:
        wanted = kinds is None or group.kind in kinds
        if not wanted or group.frozen is not None or group.name in removal:
            continue
        if group.blocks is not None:
            per_block = group.size // len(np.unique(group.blocks))
            if per_block > 1:
                removal[group.name] = np.sort(
                    np.concatenate(
                        [
                            rng.permutation(np.flatnonzero(group.blocks == block))[
                                : max(1, per_block // 3)
                            ]
                            for block in np.unique(group.blocks)
                        ]
                    )
                )
            continue
        ratios = bound_to(discovery, group)
        step = math.lcm(*(ratio.denominator for ratio in ratios.values()))
        counts = [
            count
            for count in range(step, group.size, step)
            if (group.size - count) % group.multiple == 0
            and all(
                discovery.group(name).size - int(count * ratio) >= discovery.group(name).least
                for name, ratio in ratios.items()
            )
        ]
        if not counts:
            continue
        count = min(counts, key=lambda count: abs(count - group.size / 3))
        for name, ratio in ratios.items():
            size = discovery.group(name).size
            units = rng.permutation(size)
            if group.kind == "layers":
                # Of the second half: a hybrid cannot run without a layer of one of its kinds.
                units = units[units >= size // 2]
            removal[name] = np.sort(units[: int(count * ratio)])
    return removal


def cut_as_twin_(model: nn.Module, discovery: Discovery, removal: dict[str, IntArray]) -> float:
    """Cut a model, which computes what its masked twin does; return how far that is from before."""
    expected, before = twin_logits(model, discovery, removal), pruned_logits(model, discovery)
    cut_(model, discovery, removal)
    actual = pruned_logits(model, discovery)
    assert largest_difference(expected, actual) <= 1e-5
    return largest_difference(before, actual)
