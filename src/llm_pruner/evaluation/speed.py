"""Tokens per second of prefill and of decoding, of one model or of several in turns."""

from __future__ import annotations

import gc
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llm_pruner.discovery.run import example_tokens
from llm_pruner.models.forward import Decoder, dtype_name
from llm_pruner.runtime.progress import track
from llm_pruner.tracing.scenes import staged

PROMPT_TOKENS, NEW_TOKENS = 64, 32
"""That a model is timed on, where nobody says how many."""

_PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Speed:
    """How fast a model is; the figures are medians over the rounds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    dtype: str
    device: str
    threads: int | None


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one model is than another: median, least and most of paired rounds."""

    median: float
    low: float
    high: float


def measure_speed(
    models: Sequence[Any],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 3,
    batch_size: int = 1,
) -> list[Speed]:
    """Time greedy decoding after a prompt of random tokens, of one model or several in turns.

    A first round warms up. In each round that counts every model runs once, in an order that turns
    round from one to the next, so that what the machine does besides hits all alike.
    """

    def once(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
        decoder = Decoder(model)
        begin = now(prompt.device)
        token = decoder.step(prompt).argmax(dim=-1, keepdim=True)
        middle = now(prompt.device)
        for _ in range(new_tokens):
            token = decoder.step(token).argmax(dim=-1, keepdim=True)
        return middle - begin, now(prompt.device) - middle

    prompts = [example_tokens(model, (batch_size, prompt_tokens)) for model in models]
    turns: list[tuple[Any, torch.Tensor, list[tuple[float, float]]]] = [
        (model, prompt, []) for model, prompt in zip(models, prompts, strict=True)
    ]
    with _undisturbed(models):
        for model, prompt, _ in turns:
            once(model, prompt)
        for number in track(range(repeats), f"timing, batch {batch_size}"):
            for model, prompt, times in reversed(turns) if number % 2 else turns:
                times.append(once(model, prompt))
    found = []
    for model, prompt, times in turns:
        prefill, decode = zip(*times, strict=True)
        found.append(
            Speed(
                prefill_tokens_per_second=batch_size * prompt_tokens / median(prefill),
                decode_tokens_per_second=batch_size * new_tokens / median(decode),
                prefill_seconds=prefill,
                decode_seconds=decode,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                batch_size=batch_size,
                repeats=repeats,
                dtype=dtype_name(model),
                device=device_name(prompt.device),
                threads=torch.get_num_threads() if prompt.device.type == "cpu" else None,
            )
        )
    return found


def device_name(device: torch.device) -> str:
    """Return which GPU or processor a device is, as far as the system knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with suppress(OSError):  # only Linux has the file
        if found := re.search(r"^model name\s*: *(\S.*)$", _PROCESSORS.read_text(), re.MULTILINE):
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def speed_up(slow: Sequence[float], fast: Sequence[float]) -> SpeedUp:
    """Return how many times faster the second was, from the seconds of each round."""
    ratios = [before / after for before, after in zip(slow, fast, strict=True)]
    return SpeedUp(median(ratios), min(ratios), max(ratios))


@contextmanager
def _undisturbed(models: Sequence[Any]) -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(staged(model))
            stack.enter_context(torch.inference_mode())
            yield
    finally:
        if collecting:
            gc.enable()


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
