"""Load a model and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_pruner.data.evaluation import load_evaluation_text
from llm_pruner.evaluation.perplexity import EvaluationText, PerplexityResult, perplexity
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.size import model_size
from llm_pruner.evaluation.speed import Speed, measure_speed
from llm_pruner.pipeline.settings import ModelSettings
from llm_pruner.sources import LoadedModel, load_model


@dataclass(frozen=True)
class PerplexitySettings:
    """How perplexity is measured; see ``evaluation.perplexity``."""

    protocol: Literal["paper", "standard"] = "standard"
    seq_len: int | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    split: str | None = None
    text_field: str | None = None


def load(model: ModelSettings) -> LoadedModel:
    """Load a model as its settings say."""
    return load_model(
        model.source,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )


def measure_perplexity(
    loaded: LoadedModel, sources: Sequence[str], settings: PerplexitySettings
) -> list[PerplexityResult]:
    """Return the perplexity on each corpus.

    Raises:
        UserError: a corpus cannot be read or is too short.
    """
    results = []
    for source in sources:
        name, split, text = load_evaluation_text(
            source,
            protocol=settings.protocol,
            split=settings.split,
            text_field=settings.text_field,
        )
        results.append(
            perplexity(
                loaded.model,
                loaded.tokenizer,
                EvaluationText(name, split, text),
                protocol=settings.protocol,
                seq_len=settings.seq_len,
                max_tokens=settings.max_tokens,
                batch_size=settings.batch_size,
            )
        )
    return results


@dataclass(frozen=True)
class Measured:
    """Size, perplexity, speed and continuations of one model; what was not asked for is empty."""

    model: str
    parameters: int
    parameters_embedding: int
    parameters_blocks: int
    perplexity: list[PerplexityResult]
    speed: Speed | None
    samples: dict[str, str]


def measure(
    model: ModelSettings,
    sources: Sequence[str],
    settings: PerplexitySettings,
    *,
    prompts: Sequence[str] = (),
    new_tokens: int = 40,
    speed: bool = False,
) -> Measured:
    """Load a model and measure what is asked for.

    Raises:
        UserError: the model or a corpus cannot be read.
    """
    loaded = load(model)
    size = model_size(loaded.model)
    return Measured(
        model=loaded.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=measure_perplexity(loaded, sources, settings),
        speed=measure_speed(loaded.model) if speed else None,
        samples={
            prompt: sample_continuation(loaded.model, loaded.tokenizer, prompt, new_tokens)
            for prompt in prompts
        },
    )
