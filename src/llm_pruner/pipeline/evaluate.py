"""Load a model and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from llm_pruner.data.evaluation import load_evaluation_text
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    Protocol,
    perplexity,
)
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.size import model_size
from llm_pruner.evaluation.speed import Speed, measure_speed
from llm_pruner.pipeline.loading import load
from llm_pruner.pipeline.settings import ModelSettings


@dataclass(frozen=True)
class PerplexitySettings:
    """How perplexity is measured; see ``evaluation.perplexity``."""

    protocol: Protocol = "standard"
    seq_len: int | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    split: str | None = None
    text_field: str | None = None


def read_texts(sources: Sequence[str], settings: PerplexitySettings) -> list[EvaluationText]:
    """Return the corpora.

    Raises:
        UserError: the protocol is unknown, or a corpus cannot be read.
    """
    if settings.protocol not in get_args(Protocol):
        known = " or ".join(get_args(Protocol))
        raise UserError(f"protocol {settings.protocol!r} is unknown; use {known}")
    texts = []
    for source in sources:
        name, split, text = load_evaluation_text(
            source,
            protocol=settings.protocol,
            split=settings.split,
            text_field=settings.text_field,
        )
        texts.append(EvaluationText(name, split, text))
    return texts


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
    chat: bool = True,
    speed: bool = False,
) -> Measured:
    """Load a model and measure what is asked for.

    With ``chat`` a model whose tokenizer has a chat template is asked the prompts as a user would.

    Raises:
        UserError: the model or a corpus cannot be read.
    """
    texts = read_texts(sources, settings)  # first: it takes less time than to load a model
    loaded = load(model)
    size = model_size(loaded.model)
    return Measured(
        model=loaded.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=[
            perplexity(
                loaded.model,
                loaded.tokenizer,
                text,
                protocol=settings.protocol,
                seq_len=settings.seq_len,
                max_tokens=settings.max_tokens,
                batch_size=settings.batch_size,
            )
            for text in texts
        ],
        speed=measure_speed(loaded.model) if speed else None,
        samples={
            prompt: sample_continuation(
                loaded.model, loaded.tokenizer, prompt, new_tokens, chat=chat
            )
            for prompt in prompts
        },
    )
