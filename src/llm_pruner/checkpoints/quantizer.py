"""The hook by which ``from_pretrained`` loads models whose layers differ in size.

transformers lets a *quantizer* change a model between building it on the meta device and loading
its weights. Nothing is quantized here: the hook drops layers and reshapes parameters, the weights
load as they are, and what results is an ordinary model. ``llm_pruner.hook`` says so to
transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_pruner.checkpoints.fits import (
    lacks_bias,
    require_config_fits,
    require_fits,
    require_layers_fit,
    tied_shapes,
)
from llm_pruner.checkpoints.meta import get_path, set_path
from llm_pruner.checkpoints.reshape import Recipe, from_json, shown, to_json
from llm_pruner.errors import UserError
from llm_pruner.models.layers import configs_of, keep_children, set_attributes_

QUANT_METHOD = "llm_pruner"


class PrunedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a pruned checkpoint; holds a recipe.

    Raises:
        UserError: the recipe is of another format version or cannot be read.
    """

    def __init__(self, **data: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.recipe = from_json(data)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PrunedConfig:
        """Wrap a recipe."""
        return cls(**to_json(recipe))

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": QUANT_METHOD, **to_json(self.recipe)}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class PrunedQuantizer(HfQuantizer):
    """Builds the dense skeleton, cuts it to the recipe's sizes, and leaves an ordinary model."""

    requires_calibration = False
    quantization_config: PrunedConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config that builds the dense skeleton; the last hook before it is built.

        Layers may depend on their index (``layer_types``, dense layers before sparse ones), so
        the model is built with all of them and loses the removed ones afterwards.
        """
        recipe = self.quantization_config.recipe
        require_config_fits(config, recipe)
        # What only the outermost module reads differently is set on its own copy at the end.
        own = {path.partition(".")[2] for path in recipe.attributes.get("", ())}
        self._kept_config = {
            path: get_path(config, path) for path in recipe.dense_config if path not in own
        }
        config = copy.deepcopy(config)
        for path, value in recipe.dense_config.items():
            try:
                set_path(config, path, value)
            except Exception as error:  # configs check themselves in any way
                raise UserError(
                    f"{type(config).__name__} refuses the {shown(path)} of the pruning recipe in "
                    f"config.json ({' '.join(str(error).split())[:200]}); use the config.json that "
                    "belongs to these weights"
                ) from error
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        cut_skeleton_(model, self.quantization_config.recipe, self._kept_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        finish_(model, self.quantization_config.recipe)
        # From here on this is a model like any other: it can be cast, trained in full and saved.
        # The recipe stays in its config, which a later ``save_pretrained`` writes.
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Some models ask whether it is there, not what it says.
                vars(module.config).pop("_is_quantized", None)
        for mark in ("hf_quantizer", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Saving again is fine."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training is fine, with and without adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Training every weight is fine."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Compiling is fine."""
        return True


def cut_skeleton_(model: PreTrainedModel, recipe: Recipe, kept_config: Mapping[str, Any]) -> None:
    """Cut a dense model without weights to the sizes of the recipe, so that its weights can load.

    Args:
        kept_config: dotted path -> value of the config values that the recipe made dense.

    Raises:
        UserError: the recipe does not fit the model.
    """
    require_layers_fit(model, recipe)
    for path, kept in recipe.layers.items():
        keep_children(model, path, kept)
    # Names are those of a model without the removed layers, which nobody has seen yet.
    require_fits(model, recipe)
    _set_config_(model, kept_config)
    _reshape_parameters_(model, recipe)
    _cut_buffers_(model, recipe, saved=True)


def finish_(model: nn.Module, recipe: Recipe) -> None:
    """Cut and set what depends on no weights, once these are loaded."""
    # Buffers that no checkpoint holds have just been computed from the config, in dense size.
    _cut_buffers_(model, recipe, saved=False)
    set_attributes_(model, recipe)


def _set_config_(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Set config values in every config object of the model; submodels may hold copies."""
    dense = {path: get_path(model.config, path) for path in values}
    for path, value in values.items():
        set_path(model.config, path, value)
        name = path.rpartition(".")[2]
        for config in configs_of(model):
            # A copy is one that still says what the dense config said.
            copied = isinstance(config, PreTrainedConfig) and config is not model.config
            if copied and getattr(config, name, None) == dense[path]:
                setattr(config, name, value)


def _reshape_parameters_(model: PreTrainedModel, recipe: Recipe) -> None:
    """Give meta parameters the shapes of the recipe, tied ones under each of their names.

    A bias of a linear module that has none is added. The recipe fits, as ``require_fits`` says.
    """
    for name, shape in tied_shapes(model, recipe).items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        added = lacks_bias(module, attribute)
        old = module.get_parameter("weight" if added else attribute)
        new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        if not added:
            new.__dict__.update(vars(old))  # marks that loaders leave on parameters
        setattr(module, attribute, new)


def _cut_buffers_(model: PreTrainedModel, recipe: Recipe, *, saved: bool) -> None:
    """Keep the recipe's positions of buffers and tensor attributes.

    Args:
        saved: those that the checkpoint fills, before they are filled; else all others, computed.
    """
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    persistent = {name for name, _ in model.named_buffers()} - computed
    for name in recipe.buffers.keys() & persistent if saved else recipe.buffers.keys() - persistent:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, attribute)
        for dim, kept in recipe.buffers[name].items():
            tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
        setattr(module, attribute, tensor)
