"""One decoding step at a time, with the key-value cache where the model has one, and its size."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from llm_pruner.models.forward import cache_argument, parameters_of


class Decoder:
    """Runs a model over a growing text.

    A plain loop in place of ``generate``: no defaults of the checkpoint's generation config
    (sampling, penalties, forced tokens) come into a measurement. Like ``generate`` it asks for the
    logits of the last position alone, where the model can be asked.

    Attributes:
        cache: what the model keeps of the text so far; None before the first step, and always for
            a model without a cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self._argument = cache_argument(model)
        self._fixed = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(model) else {}
        self._seen: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens, shape (batch, T), and return the logits of the last one, (batch, V)."""
        if self.cache is None:
            # No cache yet, or a model without one: run the whole text again.
            self._seen = tokens if self._seen is None else torch.cat([self._seen, tokens], dim=1)
            tokens = self._seen
        keywords = {self._argument: self.cache, "use_cache": True} if self._argument else {}
        output = self.forward(input_ids=tokens, **keywords, **self._fixed)
        self.cache = getattr(output, self._argument, None) if self._argument else None
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.model(**inputs)


def tensor_bytes(holder: Any) -> int:
    """Return the bytes of all tensors that an object holds, at any depth; each counts once."""
    seen: set[int] = set()
    total = 0
    pending = [holder]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, (str, bytes, int, float, type)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, torch.nn.Module):
            pending.extend(vars(item).values())
    return total


def make_room_(cache: Any, tokens: int) -> None:
    """Have the layers of a cache take the next tokens in place, up to ``tokens`` in all.

    A layer of transformers' ``DynamicCache`` copies its keys and values at each step into tensors
    with room for one token more. Layers that drop tokens, or keep something else, are left as they
    are; so is a cache of another kind. For texts that only grow: none may be taken out, reordered
    or cut.

    Args:
        cache: as a model returned it.
        tokens: length to which the texts will grow; beyond it they are copied again.
    """
    layers = getattr(cache, "layers", None)
    if isinstance(layers, list):
        layers[:] = [
            _Roomy(one, tokens) if type(one) is DynamicLayer and one.get_seq_length() else one
            for one in layers
        ]


class _Roomy(DynamicLayer):
    """A layer whose keys and values are the filled part of longer tensors.

    All have the shape (batch, heads, tokens, size of a head).
    """

    def __init__(self, filled: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self._rooms = tuple(
            one.new_empty(*one.shape[:-2], max(tokens, one.shape[-2]), one.shape[-1])
            for one in (filled.keys, filled.values)
        )
        self.update(filled.keys, filled.values)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what is there; beyond the room, grow as the layer does otherwise."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return grown
        keys, values = self._rooms
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values
