"""Tokens per second of prefill and of decoding, of one model or of several in turns.

Small models spend a part of each step in Python, which no pruning shortens. Compiled, as they are
for deployment, that part is gone, and what is left is the work itself. On a processor the weights
are compiled in as constants ("freezing"), laid out beforehand for its matrix multiplication, where
they would be looked up and checked in each step otherwise. Nor does a step check that no module has
changed since: nothing changes a model that is measured.
"""

from __future__ import annotations

import gc
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import StaticCache

from llm_pruner.errors import UserError
from llm_pruner.models.forward import Decoder, cache_argument, dtype_name
from llm_pruner.runtime.progress import quiet, track
from llm_pruner.tracing.run import example_tokens
from llm_pruner.tracing.scenes import staged

PROMPT_TOKENS, NEW_TOKENS = 64, 32
"""That a model is timed on, where nobody says how many."""

_PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Speed:
    """How fast a model is; the figures are medians over the rounds.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time of their one forward pass.
        decode_tokens_per_second: tokens that follow, one forward pass each, over their time.
        prefill_seconds, decode_seconds: of each round; a prefill ends with the first token.
        device: a GPU or processor by its name.
        threads: None on a GPU.
    """

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
    start: Callable[[Any], Decoder] = Decoder,
) -> list[Speed]:
    """Time greedy decoding after a prompt of random tokens, of one model or several in turns.

    A first round warms up. In each round that counts every model runs once, in an order that turns
    round from one to the next, so that what the machine does besides hits all alike.

    Args:
        start: makes what reads a new text with a model.
    """

    def once(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
        decoder = start(model)
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
    """Evaluate without gradients, and without the garbage collector in between."""
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


_VARIANTS = 64
"""Compiled versions of one forward pass that may exist: one for each input shape."""
_FILTER = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
_UNCHECKED = {"guard_filter_fn": _FILTER} if _FILTER is not None else None
"""Options of ``torch.compile`` for steps that do not check whether a module has changed.

None where PyTorch is too old to leave such checks out; steps are a little slower there.
"""


def compiled(capacity: int, backend: str = "inductor") -> Callable[[Any], Decoder]:
    """Return what starts a text with a model that is compiled, with a cache for ``capacity``."""

    @cache
    def compiled_forward(model: Any) -> Any:
        return torch.compile(_own(model), dynamic=False, backend=backend, options=_UNCHECKED)

    def start(model: Any) -> Decoder:
        if cache_argument(model) is None:
            raise UserError(
                f"{type(model).__name__} has no cache, so it cannot be compiled for decoding; "
                "leave out --compile"
            )
        decoder = Decoder(model)
        decoder.model = compiled_forward(model)
        decoder.cache = StaticCache(config=model.config, max_cache_len=capacity)
        return decoder

    return start


def _own(model: Any) -> Callable[..., Any]:
    """Return a forward pass that is compiled for one model alone.

    What is compiled is found by the code that ran, which the models of a class share, and then by
    checks of which model it is; without checks each needs code of its own.
    """

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    forward.__code__ = forward.__code__.replace()
    return forward


@contextmanager
def compiling(constant_weights: bool = False) -> Iterator[None]:
    """Let many shapes be compiled, and say in one line why a model cannot be.

    Args:
        constant_weights: compile weights in, which must not change then. Each shape keeps a copy of
            them until the end.

    Raises:
        UserError: a model cannot be compiled here.
    """
    import torch._dynamo as dynamo

    dynamo.reset()
    # By their first names, which PyTorch 2.6 has alone and later ones still know.
    limits = {"cache_size_limit": _VARIANTS, "fail_on_cache_limit_hit": True}
    try:
        with (
            dynamo.config.patch(limits),
            torch._inductor.config.patch(freezing=constant_weights, cpp_wrapper=constant_weights),
            quiet("torch._dynamo"),
        ):
            yield
    except dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the model cannot be compiled here ({type(error).__name__}: {reason}); "
            "leave out --compile"
        ) from error
    finally:
        dynamo.reset()
