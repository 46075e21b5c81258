"""Layers that are taken out of module lists, and what numbers or lists those that stay."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

_NUMBER_NAME = re.compile("idx|index|layer")


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors are those of the original until surgery."""
    held = [value for module in model.modules() for value in vars(module).values()]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for value in held if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_layers(model: nn.Module, path: str, gone: Sequence[int]) -> nn.Module:
    """Return a copy without some children of a module list; it shares the tensors."""
    smaller = sharing_copy(model)
    lists = {path: len(model.get_submodule(path))}  # type: ignore[arg-type]
    names = tuple(f"{path}.{index}" for index in gone)
    rename = Renaming(lists, names)
    numbers = [*layer_numbers(model, lists, names)]
    apply_layers(smaller, rename.kept)
    for module, attribute, value in numbers:
        if not rename.is_gone(f"{module}."):
            set_attribute(smaller.get_submodule(rename(f"{module}.")[:-1]), attribute, value)
    return smaller


def apply_layers(model: nn.Module, layers: Mapping[str, Sequence[int]]) -> None:
    """Keep only the given children of module lists, and state the new number in the settings.

    A list-valued setting with one entry per layer keeps the entries of the layers that stay; lists
    of token ids may have that length by chance and are left alone.
    """
    for path, kept in layers.items():
        children = model.get_submodule(path)
        if not isinstance(children, nn.ModuleList):
            raise TypeError(f"{path} is no module list")
        count = len(children)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList([children[i] for i in kept]))
        for config in configs_of(model):
            _filter_config(config, count, kept)


def set_attribute(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer that a module's code reads.

    ``name.3`` is an item of a tuple or list; ``config.num_heads`` is set on the module's own copy
    of its configuration, since modules share one.
    """
    key, _, inner = attribute.partition(".")
    if not inner:
        setattr(module, key, value)
        return
    holder = getattr(module, key)
    if isinstance(holder, tuple | list):
        items = list(holder)
        items[int(inner)] = value
        setattr(module, key, type(holder)(items))
        return
    own = copy.copy(holder)
    vars(own)[inner] = value
    vars(module)[key] = own


class Renaming:
    """Names of tensors and modules after layers were removed and the rest renumbered."""

    def __init__(self, lists: Mapping[str, int], gone: tuple[str, ...]) -> None:
        self._gone = tuple(f"{module}." for module in gone)
        self.kept: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, dict[int, int]] = {}
        for path, count in lists.items():
            kept = tuple(i for i in range(count) if f"{path}.{i}" not in gone)
            if len(kept) < count:
                self.kept[path] = kept
                self._places[path] = {old: new for new, old in enumerate(kept)}

    def is_gone(self, name: str) -> bool:
        return bool(self._gone) and name.startswith(self._gone)

    def __call__(self, name: str) -> str:
        for path, places in self._places.items():
            match = re.match(re.escape(path) + r"\.(\d+)(\.|$)", name)
            if match:
                return f"{path}.{places[int(match.group(1))]}{name[match.end(1) :]}"
        return name


def numbering(
    model: nn.Module, path: str, count: int
) -> dict[tuple[str, str], tuple[int, dict[int, int]]]:
    """Return the attributes that number the layers: (module inside a layer, attribute) -> step.

    Beside the step stands the number of each layer that has the attribute.
    """
    present: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    children: Mapping[str, nn.Module | None] = model.get_submodule(path)._modules
    for i, child in ((int(name), child) for name, child in children.items() if child is not None):
        for inner, module in child.named_modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    present[inner, key][i] = value
    steps = {name: _step(name[1], values, count) for name, values in present.items()}
    return {name: (step, present[name]) for name, step in steps.items() if step is not None}


def layer_numbers(
    model: nn.Module,
    lists: Mapping[str, int],
    gone: tuple[str, ...],
    keep: Collection[tuple[str, str, str]] = (),
) -> Iterator[tuple[str, str, int]]:
    """Yield (module, attribute, new value) for attributes that hold the number of their layer.

    Those in ``keep``, (list, module inside a layer, attribute), stay what they are.
    """
    for path, count in lists.items():
        kept = [i for i in range(count) if f"{path}.{i}" not in gone]
        if len(kept) == count:
            continue
        for (inner, key), (step, values) in numbering(model, path, count).items():
            if (path, inner, key) in keep:
                continue
            for new, old in enumerate(kept):
                if old in values and new != old:
                    module = f"{path}.{old}.{inner}" if inner else f"{path}.{old}"
                    yield module, key, values[old] - step * (old - new)


def _step(key: str, values: Mapping[int, int], count: int) -> int | None:
    """Return by how much an attribute grows from layer to layer, if it numbers them."""
    if all(value == i for i, value in values.items()):
        # An attribute that only one layer has may equal the layer's number by chance.
        return 1 if len(values) > 1 or _NUMBER_NAME.search(key) else None
    if len(values) != count or not _NUMBER_NAME.search(key):
        return None
    # Layers of two attentions each number the attentions.
    step = values[1] - values[0]
    even = all(value == values[0] + step * i for i, value in values.items())
    return step if 0 <= values[0] < step and even else None


def configs_of(model: nn.Module) -> list[Any]:
    """Return the settings that modules hold under ``config``, with those of a text model."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            found[id(config)] = config
            inner = getattr(config, "text_config", None)
            if inner is not None:
                found[id(inner)] = inner
    return list(found.values())


def _filter_config(config: Any, count: int, kept: Sequence[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != count:
        return
    try:
        config.num_hidden_layers = len(kept)
    except NotImplementedError:
        # Models with an encoder as well count their layers apart.
        for key, value in list(vars(config).items()):
            if key.endswith("decoder_layers") and value == count:
                setattr(config, key, len(kept))
    for key, value in list(vars(config).items()):
        if "token" in key:
            continue
        if isinstance(value, list | tuple) and len(value) == count:
            # Numbers of all layers are no entries of layers.
            numbers = count > 2 and sorted(value, key=str) == sorted(range(count), key=str)
            left = range(len(kept)) if numbers else (value[i] for i in kept)
            # Of such a length by chance, if the config refuses a shorter one.
            with suppress(StrictDataclassError):
                setattr(config, key, type(value)(left))
