"""Whether a recipe fits a model: said before anything of the model is changed.

A recipe comes with a checkpoint, and a checkpoint is data: it may cut what the model has, and set
numbers where the model holds numbers. What it names is looked up among registered submodules,
parameters and buffers, and in the ``__dict__`` of a module or of its settings; attributes of
classes and functions are out of its reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.checkpoints.meta import is_integer
from llm_pruner.checkpoints.reshape import MOST_LAYERS, Recipe, shown
from llm_pruner.errors import UserError

_NEVER_DENSE = re.compile(r"_.*|auto_map|architectures|.*dtype|.*quantization.*|trust_remote_code")
"""Keys of a config that say what is loaded, not how large it is."""

_MOST_GROWTH = 64
"""A model was this many times as large before pruning at most, or of few thousands."""

_MOST_NUMBER = 2**24


def require_config_fits(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raise UserError unless every dense value replaces one of its kind in the config.

    That is a whole number, which may not be larger without bounds, since the dense model is built
    with it, or a list.
    """
    for path, value in recipe.dense_config.items():
        *inner, name = path.split(".")
        level: Any = config
        for part in inner:
            level = vars(level).get(part) if isinstance(level, PreTrainedConfig) else None
        old = vars(level).get(name) if isinstance(level, PreTrainedConfig) else None
        if _NEVER_DENSE.fullmatch(name):
            fits = False
        elif is_integer(old) and is_integer(value):
            fits = 0 <= value <= max(MOST_LAYERS, _MOST_GROWTH * old)
        else:
            fits = isinstance(old, (list, tuple)) and isinstance(value, (list, tuple))
        if not fits:
            raise _mismatch(
                config,
                f"sets {shown(path)} of the config to {shown(value)}, which can be no earlier "
                "value of what is there",
            )


def require_layers_fit(model: nn.Module, recipe: Recipe) -> None:
    """Raise UserError unless the model has the module lists, each once, and the layers kept."""
    seen: set[int] = set()
    for path, kept in recipe.layers.items():
        layers = submodule(model, path)
        if not isinstance(layers, nn.ModuleList):
            raise _mismatch(model, f"keeps layers of {shown(path)}, which is no module list")
        if not kept or kept[-1] >= len(layers):
            raise _mismatch(model, f"keeps layers {shown(kept)} of {path}, which has {len(layers)}")
        if seen & {id(module) for module in layers.modules()}:
            raise _mismatch(model, f"keeps layers of {shown(path)} twice")
        seen |= {id(module) for module in layers.modules()}


def require_fits(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise UserError unless all but ``layers`` fits a model that has only these layers."""
    shapes = tied_shapes(model, recipe)
    for name, shape in shapes.items():
        _require_shape(model, name, shape, shapes)
    for name, dims in recipe.buffers.items():
        tensor = own_tensor(model, name)
        if tensor is None:
            raise _mismatch(model, f"slices a buffer {shown(name)} that it does not have")
        for dim, kept in dims.items():
            if dim >= tensor.ndim or not kept or kept[-1] >= tensor.shape[dim]:
                raise _mismatch(
                    model,
                    f"keeps positions of {name} that its shape {tuple(tensor.shape)} lacks",
                )
    require_attributes_fit(model, recipe)


def require_attributes_fit(model: nn.Module, recipe: Recipe) -> None:
    """Raise UserError unless every attribute is a number that replaces one."""
    for name, values in recipe.attributes.items():
        module = submodule(model, name)
        if module is None:
            raise _mismatch(model, f"sets attributes of {shown(name)}, which it lacks")
        for path, value in values.items():
            if not _replaces(module, path, value):
                raise _mismatch(
                    model,
                    f"sets {shown(path)} of {shown(name)} to {shown(value)}, and there is no such "
                    "number to be replaced",
                )


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Return a submodule by its registered name; None if there is none."""
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def own_tensor(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return a buffer, or a tensor that a module holds as a plain attribute; None if none."""
    owner, _, attribute = name.rpartition(".")
    module = submodule(model, owner)
    if module is None:
        return None
    tensor = module._buffers.get(attribute, vars(module).get(attribute))
    return tensor if isinstance(tensor, torch.Tensor) else None


def own_value(module: nn.Module, path: str) -> Any:
    """Return a value of a module's own: ``name``, ``name.3`` or ``config.name``; None if none."""
    key, dot, inner = path.partition(".")
    value = vars(module).get(key)
    if not dot:
        return value
    if isinstance(value, (tuple, list)):
        index = int(inner) if re.fullmatch("0|[1-9][0-9]{0,3}", inner) else len(value)
        return value[index] if index < len(value) else None
    return vars(value).get(inner) if _is_settings(key, value) else None


def lacks_bias(module: nn.Module, attribute: str) -> bool:
    """Whether a linear module has no bias yet and is to have one, as earlier versions saved."""
    return isinstance(module, nn.Linear) and attribute == "bias" and module.bias is None


def tied_shapes(model: PreTrainedModel, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the shapes with those of tied parameters under each of their names.

    Raises:
        UserError: a recipe gives the names of one parameter different shapes.
    """
    shapes = dict(recipe.shapes)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for name, other in ((target, source), (source, target)):
            if other in shapes and shapes.setdefault(name, shapes[other]) != shapes[other]:
                raise _mismatch(model, f"gives {name} and {other}, which are one, different shapes")
    return shapes


def _require_shape(
    model: nn.Module, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    owner, _, attribute = name.rpartition(".")
    module = submodule(model, owner)
    old = None if module is None else module._parameters.get(attribute)
    if module is not None and old is None and lacks_bias(module, attribute):
        rows = shapes.get(f"{owner}.weight", tuple(module.get_parameter("weight").shape))[0]
        if shape != (rows,):
            raise _mismatch(model, f"gives {name} the shape {shape}, and there are {rows} rows")
    elif old is None:
        raise _mismatch(model, f"shapes a parameter {shown(name)} that it does not have")
    elif len(shape) != old.ndim or any(a < b for a, b in zip(old.shape, shape, strict=True)):
        raise _mismatch(
            model,
            f"gives {name} the shape {shape}, and the dense model has {tuple(old.shape)}",
        )


def _replaces(module: nn.Module, path: str, value: Any) -> bool:
    """Whether a value may take the place of what a module holds: numbers for numbers."""
    old = own_value(module, path)
    olds, values = (one if isinstance(one, tuple) else (one,) for one in (old, value))
    return len(olds) == len(values) and all(
        abs(value) <= max(_MOST_NUMBER, abs(old))
        if is_integer(old) and is_integer(value)
        else isinstance(old, float) and not isinstance(value, bool)
        for old, value in zip(olds, values, strict=True)
    )


def _is_settings(key: str, value: Any) -> bool:
    """Whether a module attribute is a bag of settings: what surgery sets numbers of."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, torch.Tensor, type, ModuleType))
        and not callable(value)
        and key.lower().strip("_").endswith(("config", "cfg", "args", "hparams"))
        and key != "generation_config"
    )


def _mismatch(owner: nn.Module | PreTrainedConfig, what: str) -> UserError:
    return UserError(
        f"the pruning recipe in config.json {what}, so it does not fit {type(owner).__name__} "
        "as this transformers builds it; use the config.json that belongs to these weights"
    )
