"""What stands in a config, and the models without weights that it gives."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from llm_pruner.models.layers import is_layer_list
from llm_pruner.models.modeling_pruned import put
from llm_pruner.runtime.progress import quiet


def entries(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of a config and, if it nests one, of its text model's config."""
    for prefix, level in levels(config):
        for name, value in level.to_dict().items():
            if not name.startswith("_") and has(level, name):
                yield prefix + name, value


def has(config: PreTrainedConfig, name: str) -> bool | None:
    """Whether a config has a value of a name; None if one for each layer, which cannot be read."""
    try:
        return hasattr(config, name)
    except RuntimeError:
        return None


def levels(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the config and, if it nests one, the config of its text model, with path prefixes."""
    yield "", config
    text = config.get_text_config(decoder=True)
    for name in vars(config):
        if text is not config and getattr(config, name, None) is text:
            yield f"{name}.", text


def with_values(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of the config with the values at these dotted paths; nothing is validated."""
    changed = copy.deepcopy(config)
    for path, value in values.items():
        put(changed, path, value)
    return changed


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a config value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


Sizes = dict[tuple[str, str, Any], Any]


class Trials:
    """The models that a config gives with other values; each is built once."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self._found: dict[str, Sizes | None] = {}

    def sizes(self, values: Mapping[str, Any]) -> Sizes | None:
        """Return the sizes of the model, or None if none can be built."""
        key = repr(sorted(values.items()))
        if key not in self._found:
            try:
                changed = with_values(self.config, values)
                self._found[key] = sizes(build_meta(self.model_class, changed))
            except Exception:  # a model may refuse values in any way; then they show nothing
                self._found[key] = None
        return self._found[key]


def build_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: shapes and attributes, no memory for weights."""
    with ExitStack() as stack:
        stack.enter_context(quiet_trial())
        stack.enter_context(initialization.no_init_weights())
        stack.enter_context(initialization.meta_device_safe_creation_ops())
        stack.enter_context(torch.device("meta"))
        return model_class._from_config(copy.deepcopy(config))


def quiet_trial() -> AbstractContextManager[None]:
    """Keep what transformers logs and warns about trial configs from the user."""
    return quiet("transformers", level=logging.CRITICAL)


def sizes(model: nn.Module) -> Sizes:
    """Return everything countable about a model; tied parameters under each of their names.

    Keys are ``("parameter", name, dim)``, ``("buffer", name, dim)``, ``("list", name, "len")`` of
    module lists, and ``("attribute", module, name)`` of numbers and tuples that modules hold.
    """
    found: Sizes = {}
    for what, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            for dim, size in enumerate(tensor.shape):
                found[what, name, dim] = size
    for name, module in model.named_modules():
        if is_layer_list(module):
            found["list", name, "len"] = len(module)
        for attribute, value in vars(module).items():
            if _is_number(value) or (
                isinstance(value, tuple) and value and all(map(_is_number, value))
            ):
                found["attribute", name, attribute] = value
    return found


def differing(found: Sizes, wanted: Sizes) -> Iterator[tuple[str, str, Any]]:
    """Yield what has another size; a number that modules of one model alone hold is none."""
    for key in found.keys() | wanted.keys():
        either = key in found and key in wanted
        if found.get(key) != wanted.get(key) and (either or key[0] != "attribute"):
            yield key


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def computed_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the buffers that no checkpoint holds, as loading computes them; changes ``model``.

    ``model`` is on the meta device. The modules fill these buffers from their config in
    ``_init_weights``, which is what ``from_pretrained`` relies on as well.
    """
    for name, buffer in [*model.named_non_persistent_buffers()]:
        owner, _, attribute = name.rpartition(".")
        empty = torch.zeros_like(buffer, device="cpu")
        model.get_submodule(owner).register_buffer(attribute, empty, persistent=False)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with quiet_trial():
        model.initialize_weights()
    return dict(model.named_non_persistent_buffers())


def get_path(holder: Any, path: str) -> Any:
    """Return the value at a dotted path, numbers being indices; may raise what that does."""
    for part in path.split("."):
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    return holder
