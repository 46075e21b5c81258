"""Size, work, memory and speed of a model, alone or against another one."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import (
    Counts,
    PeakMemory,
    count_work,
    measure_memory,
    model_size,
    paper_macs,
)
from llm_pruner.evaluation.speed import Speed, SpeedUp, compiled, compiling, measure_speed, speed_up
from llm_pruner.files.disk import folder_bytes
from llm_pruner.models.forward import Decoder, maximum_length
from llm_pruner.models.load import LoadedModel, check, load
from llm_pruner.models.stored import stored_at
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import BenchSettings

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Figures:
    """One model. Counts of MACs and bytes leave out what is no product; see `evaluation.footprint`.

    Attributes:
        model: its name.
        parameters: all, tied ones once; ``parameters_embedding`` and ``parameters_blocks`` are
            those of the embeddings and of the decoder layers.
        bytes_in_memory: of the parameters, in the type in which the model was loaded.
        bytes_on_disk: of the file or all files of the folder; None if there is none here.
        macs: of one forward pass over 64 tokens, logits at every position, as the paper counts.
        macs_per_token: of the token after 64 others, with the cache.
        bytes_read_per_token: weights and cache that this token reads.
        kv_cache_bytes_per_token: growth of the cache with each token.
        cache_bytes_fixed: the part of the cache that does not grow.
        memory: for each batch size.
        speed: for each batch size.
    """

    model: str
    parameters: int
    parameters_embedding: int | None
    parameters_blocks: int | None
    bytes_in_memory: int | None
    bytes_on_disk: int | None
    macs: int
    macs_per_token: int
    bytes_read_per_token: int
    kv_cache_bytes_per_token: int
    cache_bytes_fixed: int
    memory: tuple[PeakMemory, ...] = ()
    speed: tuple[Speed, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """How much faster the first model is at one batch size, beside what its size allows.

    Attributes:
        batch_size: prompts at once.
        prefill, decode: speed-ups.
        prefill_limit: ratio of the MACs of the prefill; what it takes if nothing else counts.
        decode_limit: ratio of the bytes that a decoding step reads.
    """

    batch_size: int
    prefill: SpeedUp
    decode: SpeedUp
    prefill_limit: float
    decode_limit: float


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        settings: as given, with type, device, threads and versions.
        model: the model.
        against: the other one, if there is one.
        comparison: for each batch size; empty without another model.
    """

    settings: dict[str, Any]
    model: Figures
    against: Figures | None
    comparison: tuple[Comparison, ...]
    format_version: int = FORMAT_VERSION


def bench(settings: BenchSettings) -> Bench:
    """Measure a model, and another one in turns with it.

    Raises:
        UserError: a model cannot be loaded, or cannot be compiled.
        LLMPrunerError: a model does not run.
    """
    settings.check()
    sources = [settings.loading()]
    if settings.against is not None:
        sources.append(settings.loading(settings.against))
        if not settings.counts_only:
            check(sources[1])
    loaded = [
        load(source, tokenizer_required=False, weights=not settings.counts_only)
        for source in sources
    ]
    for one in loaded:
        _check_length(one, settings)
    figures = [_counted(one, source) for one, source in zip(loaded, sources, strict=True)]
    comparison = []
    if not settings.counts_only:
        models = [one.model for one in loaded]
        for index, memory in enumerate(_memory(models, settings)):
            figures[index] = replace(figures[index], memory=memory)
        speeds = _speeds(models, settings)
        for index, speed in enumerate(speeds):
            figures[index] = replace(figures[index], speed=speed)
        if len(loaded) > 1:
            work = [_work(network, settings) for network in models]
            comparison = [
                _compared(*pair, *counts)
                for *pair, counts in zip(*speeds, zip(*work, strict=True), strict=True)
            ]
    return Bench(
        settings=_record(loaded[0].model, settings),
        model=figures[0],
        against=figures[1] if len(figures) > 1 else None,
        comparison=tuple(comparison),
    )


def _check_length(loaded: LoadedModel, settings: BenchSettings) -> None:
    """Raise UserError if the texts are longer than the model was made for."""
    limit = maximum_length(loaded.model)
    length = settings.prompt_tokens + settings.new_tokens
    if not settings.counts_only and limit is not None and length > limit:
        raise UserError(
            f"{settings.prompt_tokens} prompt tokens and {settings.new_tokens} new ones are more "
            f"than the {limit} positions of {loaded.name}; give fewer"
        )


def _counted(loaded: LoadedModel, source: ModelSettings) -> Figures:
    size = model_size(loaded.model)
    counts = count_work(loaded.model)
    path = stored_at(source.model, loaded.revision or source.revision)
    return Figures(
        model=loaded.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        bytes_in_memory=size.bytes,
        # A config alone is no model.
        bytes_on_disk=None if path is None or path.suffix == ".json" else folder_bytes(path),
        macs=paper_macs(loaded.model),
        macs_per_token=counts.token_macs,
        bytes_read_per_token=counts.token_bytes_read,
        kv_cache_bytes_per_token=counts.cache_bytes_per_token,
        cache_bytes_fixed=counts.cache_bytes_fixed,
    )


def _memory(models: list[Any], settings: BenchSettings) -> list[tuple[PeakMemory, ...]]:
    return [
        tuple(
            measure_memory(
                network,
                batch_size=batch_size,
                prompt_tokens=settings.prompt_tokens,
                new_tokens=settings.new_tokens,
            )
            for batch_size in settings.batch_size
        )
        for network in models
    ]


def _speeds(models: list[Any], settings: BenchSettings) -> list[tuple[Speed, ...]]:
    """Return the speeds of each model, for each batch size."""
    start: Callable[[Any], Any] = Decoder
    by_batch = []
    on_processor = next(models[0].parameters()).device.type == "cpu"
    for batch_size in settings.batch_size:
        with ExitStack() as stack:
            if settings.compile:
                # Anew for each batch size, so that only its copies of the weights exist.
                stack.enter_context(compiling(constant_weights=on_processor))
                start = compiled(settings.prompt_tokens + settings.new_tokens)
            by_batch.append(
                measure_speed(
                    models,
                    prompt_tokens=settings.prompt_tokens,
                    new_tokens=settings.new_tokens,
                    repeats=settings.repeats,
                    batch_size=batch_size,
                    start=start,
                )
            )
    return [tuple(speeds) for speeds in zip(*by_batch, strict=True)]


def _work(network: Any, settings: BenchSettings) -> list[Counts]:
    return [
        count_work(network, prompt_tokens=settings.prompt_tokens, batch_size=batch_size)
        for batch_size in settings.batch_size
    ]


def _compared(fast: Speed, slow: Speed, small: Counts, large: Counts) -> Comparison:
    return Comparison(
        batch_size=fast.batch_size,
        prefill=speed_up(slow.prefill_seconds, fast.prefill_seconds),
        decode=speed_up(slow.decode_seconds, fast.decode_seconds),
        prefill_limit=large.prefill_macs / small.prefill_macs,
        decode_limit=large.token_bytes_read / small.token_bytes_read,
    )


def _record(network: Any, settings: BenchSettings) -> dict[str, Any]:
    weight = next(network.parameters())
    on_gpu = weight.device.type == "cuda"
    return {
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "batch_sizes": list(settings.batch_size),
        "repeats": settings.repeats,
        "compile": settings.compile,
        "counts_only": settings.counts_only,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
