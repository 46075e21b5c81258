"""Folders that load without this package: modelling code of their own, and a recipe beside it.

``modeling_pruned.py`` is that code; a folder adds the classes of its model, and what these build
upon where that is no model of transformers. Otherwise, where this package is installed, no code of
a folder runs: ``llm_pruner.hook`` has each model whose config holds a recipe
built by the class that is made here, which looks at the recipe as ``quantizer`` says before it does
what the code does.
"""

from __future__ import annotations

import copy
import shutil
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
from llm_pruner.checkpoints.quantizer import (
    config_misfits,
    cut_skeleton_,
    dense_copy,
    require_none,
    tied_shapes,
)
from llm_pruner.checkpoints.reshape import Recipe, from_json, to_json
from llm_pruner.hook import has_recipe
from llm_pruner.models import modeling_pruned, older_code
from llm_pruner.models.layers import configs_of
from llm_pruner.models.modeling_pruned import Pruned, within
from llm_pruner.models.older_code import is_own_code

KEY, CODE = "pruned", "modeling_pruned"

_PLACE = "from transformers import PreTrainedConfig, PreTrainedModel\n"
"""The line of the code below which the classes of the model are imported."""

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_READABLE = "allow_global_per_layer_attribute_access"
_RECORDING = "llm_pruner_heads"


class Checked(Pruned):
    """The same for a recipe that anybody may have written; UserError if it does not do."""

    config: Any

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        recipe = from_json(config.pruned)
        require_none(config, config_misfits(config, recipe))
        dense_copy(config, recipe)  # says what the config refuses
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
        if options.get("is_main_process", True) and not vars(self).get("_hf_peft_config_loaded"):
            classes, folder = _classes(self), Path(save_directory)
            self.config.auto_map = _auto_map(self.config, classes)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{CODE}.py").write_text(_code(classes), encoding="utf-8")
            if is_own_code(self):
                custom_object_save(self, folder)
                shutil.copy(older_code.__file__, folder)
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Have a push to the hub take the code for new: it lies there before the weights do."""
        found = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in found.items() if not name.endswith(".py")}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies be made, also in other processes, where the class is made anew."""
        return _new, (stock_class(type(self)),), *super().__reduce_ex__(protocol)[2:]


def _new(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    made = pruned_class(model_class)
    return made.__new__(made)


_MADE: dict[type[PreTrainedModel], Any] = {}


def pruned_class(model_class: type[PreTrainedModel]) -> Any:
    """Return the class whose objects are what a recipe makes of those of another class."""
    if stock_class(model_class) is not model_class:
        return model_class
    if model_class not in _MADE:
        # In the module of its base, since transformers looks into the source of a class.
        place = {"__module__": model_class.__module__, "_auto_class": None}
        first = () if is_of_transformers(model_class) else (older_code.Completed,)
        name = f"Pruned{model_class.__name__}"
        _MADE[model_class] = type(name, (*first, Checked, model_class), place)
    return _MADE[model_class]


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class that a class of pruned models stands before; another one as it is."""
    return next(
        one
        for one in model_class.__mro__
        if issubclass(one, PreTrainedModel)
        and not any(base.__name__ == Pruned.__name__ for base in one.__mro__)
    )


def is_of_transformers(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class is one of transformers', not of a checkpoint or of this package."""
    return model_class.__module__.startswith("transformers.")


# ------------------------------------------------------------------------------- what is written


def with_code(
    config: PreTrainedConfig, recipe: Recipe, model: PreTrainedModel
) -> PreTrainedConfig | None:
    """Return the config of a folder with this code, or None if none would give the model.

    The code changes models of transformers, and of code that comes with a checkpoint; what this
    package adds has its code here alone.

    Args:
        config: says of the layers what the config of such a model can say.
        recipe: what turns the dense model into this one.
        model: as surgery left it.
    """
    model_class = stock_class(type(model))
    # With a config of transformers, a folder's own code would be taken for its model of that.
    own = is_own_code(model) and not type(config).__module__.startswith("transformers.")
    if not (is_of_transformers(model_class) or own):
        return None
    config = copy.deepcopy(config)
    config.pruned = to_json(replace(recipe, shapes=tied_shapes(model, recipe)))
    classes = _classes(model)
    whole = _built(model_class, config)
    if whole is None or any(meta.differing(meta.sizes(whole), meta.sizes(model))):
        return None
    base = _built(stock_class(type(model.base_model)), config)
    if base is None or any(meta.differing(meta.sizes(base), meta.sizes(model.base_model))):
        classes.pop("AutoModel", None)
    if not classes:
        return None
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


def without_code_(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Remove from a config what ``with_code`` added; return the recipe, None if it has none."""
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
    """Return what loads in transformers -> class of the dense model that it gives."""
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
    found = {"AutoModel": base}
    # Some are registered with the config of a larger model only, of which they are the text part.
    if whole.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found = {"AutoModelForCausalLM": whole} | (found if base is not whole else {})
    if whole.__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        found["AutoModelForImageTextToText"] = whole
    named = model.config.auto_map if has_recipe(model.config) else found
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
        name, home, before = one.__name__, one.__module__, ""
        if getattr(transformers, name, None) is one:
            home = "transformers"
        elif not is_of_transformers(one):
            home, before = f".{home.rpartition('.')[2]}", "Completed, "
            imports += "" if "Completed" in imports else "from .older_code import Completed\n"
        imports += f"from {home} import {name}\n"
        text += f"\n\nclass Pruned{name}({before}Pruned, {name}):\n"
        text += f'    _auto_class = "{auto}"  # saving takes this file along\n'
    shared = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    return shared.replace(_PLACE, _PLACE + imports) + text


# ------------------------------------------------------------------------------- heads per layer


def per_layer_config(model: PreTrainedModel) -> dict[int, dict[str, int]]:
    """Return layer -> heads, key-value heads and width of a head, where they are not the config's.

    That is how transformers has a config say it, for what plans a cache without building a model.
    Empty if nothing differs, or the model attends in a way of its own. ``model`` is on meta, and of
    no use afterwards.
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
