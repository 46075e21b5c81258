"""Tokens per second of prefill and of decoding."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.evaluation.decoding import Decoder


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time of their one forward pass.
        decode_tokens_per_second: tokens that follow, one forward pass each, over their time.
        prompt_tokens, new_tokens, batch_size, repeats: the settings.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


def measure_speed(
    model: Any,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 3,
    batch_size: int = 1,
) -> Speed:
    """Time greedy decoding after a prompt of random tokens, once for warming up and then repeated.

    Raises:
        UserError: a setting is not positive.
    """
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batch_size": batch_size,
    }
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"{name}={value} measures nothing; use at least 1")
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(int(weight.shape[0]), shape, generator=generator).to(weight.device)
    training = model.training
    model.eval()
    try:
        _once(model, prompt, min(new_tokens, 2))
        times = [_once(model, prompt, new_tokens) for _ in range(repeats)]
    finally:
        model.train(training)
    return Speed(
        prefill_tokens_per_second=batch_size * prompt_tokens / median(t[0] for t in times),
        decode_tokens_per_second=batch_size * new_tokens / median(t[1] for t in times),
        **settings,
    )


def _once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of the prefill and of decoding ``new_tokens``."""
    decoder = Decoder(model)
    begin = _now(prompt.device)
    token = decoder.step(prompt).argmax(dim=-1, keepdim=True)
    middle = _now(prompt.device)
    for _ in range(new_tokens):
        token = decoder.step(token).argmax(dim=-1, keepdim=True)
    return middle - begin, _now(prompt.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
