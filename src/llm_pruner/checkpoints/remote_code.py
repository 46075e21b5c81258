"""Folders of pruned models whose layers differ: a recipe in config.json, and code beside it.

``modeling_pruned.py`` is that code, with the classes of the model appended; with it the folder
loads without this package. Where this package is installed, no code of the folder runs:
``llm_pruner.hook`` builds every model whose config holds a recipe from the class made here, which
checks the recipe (``apply_recipe``) and then does what the code does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llm_pruner.checkpoints import meta
from llm_pruner.checkpoints.apply_recipe import (
    config_misfits,
    cut_skeleton_,
    require_none,
    tied_shapes,
)
from llm_pruner.checkpoints.recipe import Recipe, from_json, to_json
from llm_pruner.errors import UserError
from llm_pruner.models import modeling_pruned
from llm_pruner.models.layers import configs_of, has_recipe
from llm_pruner.models.modeling_pruned import Pruned, within

KEY, CODE = "pruned", "modeling_pruned"

_PLACE = "from transformers import PreTrainedConfig, PreTrainedModel\n"
"""The line of the code below which the classes of the model are imported."""

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_READABLE = "allow_global_per_layer_attribute_access"
_RECORDING = "llm_pruner_heads"


class Checked(Pruned):
    """``Pruned`` for a recipe that anybody may have written; UserError if it does not fit."""

    config: Any

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        recipe = from_json(config.pruned)
        require_none(config, config_misfits(config, recipe))
        config.pruned = to_json(recipe)
        super().__init__(config, *inputs, **options)

    def _recipe(self) -> dict[str, Any]:
        parts = dict(vars(from_json(self.config.pruned)))
        del parts["dense_config"]
        return within(self, parts)

    def _cut(self) -> None:
        cut_skeleton_(self, Recipe(**self._recipe()), {})

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Save as any model, with the code beside the weights."""
        classes, folder = _classes(self), Path(save_directory)
        adapter = vars(self).get("_hf_peft_config_loaded")
        if classes and options.get("is_main_process", True) and not adapter:
            self.config.auto_map = _auto_map(self.config, classes)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{CODE}.py").write_text(_code(classes), encoding="utf-8")
            if is_own_code(self):
                custom_object_save(self, folder)
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Have a push to the hub upload the code, which is written before the weights."""
        found = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in found.items() if not name.endswith(".py")}


_MADE: dict[type[PreTrainedModel], Any] = {}


def pruned_class(model_class: type[PreTrainedModel]) -> Any:
    """Return the class whose objects are what a recipe makes of those of another class."""
    if stock_class(model_class) is not model_class:
        return model_class
    if model_class not in _MADE:
        # In the module of its base, since transformers looks into the source of a class.
        place = {"__module__": model_class.__module__, "_auto_class": None}
        name = f"Pruned{model_class.__name__}"
        _MADE[model_class] = type(name, (Checked, model_class), place)
    return _MADE[model_class]


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class that a class of pruned models stands before; another one as it is."""
    return next(
        one
        for one in model_class.__mro__
        if issubclass(one, PreTrainedModel)
        and not any(base.__name__ == Pruned.__name__ for base in one.__mro__)
    )


def is_own_code(model: object) -> bool:
    """Whether the code of a model comes with its checkpoint."""
    return type(model).__module__.startswith("transformers_modules.")


def is_of_transformers(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class is one of transformers', not of a checkpoint or of this package."""
    return model_class.__module__.startswith("transformers.")


def with_recipe(
    config: PreTrainedConfig, recipe: Recipe, model: PreTrainedModel
) -> PreTrainedConfig:
    """Return the config of a folder whose layers differ, with the recipe under ``pruned``.

    ``auto_map`` names the classes of the code beside it. Raises UserError if the model could not be
    built from it.
    """
    model_class = stock_class(type(model))
    config = copy.deepcopy(config)
    config.pruned = to_json(replace(recipe, shapes=tied_shapes(model, recipe)))
    whole, classes = _built(model_class, config), _classes(model)
    # With a config of transformers, a folder's own code would be taken for its model of that.
    hidden = is_own_code(model) and type(config).__module__.startswith("transformers.")
    lost = hidden or whole is None or not classes
    if lost or any(meta.differing(meta.sizes(whole), meta.sizes(model))):
        raise UserError(
            f"a {model_class.__name__} whose layers differ cannot be loaded again, so nothing was "
            "saved; prune with --uniform"
        )
    base = _built(stock_class(type(model.base_model)), config)
    if base is None or any(meta.differing(meta.sizes(base), meta.sizes(model.base_model))):
        classes.pop("AutoModel", None)
    config.auto_map = _auto_map(config, classes)
    if getattr(config, "is_heterogeneous", False):
        return config  # it says the heads of layers that the dense model has
    return _with_heads(config, per_layer_config(whole))


def _with_heads(config: PreTrainedConfig, heads: dict[int, dict[str, int]]) -> PreTrainedConfig:
    """Return the config with heads per layer, if transformers accepts that of its kind."""
    said = copy.deepcopy(config)
    try:
        with meta.quiet_trial():
            setattr(said, _READABLE, True)
            said.per_layer_config = heads
            type(said).from_dict(said.to_dict())
    except Exception:  # configs check themselves in any way
        return config
    return said if heads else config


def without_recipe_(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Remove from a config what ``with_recipe`` added; return the recipe, None if it has none."""
    if is_of_transformers(stock_class(type(model))):
        vars(config).pop("auto_map", None)  # of code that is not written here
    if not has_recipe(config):
        return None
    if is_own_code(model):
        found = {auto: (one.__module__, one.__name__) for auto, one in _classes(model).items()}
        where = {auto: f"{home.rpartition('.')[2]}.{name}" for auto, (home, name) in found.items()}
        config.auto_map = {**config.auto_map, **where}
    recipe: dict[str, Any] = config.pruned
    added = ("per_layer_config", "_heterogeneity_spec") if _READABLE in vars(config) else ()
    for key in (KEY, _READABLE, *added):
        vars(config).pop(key, None)
    return recipe


def _built(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Return what the code builds, on the meta device; None if it cannot."""
    try:
        model: Any = meta.build_meta(pruned_class(model_class), config)
        model._finish()
    except Exception:  # models check themselves in any way
        return None
    return model


def _classes(model: PreTrainedModel) -> dict[str, type[PreTrainedModel]]:
    """Return Auto class -> class of the dense model that it loads."""
    whole, base = stock_class(type(model)), stock_class(type(model.base_model))
    if is_own_code(model):
        named = getattr(model.config, "auto_map", None) or {}
        return {
            auto: one
            for auto, where in named.items()
            for one in {whole: 0, base: 0}
            if auto.startswith("AutoModel")
            and where.rpartition(".")[2] in (one.__name__, f"Pruned{one.__name__}")
        }
    if not is_of_transformers(whole):
        return {}
    found = {"AutoModel": base}
    # Some are registered with the config of a larger model only, of which they are the text part.
    if whole.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found = {"AutoModelForCausalLM": whole} | (found if base is not whole else {})
    if whole.__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        found["AutoModelForImageTextToText"] = whole
    named = getattr(model.config, "auto_map", {}) if has_recipe(model.config) else found
    return {auto: one for auto, one in found.items() if auto in named}


def _auto_map(
    config: PreTrainedConfig, classes: Mapping[str, type[PreTrainedModel]]
) -> dict[str, Any]:
    named = getattr(config, "auto_map", None) or {}
    others = {auto: where for auto, where in named.items() if not auto.startswith("AutoModel")}
    return others | {auto: f"{CODE}.Pruned{one.__name__}" for auto, one in classes.items()}


def _code(classes: Mapping[str, type[PreTrainedModel]]) -> str:
    """Return the text of the file."""
    imports = text = ""
    first: dict[type[PreTrainedModel], str] = {}
    for auto, one in classes.items():
        first.setdefault(one, auto)
    for one, auto in first.items():
        name, home = one.__name__, one.__module__
        if getattr(transformers, name, None) is one:
            home = "transformers"
        elif not is_of_transformers(one):
            home = f".{home.rpartition('.')[2]}"
        imports += f"from {home} import {name}\n"
        text += f"\n\nclass Pruned{name}(Pruned, {name}):\n"
        text += f'    _auto_class = "{auto}"  # saving takes this file along\n'
    shared = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    return shared.replace(_PLACE, _PLACE + imports) + text


def per_layer_config(model: PreTrainedModel) -> dict[int, dict[str, int]]:
    """Return layer -> heads, key-value heads and width of a head, where they are not the config's.

    Servers plan a cache by it without building the model. Empty if nothing differs, or the model
    attends in a way of its own. ``model`` is on meta, and of no use afterwards.
    """
    found: dict[int, dict[str, int]] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        sizes = (query.shape[1], key.shape[1], query.shape[-1])
        found[module.layer_idx] = dict(zip(_HEADS, sizes, strict=True))
        batch, heads, length, _width = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]), None

    for config in configs_of(model):
        config._attn_implementation_internal = _RECORDING
        config._experts_implementation_internal = "batched_mm"  # runs on the meta device
    AttentionInterface.register(_RECORDING, attend)
    try:
        with meta.quiet_trial(), torch.no_grad(), torch.device("meta"):
            model(torch.zeros(1, 2, dtype=torch.long))
    except Exception:  # models do what they like
        return {}
    finally:
        AttentionInterface._global_mapping.pop(_RECORDING)
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    dense = dict(zip(_HEADS, (heads, shared, width), strict=True))
    differing = {layer: sizes for layer, sizes in found.items() if sizes != dense}
    if heads is None or config.get_text_config() is not config:
        return {}
    stated = all(getattr(config, key, None) is not None for key in _HEADS)
    # What a config does not say for all layers it has to say for each.
    return differing if stated or not differing else found
