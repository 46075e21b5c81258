"""Models whose own code was written for an earlier transformers, and what version 5 leaves undone.

It makes a model without memory, and fills the buffers that no file holds afterwards, by the method
that initialises weights. Earlier code computes them as it makes the model, and has nothing in that
method: its table of rotary angles, say, is then whatever the memory held.

Pruned folders with such code take this file along, so it imports nothing of this package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

Place = tuple[str, str]
"""Path of a module, and name of a tensor of its own."""


def is_own_code(model: object) -> bool:
    """Whether the code of a model comes with its checkpoint."""
    return type(model).__module__.startswith("transformers_modules.")


class Completed:
    """Stands before a class of such a model, which is then complete once it is loaded."""

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        given = copy.deepcopy(config)
        super().__init__(config, *inputs, **options)  # type: ignore[call-arg]
        self._given = given

    def initialize_weights(self) -> None:
        """Fill what no checkpoint holds: loading comes here once it has the weights."""
        super().initialize_weights()  # type: ignore[misc]
        given = vars(self).pop("_given", None)
        if given is not None:  # not while it is made
            complete_(self, given)


def complete_(model: Any, config: Any) -> None:
    """Put in order what is left undone in a model that was loaded, so that it runs and is saved.

    Args:
        config: of which it was loaded; its own lacks what making it took out.
    """
    if not is_own_code(model):
        return
    vars(model.config).update({**vars(config), **vars(model.config)})
    packing = getattr(config, "quantization_config", None)
    if packing is None or dict(packing).get("quant_method") != "llm_pruner":
        # Those of a recipe are computed and cut while it is loaded.
        fill_buffers_(model, computed_buffers(model, model.config))
    for module in model.modules():
        if isinstance(getattr(module, "_tied_weights_keys", None), list):
            # What may be tied and is not: what is does not load. Saving asks a dictionary.
            module._tied_weights_keys = None


def computed_buffers(model: Any, config: Any) -> dict[Place, torch.Tensor]:
    """Return what the code of a model makes of tensors that no file holds, as it is made.

    Those that it leaves to be filled later are not there. Empty for models of transformers, which
    fill them all later, and for code that cannot be run once more.

    Args:
        model: maybe without memory; it is left alone.
        config: as it was before the model was made of it, which takes values out.
    """
    if not is_own_code(model):
        return {}
    try:
        with torch.device("cpu"), _unset_is_nan(), init_empty_weights(include_buffers=False):
            made = type(model)._from_config(copy.deepcopy(config), dtype=model.dtype)
    except Exception:  # code of models raises anything
        return {}
    with torch.device("cpu"):
        return {place: value for place, value in _unsaved(made) if not value.isnan().any()}


def fill_buffers_(model: nn.Module, values: Mapping[Place, torch.Tensor]) -> None:
    """Give a model the values of ``computed_buffers``, where they have its shapes."""
    device = next(model.parameters()).device
    for (path, name), old in [*_unsaved(model)]:
        new = values.get((path, name))
        if new is not None and new.shape == old.shape:
            module = model.get_submodule(path)
            held: dict[str, Any] = module._buffers if name in module._buffers else vars(module)
            held[name] = new.to(device if old.is_meta else old.device)


def _unsaved(model: nn.Module) -> Iterator[tuple[Place, torch.Tensor]]:
    """Yield the buffers of a model that no file holds, and plain tensors of its modules."""
    for path, module in model.named_modules():
        held = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in {**vars(module), **held}.items():
            if isinstance(value, torch.Tensor):
                yield (path, name), value


@contextmanager
def _unset_is_nan() -> Iterator[None]:
    """Have new tensors that nobody has written to hold NaN, if they are of floating point."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warned)
