"""Load a model and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property

from llm_pruner.commands.zero_shot import ZeroShot, prepare_tasks, run_tasks
from llm_pruner.data.text import load_evaluation_text
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    perplexity,
)
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.speed import Speed, measure_speed
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import EvaluateSettings, PerplexitySettings
from llm_pruner.types import Size


def read_texts(sources: Sequence[str], settings: PerplexitySettings) -> list[EvaluationText]:
    """Return the corpora.

    Raises:
        UserError: a corpus cannot be read.
    """
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
    """What was measured of one model; what was not asked for is empty."""

    model: str
    parameters: int
    parameters_embedding: int | None
    parameters_blocks: int | None
    perplexity: list[PerplexityResult]
    zero_shot: ZeroShot | None
    speed: Speed | None
    samples: dict[str, str]


def measure(settings: EvaluateSettings) -> Measured:
    """Load a model and measure what is asked for.

    With ``chat`` a model whose tokenizer has a chat template is asked the prompts as a user would.
    If only zero-shot tasks are asked for and all their results are known, no model is loaded.

    Raises:
        UserError: the model, a corpus or a task cannot be read.
    """
    # First what takes less time than to load a model.
    texts = read_texts(settings.perplexity, settings)
    tasks = prepare_tasks(settings) if settings.tasks is not None else []
    late = _Late(settings.loading())
    perplexities = [
        perplexity(
            late.loaded.model,
            late.loaded.tokenizer,
            text,
            protocol=settings.protocol,
            seq_len=settings.seq_len,
            max_tokens=settings.max_tokens,
            batch_size=settings.sequences,
        )
        for text in texts
    ]
    found = None
    identity = None
    if settings.tasks is not None:
        identity = result_cache.identify(late.settings) if settings.cache else None
        found = run_tasks(tasks, settings, identity, lambda: late.loaded)
    name, size = _name_and_size(late, identity)
    return Measured(
        model=name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=perplexities,
        zero_shot=found,
        speed=measure_speed([late.loaded.model])[0] if settings.speed else None,
        samples={
            prompt: sample_continuation(
                late.loaded.model,
                late.loaded.tokenizer,
                prompt,
                settings.new_tokens,
                chat=settings.chat,
            )
            for prompt in settings.prompt
        },
    )


class _Late:
    """A model that is loaded when it is first needed."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings

    @cached_property
    def loaded(self) -> LoadedModel:
        return load(self.settings)

    @property
    def is_loaded(self) -> bool:
        return "loaded" in vars(self)


def _name_and_size(late: _Late, identity: result_cache.ModelIdentity | None) -> tuple[str, Size]:
    """Return name and size; of a model that is not loaded, from an earlier run if there was one."""
    key = None
    if identity is not None:
        key = result_cache.key(identity, late.settings, what="size")
        known = None if late.is_loaded else result_cache.read(key)
        if known is not None and known.keys() == {field.name for field in fields(Size)}:
            return identity.name, Size(**known)
    size = model_size(late.loaded.model)
    if key is not None:
        result_cache.write(key, asdict(size))
    return late.loaded.name, size
