"""Size, work, memory and speed of a model, alone or against another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.evaluation import footprint
from llm_pruner.evaluation.speed import (
    Speed,
    SpeedUp,
    device_name,
    measure_speed,
    speed_up,
)
from llm_pruner.files.disk import folder_bytes
from llm_pruner.models.checkpoint_files import stored_at
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import LoadedModel, check, load
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import BenchSettings


@dataclass(frozen=True)
class Figures:
    """One model; what is counted is defined in `evaluation.footprint`.

    Attributes:
        parameters: all, tied ones once; ``parameters_embedding`` and ``parameters_blocks`` are
            those of the embeddings and of the decoder layers.
        bytes_in_memory: of the parameters, in the type in which the model was loaded.
        bytes_on_disk: of the file or all files of the folder; None if there is none here.
        macs: of one forward pass over 64 tokens, logits at every position, as the paper counts.
        macs_per_token: of the token after 64 others, with the cache.
        bytes_read_per_token: weights and cache that this token reads.
        kv_cache_bytes_per_token: growth of the cache with each token.
        cache_bytes_fixed: the part of the cache that does not grow.
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
    memory: tuple[footprint.PeakMemory, ...] = ()
    speed: tuple[Speed, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """How much faster the first model is at one batch size, beside what its size allows.

    Attributes:
        prefill_limit: ratio of the MACs of the prefill.
        decode_limit: ratio of the bytes that a decoding step reads.
    """

    batch_size: int
    prefill: SpeedUp
    decode: SpeedUp
    prefill_limit: float
    decode_limit: float


@dataclass(frozen=True)
class Bench:
    """What was measured; ``settings`` are those given, with type, device, threads and versions."""

    settings: dict[str, Any]
    model: Figures
    against: Figures | None
    comparison: tuple[Comparison, ...]
    format_version: int = 1


def bench(settings: BenchSettings) -> Bench:
    """Measure a model, and another one in turns with it.

    Raises:
        UserError: a model cannot be loaded.
        LLMPrunerError: a model does not run.
    """
    sources = [settings.loading()]
    if settings.against is not None:
        sources.append(settings.loading(settings.against))
        if not settings.counts_only:
            check(sources[1], packed=True)
    loaded = [
        load(source, tokenizer_required=False, weights=not settings.counts_only, packed=True)
        for source in sources
    ]
    models = [one.model for one in loaded]
    figures = [_counted(one, source) for one, source in zip(loaded, sources, strict=True)]
    comparison: tuple[Comparison, ...] = ()
    if not settings.counts_only:
        for one in loaded:
            _check_length(one, settings)
        text = {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}
        memory = [
            tuple(footprint.measure_memory(one, batch_size=n, **text) for n in settings.batch_size)
            for one in models
        ]
        timed = [
            measure_speed(models, repeats=settings.repeats, batch_size=n, **text)
            for n in settings.batch_size
        ]
        speeds = [*zip(*timed, strict=True)]
        figures = [
            replace(one, memory=peaks, speed=rates)
            for one, peaks, rates in zip(figures, memory, speeds, strict=True)
        ]
        if len(models) > 1:
            pairs = zip(*speeds, strict=True)
            comparison = tuple(_compared(models, fast, slow) for fast, slow in pairs)
    asked = {"prompt_tokens", "new_tokens", "repeats", "counts_only"}
    weight = next(models[0].parameters())
    return Bench(
        settings={
            **settings.model_dump(include=asked),
            "batch_sizes": list(settings.batch_size),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": device_name(weight.device),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        model=figures[0],
        against=figures[1] if len(figures) > 1 else None,
        comparison=comparison,
    )


def _check_length(loaded: LoadedModel, settings: BenchSettings) -> None:
    """Raise UserError if the texts are longer than the model was made for."""
    limit = maximum_length(loaded.model)
    if limit is not None and settings.prompt_tokens + settings.new_tokens > limit:
        raise UserError(
            f"{settings.prompt_tokens} prompt tokens and {settings.new_tokens} new ones are more "
            f"than the {limit} positions of {loaded.name}; give fewer"
        )


def _counted(loaded: LoadedModel, source: ModelSettings) -> Figures:
    """Return what is known of a model without running it."""
    size = footprint.model_size(loaded.model)
    counts = footprint.count_work(loaded.model)
    path = stored_at(source.model, loaded.revision or source.revision)
    if path is not None and path.suffix == ".json":
        path = None  # a config alone is no model
    return Figures(
        model=loaded.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        bytes_in_memory=size.bytes,
        bytes_on_disk=None if path is None else folder_bytes(path),
        macs=footprint.paper_macs(loaded.model),
        macs_per_token=counts.token_macs,
        bytes_read_per_token=counts.token_bytes_read,
        kv_cache_bytes_per_token=counts.cache_bytes_per_token,
        cache_bytes_fixed=counts.cache_bytes_fixed,
    )


def _compared(models: list[Any], fast: Speed, slow: Speed) -> Comparison:
    small, large = (
        footprint.count_work(one, prompt_tokens=fast.prompt_tokens, batch_size=fast.batch_size)
        for one in models
    )
    return Comparison(
        batch_size=fast.batch_size,
        prefill=speed_up(slow.prefill_seconds, fast.prefill_seconds),
        decode=speed_up(slow.decode_seconds, fast.decode_seconds),
        prefill_limit=large.prefill_macs / small.prefill_macs,
        decode_limit=large.token_bytes_read / small.token_bytes_read,
    )
