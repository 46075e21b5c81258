"""One decoding step at a time, with the key-value cache where the model has one."""

from __future__ import annotations

from typing import Any

import torch


class Decoder:
    """Runs a model over a growing text.

    A plain loop in place of ``generate``: no defaults of the checkpoint's generation config
    (sampling, penalties, forced tokens) come into a measurement.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None
        self._seen: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens, shape (batch, T), and return the logits of the last one, (batch, V)."""
        if self._seen is None or self._cache is None:
            # No cache yet, or a model without one: run the whole text again.
            self._seen = tokens if self._seen is None else torch.cat([self._seen, tokens], dim=1)
            tokens = self._seen
        output = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        logits: torch.Tensor = output.logits[:, -1]
        return logits
