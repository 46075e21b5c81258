"""One decoding step at a time, with the key-value cache where the model has one."""

from __future__ import annotations

import inspect
from typing import Any

import torch


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
        self._fixed = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
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


def cache_argument(model: Any) -> str | None:
    """Return the name of the forward argument, and output field, that holds the cache.

    transformers calls it ``cache``, and earlier ``past_key_values``. None if there is neither.
    """
    names = _arguments(model)
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def _arguments(model: Any) -> Any:
    """Return the names of the arguments of the forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return inspect.signature(base.forward).parameters
