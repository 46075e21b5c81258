"""Config values that change when layers are removed.

Besides the number of layers these are lists with one entry a layer (``layer_types``), lists of
layer numbers (``mlp_only_layers``) and numbers that divide the layers into those before and after
(``first_k_dense_replace``). No key is known by name: a change is taken if it brings the model that
the config builds closer to the layers that were kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.checkpoints.meta import Sizes, build_meta, entries, is_integer, sizes, try_sizes
from llm_pruner.models.layers import keep_children

_NUMBERS_LAYERS = re.compile("layer|idx|index|indices|block")


class Depth(NamedTuple):
    """Config values for the layers that were kept.

    Attributes:
        values: dotted path -> value.
        exact: whether the dense model with these values has just the kept layers, in every size
            and every number that their code reads.
    """

    values: Mapping[str, Any]
    exact: bool


def layer_values(
    model_class: type[PreTrainedModel],
    dense_config: PreTrainedConfig,
    layers: Mapping[str, tuple[int, ...]],
    target: Sizes,
) -> Depth | None:
    """Return the config values that change with removed layers.

    Args:
        model_class: class of the model.
        dense_config: config before pruning; is not changed.
        layers: module list -> kept indices.
        target: sizes of the pruned model; says how its layers number themselves.

    Returns:
        None if no integer of the config sets the length of one of the lists.
    """
    if not layers:
        return Depth({}, exact=True)
    skeleton = build_meta(model_class, dense_config)
    dense = sizes(skeleton)
    values: dict[str, Any] = {}
    for name, kept in layers.items():
        shorter = _shorter(model_class, dense_config, values, name, kept, dense)
        if shorter is None:
            return None
        values = shorter
        keep_children(skeleton, name, kept)
    wanted = sizes(skeleton)
    counts = {(dense["list", name, "len"], len(kept)) for name, kept in layers.items()}

    def agrees(key: tuple[str, str, Any], found: Sizes) -> bool:
        one, other = found.get(key), wanted.get(key)
        # A layer may number itself as the pruned model does; modules may hold how many there are.
        return one == other or (
            key[0] == "attribute"
            and one is not None
            and (one == target.get(key) or (other, one) in counts)
        )

    def count_wrong(values: Mapping[str, Any]) -> float:
        found = try_sizes(model_class, dense_config, values)
        if found is None:
            return inf
        return sum(not agrees(key, found) for key in found.keys() | wanted.keys())

    wrong = count_wrong(values)
    taken = []
    for name, kept in layers.items():
        count = dense["list", name, "len"]
        for path, value, silent in _renumbered(dense_config, values, count, kept):
            if wrong == 0 and not silent:
                continue
            trial = values | {path: value}
            found = count_wrong(trial)
            # Which layers attend to a window, say, shows in no size of the model.
            if found < wrong or (silent and found == wrong):
                values, wrong = trial, found
                taken += [] if silent else [path]
    for path in taken:
        # What helped as long as another value was wrong may be wrong now.
        trial = {other: value for other, value in values.items() if other != path}
        found = count_wrong(trial)
        if found <= wrong:
            values, wrong = trial, found
    return Depth(values, exact=wrong == 0)


def _shorter(
    model_class: type[PreTrainedModel],
    dense_config: PreTrainedConfig,
    values: Mapping[str, Any],
    name: str,
    kept: Sequence[int],
    dense: Sizes,
) -> dict[str, Any] | None:
    """Return ``values`` with the length of one module list and the lists of that length."""
    count = dense.get(("list", name, "len"))
    lists = {
        path: [value[index] for index in kept]
        for path, value in entries(dense_config)
        if isinstance(value, list) and len(value) == count and not _names_all(value)
    }
    for path, value in entries(dense_config):
        if not is_integer(value) or value < 2 or value != count:
            continue
        shorter = {**values, path: len(kept), **lists}
        found = try_sizes(model_class, dense_config, shorter)
        if found is not None and found.get(("list", name, "len")) == len(kept):
            return shorter
    return None


def _names_all(values: Sequence[Any]) -> bool:
    """Whether a list holds the number of every layer; two numbers may be flags as well."""
    return len(values) > 2 and all(map(is_integer, values)) and {*values} == {*range(len(values))}


def _renumbered(
    config: PreTrainedConfig, values: Mapping[str, Any], count: int, kept: Sequence[int]
) -> Iterator[tuple[str, Any, bool]]:
    """Yield (path, value, whether it may change nothing that is countable) to try."""
    place = {old: new for new, old in enumerate(kept)}
    for path, value in entries(config):
        if path in values:
            continue
        if isinstance(value, list) and value and all(map(is_integer, value)):
            named = _NUMBERS_LAYERS.search(path.rpartition(".")[2]) is not None
            if named and len(set(value)) == len(value) and 0 <= min(value) <= max(value) < count:
                yield path, [place[index] for index in value if index in place], True
        elif is_integer(value) and 0 < value <= count:
            before = sum(index < value for index in kept)
            through = sum(index <= value for index in kept) - 1
            for new in dict.fromkeys((before, through)):
                if new != value and new >= 0:
                    yield path, new, False
