"""A recipe applied to a freshly built dense model, after a check that it fits.

A checkpoint is data: its recipe may cut what the model has, and replace numbers by numbers. Names
are looked up among registered submodules, parameters and buffers, and in the ``__dict__`` of a
module or its settings, before anything of the model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.checkpoints.meta import is_integer
from llm_pruner.checkpoints.recipe import Recipe, shown
from llm_pruner.errors import UserError
from llm_pruner.models.layers import (
    NUMBERS_LAYERS,
    is_layer_list,
    is_settings,
    keep_children,
    set_attributes_,
)
from llm_pruner.models.modeling_pruned import (
    cut_buffers_,
    reshape_parameters_,
    set_config_,
)

_NEVER_DENSE = re.compile(r"_.*|auto_map|architectures|.*dtype|.*quantization.*|trust_remote_code")
"""Keys of a config that say what is loaded, not how large it is."""

_MOST_NUMBER = 2**24


def cut_skeleton_(model: PreTrainedModel, recipe: Recipe, kept_config: Mapping[str, Any]) -> None:
    """Cut a dense model without weights to the recipe's sizes; UserError if it does not fit.

    ``kept_config``: the config values that the recipe made dense, by dotted path.
    """
    require_none(model, _layer_misfits(model, recipe))
    for path, kept in recipe.layers.items():
        keep_children(model, path, kept)
    # Names are those of a model without the removed layers, which nobody has seen yet.
    find = (_shape_misfits, _buffer_misfits, attribute_misfits)
    require_none(model, chain.from_iterable(misfits(model, recipe) for misfits in find))
    set_config_(model, kept_config)
    reshape_parameters_(model, tied_shapes(model, recipe))
    cut_buffers_(model, recipe.buffers, saved=True)


def finish_(model: nn.Module, recipe: Recipe) -> None:
    """Cut and set what depends on no weights, once these are loaded."""
    # Buffers that no checkpoint holds have just been computed from the config, in dense size.
    cut_buffers_(model, recipe.buffers, saved=False)
    set_attributes_(model, recipe)


def require_none(owner: nn.Module | PreTrainedConfig, misfits: Iterator[str]) -> None:
    """Raise UserError for the first entry of a recipe that does not fit the model or config."""
    for what in misfits:
        raise UserError(
            f"the pruning recipe in config.json {what}, so it does not fit {type(owner).__name__} "
            "as this transformers builds it; use the config.json that belongs to these weights"
        )


def config_misfits(config: PreTrainedConfig, recipe: Recipe) -> Iterator[str]:
    """Yield dense values that replace no whole number and no list of the config."""
    for path, value in recipe.dense_config.items():
        *inner, name = path.split(".")
        level: Any = config
        for part in inner:
            level = vars(level).get(part) if isinstance(level, PreTrainedConfig) else None
        old = vars(level).get(name) if isinstance(level, PreTrainedConfig) else None
        kinds = (list, tuple)
        fits = (is_integer(old) and is_integer(value)) or (
            isinstance(old, kinds) and isinstance(value, kinds)
        )
        if not fits or _NEVER_DENSE.fullmatch(name):
            yield f"sets {shown(path)} of the config to {shown(value)}, which it cannot have been"


def _layer_misfits(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    for path, kept in recipe.layers.items():
        layers = _submodule(model, path)
        if layers is None or not is_layer_list(layers):
            yield f"keeps layers of {shown(path)}, which is no module list"
        elif not kept or kept[-1] >= len(layers):
            yield f"keeps layers {shown(kept)} of {path}, which has {len(layers)}"


def _shape_misfits(model: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    shapes = tied_shapes(model, recipe)
    for name, other in _tied(model):
        if {name, other} <= shapes.keys() and shapes[name] != shapes[other]:
            yield f"gives {name} and {other}, which are one, different shapes"
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        module = _submodule(model, owner)
        old = None if module is None else module._parameters.get(attribute)
        if old is None:
            yield f"shapes a parameter {shown(name)} that it does not have"
        elif len(shape) != old.ndim or any(a < b for a, b in zip(old.shape, shape, strict=True)):
            yield f"gives {name} the shape {shape}, and the dense model has {tuple(old.shape)}"


def _buffer_misfits(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    for name, dims in recipe.buffers.items():
        owner, _, attribute = name.rpartition(".")
        module = _submodule(model, owner)
        # A tensor may also be a plain attribute.
        places = {} if module is None else vars(module) | module._buffers
        tensor = places.get(attribute)
        if not isinstance(tensor, torch.Tensor):
            yield f"slices a buffer {shown(name)} that it does not have"
            return
        for dim, kept in dims.items():
            if not 0 <= dim < tensor.ndim or not kept or kept[-1] >= tensor.shape[dim]:
                yield f"keeps positions of {name} that its shape {tuple(tensor.shape)} lacks"


def attribute_misfits(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    """Yield attributes that replace neither a number nor a list of layer numbers."""
    for name, values in recipe.attributes.items():
        module = _submodule(model, name)
        if module is None:
            yield f"sets attributes of {shown(name)}, which it lacks"
            return
        for path, value in values.items():
            if not _replaces(module, path, value):
                yield (
                    f"sets {shown(path)} of {shown(name)} to {shown(value)}, and there is no such "
                    "number to be replaced"
                )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def _tied(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield each two names of one parameter, both ways round."""
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        yield pair
        yield pair[::-1]


def tied_shapes(model: PreTrainedModel, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the shapes with those of tied parameters under each of their names."""
    shapes = dict(recipe.shapes)
    for name, other in _tied(model):
        if other in shapes:
            shapes.setdefault(name, shapes[other])
    return shapes


def _replaces(module: nn.Module, path: str, value: Any) -> bool:
    """Whether a value may take the place of what a module holds: numbers for numbers."""
    old = _own_value(module, path)
    if isinstance(old, list | tuple) and isinstance(value, tuple) and _numbers_layers(path, old):
        fewer = len(value) <= len(old) and all(map(is_integer, value))
        return fewer and min(value, default=0) >= 0
    olds, values = (one if isinstance(one, tuple) else (one,) for one in (old, value))
    return len(olds) == len(values) and all(
        abs(value) <= max(_MOST_NUMBER, abs(old))
        if is_integer(old) and is_integer(value)
        else isinstance(old, float) and not isinstance(value, bool)
        for old, value in zip(olds, values, strict=True)
    )


def _numbers_layers(path: str, value: Sequence[Any]) -> bool:
    """Whether a list may name layers by number, of which fewer may be left."""
    every = len(value) > 2 and [*value] == [*range(len(value))]
    return (every or NUMBERS_LAYERS.search(path) is not None) and all(map(is_integer, value))


def _own_value(module: nn.Module, path: str) -> Any:
    """Return a value of a module's own: ``name``, ``name.3`` or ``config.name``; None if none."""
    key, dot, inner = path.partition(".")
    value = vars(module).get(key)
    if not dot:
        return value
    if isinstance(value, (tuple, list)):
        index = int(inner) if re.fullmatch("0|[1-9][0-9]{0,3}", inner) else len(value)
        return value[index] if index < len(value) else None
    return vars(value).get(inner) if is_settings(key, value) else None
