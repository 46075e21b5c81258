"""Load a model and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import get_args

from llm_pruner.commands.zero_shot import ZeroShot, ZeroShotSettings, prepare_tasks, run_tasks
from llm_pruner.data.evaluation import load_evaluation_text
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    Protocol,
    perplexity,
)
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.size import ModelSize, model_size
from llm_pruner.evaluation.speed import Speed, measure_speed
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.loading import load
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import MOST, check_number


@dataclass(frozen=True)
class PerplexitySettings:
    """How perplexity is measured; see ``evaluation.perplexity``.

    Raises:
        UserError: the protocol is unknown, or a number cannot be.
    """

    protocol: Protocol = "standard"
    seq_len: int | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    split: str | None = None
    text_field: str | None = None

    def __post_init__(self) -> None:
        if self.protocol not in get_args(Protocol):
            known = " or ".join(get_args(Protocol))
            raise UserError(f"protocol {self.protocol!r} is unknown; use {known}")
        check_number("--seq-len", self.seq_len, 2, 2**24)
        check_number("--max-tokens", self.max_tokens, 2, MOST)
        check_number("--batch-size", self.batch_size, 1, 2**20)


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
    parameters_embedding: int
    parameters_blocks: int
    perplexity: list[PerplexityResult]
    zero_shot: ZeroShot | None
    speed: Speed | None
    samples: dict[str, str]


def measure(
    model: ModelSettings,
    sources: Sequence[str],
    settings: PerplexitySettings,
    *,
    zero_shot: ZeroShotSettings | None = None,
    prompts: Sequence[str] = (),
    new_tokens: int = 40,
    chat: bool = True,
    speed: bool = False,
) -> Measured:
    """Load a model and measure what is asked for.

    With ``chat`` a model whose tokenizer has a chat template is asked the prompts as a user would.
    If only zero-shot tasks are asked for and all their results are known, no model is loaded.

    Raises:
        UserError: the model, a corpus or a task cannot be read.
    """
    # First what takes less time than to load a model.
    texts = read_texts(sources, settings)
    tasks = prepare_tasks(zero_shot) if zero_shot is not None else []
    late = _Late(model)
    perplexities = [
        perplexity(
            late.loaded.model,
            late.loaded.tokenizer,
            text,
            protocol=settings.protocol,
            seq_len=settings.seq_len,
            max_tokens=settings.max_tokens,
            batch_size=settings.batch_size,
        )
        for text in texts
    ]
    found = None
    identity = None
    if zero_shot is not None:
        identity = result_cache.identify(model) if zero_shot.cache else None
        found = run_tasks(tasks, zero_shot, model, identity, lambda: late.loaded)
    name, size = _name_and_size(late, identity)
    return Measured(
        model=name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=perplexities,
        zero_shot=found,
        speed=measure_speed(late.loaded.model) if speed else None,
        samples={
            prompt: sample_continuation(
                late.loaded.model, late.loaded.tokenizer, prompt, new_tokens, chat=chat
            )
            for prompt in prompts
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


def _name_and_size(
    late: _Late, identity: result_cache.ModelIdentity | None
) -> tuple[str, ModelSize]:
    """Return name and size; of a model that is not loaded, from an earlier run if there was one."""
    key = None
    if identity is not None:
        key = result_cache.key(identity, late.settings, what="size")
        known = None if late.is_loaded else result_cache.read(key)
        if known is not None and known.keys() == {field.name for field in fields(ModelSize)}:
            return identity.name, ModelSize(**known)
    size = model_size(late.loaded.model)
    if key is not None:
        result_cache.write(key, asdict(size))
    return late.loaded.name, size
