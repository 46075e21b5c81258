"""The hook by which ``from_pretrained`` loads models whose layers differ in size.

transformers lets a *quantizer* change a model between building it on the meta device and loading
its weights. Nothing is quantized here: the hook drops layers and reshapes parameters.
``llm_pruner.hook`` says so to transformers.

A checkpoint is data: its recipe may cut what the model has, and set numbers where it holds numbers.
What it names is looked up among registered submodules, parameters and buffers, and in the
``__dict__`` of a module or of its settings, and all of it before anything of the model is changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_pruner.checkpoints.meta import get_path, is_integer
from llm_pruner.checkpoints.reshape import MOST_LAYERS, Recipe, from_json, shown, to_json
from llm_pruner.errors import UserError
from llm_pruner.models.layers import (
    NUMBERS_LAYERS,
    Renaming,
    is_layer_list,
    is_settings,
    keep_children,
    set_attributes_,
)
from llm_pruner.models.modeling_pruned import (
    cut_buffers_,
    put,
    reshape_parameters_,
    set_config_,
)
from llm_pruner.models.older_code import computed_buffers, fill_buffers_

QUANT_METHOD = "llm_pruner"

_NEVER_DENSE = re.compile(r"_.*|auto_map|architectures|.*dtype|.*quantization.*|trust_remote_code")
"""Keys of a config that say what is loaded, not how large it is."""

_MOST_GROWTH = 64
"""A model was this many times as large before pruning at most, or of few thousands."""

_MOST_NUMBER = 2**24


class PrunedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a pruned checkpoint; UserError if its recipe cannot be read."""

    def __init__(self, **data: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.recipe = from_json(data)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": QUANT_METHOD, **to_json(self.recipe)}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class PrunedQuantizer(HfQuantizer):
    """Builds the dense skeleton, cuts it to the recipe's sizes, and leaves an ordinary model."""

    requires_calibration = False
    is_trainable = True  # never asked of a model that is loaded: nothing of this is left on it
    quantization_config: PrunedConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config that builds the dense skeleton; the last hook before it is built.

        Layers may depend on their index (``layer_types``, dense layers before sparse ones), so
        the model is built with all of them and loses the removed ones afterwards.
        """
        recipe = self.quantization_config.recipe
        require_none(config, config_misfits(config, recipe))
        # What only the outermost module reads differently is set on its own copy at the end.
        own = {path.partition(".")[2] for path in recipe.attributes.get("", ())}
        self._kept_config = {
            path: get_path(config, path) for path in recipe.dense_config if path not in own
        }
        self._dense_config = dense_copy(config, recipe)
        return copy.deepcopy(self._dense_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        rename = Renaming(self.quantization_config.recipe.layers)
        found = computed_buffers(model, self._dense_config)
        self._buffers = {
            (new, name): value
            for (path, name), value in found.items()
            if (new := rename(path)) is not None
        }
        cut_skeleton_(model, self.quantization_config.recipe, self._kept_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        fill_buffers_(model, self._buffers)
        finish_(model, self.quantization_config.recipe)
        # From here on this is a model like any other: it can be cast, trained in full and saved.
        # The recipe stays in its config, which a later ``save_pretrained`` writes.
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Some models ask whether it is there, not what it says.
                vars(module.config).pop("_is_quantized", None)
        for mark in ("hf_quantizer", "quantization_method"):
            vars(model).pop(mark, None)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Saving again is fine."""
        return True


def dense_copy(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
    """Return the config that builds the dense model; UserError if it refuses a value."""
    config = copy.deepcopy(config)
    for path, value in recipe.dense_config.items():
        try:
            put(config, path, value)
        except Exception as error:  # configs check themselves in any way
            raise UserError(
                f"{type(config).__name__} refuses the {shown(path)} of the pruning recipe in "
                f"config.json ({' '.join(str(error).split())[:200]}); use the config.json that "
                "belongs to these weights"
            ) from error
    return config


def cut_skeleton_(model: PreTrainedModel, recipe: Recipe, kept_config: Mapping[str, Any]) -> None:
    """Cut a dense model without weights to the sizes of the recipe, so that its weights can load.

    ``kept_config`` has the config values that the recipe made dense, by dotted path. Raises
    UserError if the recipe does not fit the model.
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


# ----------------------------------------------------------------------- whether a recipe fits


def require_none(owner: nn.Module | PreTrainedConfig, misfits: Iterator[str]) -> None:
    """Raise UserError for the first thing that a recipe asks of a model or config and cannot be."""
    for what in misfits:
        raise UserError(
            f"the pruning recipe in config.json {what}, so it does not fit {type(owner).__name__} "
            "as this transformers builds it; use the config.json that belongs to these weights"
        )


def config_misfits(config: PreTrainedConfig, recipe: Recipe) -> Iterator[str]:
    """Yield dense values that replace none of their kind in the config.

    That is a whole number, which may not be larger without bounds, since the dense model is built
    with it, or a list.
    """
    for path, value in recipe.dense_config.items():
        *inner, name = path.split(".")
        level: Any = config
        for part in inner:
            level = vars(level).get(part) if isinstance(level, PreTrainedConfig) else None
        old = vars(level).get(name) if isinstance(level, PreTrainedConfig) else None
        if is_integer(old) and is_integer(value):
            fits = 0 <= value <= max(MOST_LAYERS, _MOST_GROWTH * old)
        else:
            fits = isinstance(old, (list, tuple)) and isinstance(value, (list, tuple))
        if not fits or _NEVER_DENSE.fullmatch(name):
            yield (
                f"sets {shown(path)} of the config to {shown(value)}, which can be no earlier "
                "value of what is there"
            )


def _layer_misfits(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    seen: set[int] = set()
    for path, kept in recipe.layers.items():
        layers = _submodule(model, path)
        if layers is None or not is_layer_list(layers):
            yield f"keeps layers of {shown(path)}, which is no module list"
            return
        if not kept or kept[-1] >= len(layers):
            yield f"keeps layers {shown(kept)} of {path}, which has {len(layers)}"
        inside = {id(module) for module in layers.modules()}
        if seen & inside:
            yield f"keeps layers of {shown(path)} twice"
        seen |= inside


def _shape_misfits(model: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    shapes = tied_shapes(model, recipe)
    for name, other in _tied(model):
        if {name, other} <= shapes.keys() and shapes[name] != shapes[other]:
            yield f"gives {name} and {other}, which are one, different shapes"
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        module = _submodule(model, owner)
        old = None if module is None else module._parameters.get(attribute)
        if isinstance(module, nn.Linear) and attribute == "bias" and old is None:
            # It is to have one, as earlier versions saved.
            rows = shapes.get(f"{owner}.weight", tuple(module.get_parameter("weight").shape))[0]
            if shape != (rows,):
                yield f"gives {name} the shape {shape}, and there are {rows} rows"
        elif old is None:
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
            if dim >= tensor.ndim or not kept or kept[-1] >= tensor.shape[dim]:
                yield f"keeps positions of {name} that its shape {tuple(tensor.shape)} lacks"


def attribute_misfits(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    """Yield attributes that are no number which replaces one, nor numbers of layers."""
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
    """Return a submodule by its registered name; None if there is none."""
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
        return fewer and all(0 <= one < MOST_LAYERS for one in value)
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
