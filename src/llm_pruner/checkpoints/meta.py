"""Models without weights: what sizes, numbers and buffers a config gives."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

Sizes = dict[tuple[str, str, Any], Any]
"""(what, name, detail) -> value; see ``sizes``."""


def build_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: shapes and attributes, no memory for weights."""
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(initialization.no_init_weights())
        stack.enter_context(initialization.meta_device_safe_creation_ops())
        stack.enter_context(torch.device("meta"))
        return model_class._from_config(copy.deepcopy(config))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers logs and warns about trial configs from the user."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def sizes(model: nn.Module) -> Sizes:
    """Return everything countable about a model.

    Keys are ``("parameter", name, dim)`` and ``("buffer", name, dim)`` with the size as the value,
    ``("list", name, "len")`` for module lists, and ``("attribute", module, name)`` for numbers and
    tuples of numbers that modules hold. Tied parameters appear under each of their names.
    """
    found: Sizes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for dim, size in enumerate(parameter.shape):
            found["parameter", name, dim] = size
    for name, buffer in model.named_buffers(remove_duplicate=False):
        for dim, size in enumerate(buffer.shape):
            found["buffer", name, dim] = size
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            found["list", name, "len"] = len(module)
        for attribute, value in vars(module).items():
            if _is_number(value) or (
                isinstance(value, tuple) and value and all(map(_is_number, value))
            ):
                found["attribute", name, attribute] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def computed_buffers(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """Return the buffers that no checkpoint holds, as loading computes them; changes ``model``.

    ``model`` is on the meta device. The modules fill these buffers from their config in
    ``_init_weights``, which is what ``from_pretrained`` relies on as well.
    """
    buffers = dict(model.named_non_persistent_buffers())
    if not buffers:
        return {}
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        empty = torch.zeros_like(buffer, device="cpu")
        model.get_submodule(owner).register_buffer(attribute, empty, persistent=False)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with quiet():
        model.initialize_weights()
    return dict(model.named_non_persistent_buffers())


def get_path(holder: Any, path: str) -> Any:
    """Return the value at a dotted path; a number in it is an index into a tuple or list.

    Raises:
        AttributeError, IndexError: there is no such value.
    """
    for part in path.split("."):
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    return holder


def set_path(config: Any, path: str, value: Any) -> None:
    """Set the config value at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(get_path(config, owner) if owner else config, name, value)


def set_own_value(module: nn.Module, path: str, value: Any) -> None:
    """Set ``name``, ``name.3`` or ``config.name`` of a module, on an own copy of what holds it.

    Modules share configs, so ``config.num_heads`` of one module must not reach the others. What is
    set lies in the ``__dict__`` of both: no setter of a class runs.
    """
    key, _, inner = path.partition(".")
    if inner:
        own = copy.copy(vars(module)[key])
        if isinstance(own, (tuple, list)):
            index = int(inner)
            own = type(own)([*own[:index], value, *own[index + 1 :]])
        else:
            vars(own)[inner] = value
        value = own
    vars(module)[key] = value
