"""Measure a model: perplexity, what it can do, speed, samples; here or in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from llm_pruner.commands.abilities import Late, Prepared, abilities, prepare, stored
from llm_pruner.data.text import EvaluationText, load_evaluation_text, read_each
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.evaluation import result_cache, zero_shot
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import PerplexityResult, perplexity
from llm_pruner.evaluation.samples import check_prompt, sample_continuation
from llm_pruner.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, Speed, measure_speed
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.report.records import Measured
from llm_pruner.report.write import check_measured
from llm_pruner.runtime.memory import give_back, keep_large_blocks
from llm_pruner.runtime.processes import new_python
from llm_pruner.runtime.signals import end_with_parent
from llm_pruner.settings.evaluate import EvaluateSettings, PerplexitySettings
from llm_pruner.surgery.vocabulary import with_tokens_of
from llm_pruner.types import Size

_LOG = logging.getLogger(__name__)

_MEASURED = TypeAdapter(Measured)


@dataclass(frozen=True)
class _Known:
    """Size and fingerprint of a model."""

    size: Size
    fingerprint: str


_KNOWN = TypeAdapter(_Known)


def measure(
    settings: EvaluateSettings,
    window: int | None = None,
    first: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Load a model and measure what is asked for.

    If only tasks, skills or health are asked for and all is known, no model is loaded. The speed of
    a model that is read block by block, or reads fewer tokens than are timed, is left out.

    Args:
        window: tokens in a window of text in place of what the settings say; fewer if the model
            does not read so many.
        first: is told the size and the perplexities, before the rest is measured.

    Raises:
        UserError: the model, a corpus or a task cannot be read.
    """
    # First what takes less time than to load a model.
    texts = read_texts(settings.perplexity, settings)
    prepared = prepare(settings)
    asks = prepared != Prepared()
    reads, keeps = bool(texts or asks or settings.prompt), asks and settings.cache
    # With texts, both models are in memory at once.
    room = partial(settings.room, models=2 if texts and settings.against else 1)
    late, dense = Late(settings.loading(), keeps, room, reads), None
    if settings.against is not None:
        dense = Late(settings.loading(settings.against), keeps, settings.room)
    if settings.report is not None:
        check_measured(settings.report, settings.model, _known(late).size.total)
    for prompt in settings.prompt:
        check_prompt(late.loaded.model, late.loaded.tokenizer, prompt, chat=settings.chat)
    perplexities = _perplexities(texts, settings, window, late, dense) if texts else []
    size = _known(late).size
    found = Measured(
        model=late.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=perplexities,
    )
    first(found)
    if asks and dense is not None:
        late.unload()  # from here on, each is alone in memory
        late.room = settings.room
    if dense is not None:
        known = _known(dense)
        found = replace(
            found, parameters_against=known.size.total, fingerprint_against=known.fingerprint
        )
    if asks:
        found = _with_abilities(found, settings, prepared, late, dense)
    return replace(
        found,
        speed=_speed(late.loaded) if settings.speed else None,
        samples={prompt: _sample(late.loaded, prompt, settings) for prompt in settings.prompt},
    )


def _perplexities(
    texts: Sequence[EvaluationText],
    settings: EvaluateSettings,
    window: int | None,
    late: Late,
    dense: Late | None,
) -> list[PerplexityResult]:
    loaded = late.loaded
    if window is not None:
        settings = settings.but(seq_len=min(window, maximum_length(loaded.model) or window))
    beside = with_tokens_of(dense.loaded, loaded) if dense else None
    return [perplexity(loaded.model, loaded.tokenizer, text, settings, beside) for text in texts]


def _with_abilities(
    found: Measured,
    settings: EvaluateSettings,
    prepared: Prepared,
    late: Late,
    dense: Late | None,
) -> Measured:
    """Add what the models can do; each is alone in memory."""
    beside = None
    if dense is not None:
        beside = abilities(settings, prepare(settings), dense)  # a task runs once
        dense.unload()
    own, kept = abilities(settings, prepared, late), None
    if beside and beside.zero_shot and own.zero_shot:
        kept = zero_shot.kept(own.zero_shot.tasks, beside.zero_shot.tasks, beside.model)
    return replace(
        found,
        zero_shot=own.zero_shot,
        skills=own.skills,
        health=own.health,
        dense=beside,
        kept=kept,
    )


def _speed(loaded: LoadedModel) -> Speed | None:
    limit = maximum_length(loaded.model)
    if is_model_streamed(loaded.model):
        why = "its weights are read block by block; give a --memory that holds them"
    elif limit is not None and limit < PROMPT_TOKENS + NEW_TOKENS:
        why = f"it reads {limit} tokens; use llm-pruner bench with fewer"
    else:
        return measure_speed([loaded.model])[0]
    _LOG.warning("the speed of %s is not measured: %s", loaded.name, why)
    return None


def _sample(loaded: LoadedModel, prompt: str, settings: EvaluateSettings) -> str:
    return sample_continuation(
        loaded.model, loaded.tokenizer, prompt, settings.new_tokens, chat=settings.chat
    )


def measure_apart(
    settings: EvaluateSettings,
    window: int | None = None,
    first: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Do the same in a process of its own, so that models do not share memory.

    Raises UserError as ``measure``, LLMPrunerError if the process failed.
    """
    give_back()  # of a GPU, or it would be held for models that are gone
    command = new_python(f"from {__name__} import _measure_there; _measure_there()")
    answer: dict[str, Any] = {}
    asked = {"parent": os.getpid(), "settings": settings.written(), "window": window}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin:  # it ended, which its exit code tells of
                json.dump(asked, child.stdin)
            for line in child.stdout:
                answer = json.loads(line)
                if "begun" in answer:
                    first(_MEASURED.validate_python(answer.pop("begun")))
        except BaseException:
            child.kill()
            raise
    if "refused" in answer:
        raise UserError(answer["refused"])
    if "measured" not in answer:
        said = answer.get("failed", f"its process ended with {child.returncode}")
        raise LLMPrunerError(f"{settings.model} could not be measured: {said}")
    found: Measured = _MEASURED.validate_python(answer["measured"])
    return found


def _measure_there() -> None:
    """Answer ``measure_apart`` in lines: what is known first, then all or what went wrong."""
    asked = json.load(sys.stdin)
    end_with_parent(asked["parent"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    keep_large_blocks()

    def answer(what: str, found: object) -> None:
        print(json.dumps({what: found}), file=answers, flush=True)

    try:
        settings = EvaluateSettings(**asked["settings"])
        begun = partial(answer, "begun")
        found = measure(settings, asked["window"], lambda one: begun(asdict(one)))
        answer("measured", asdict(found))
    except Exception as error:  # also a library's, which says what the parent is to say
        ours = isinstance(error, LLMPrunerError)
        said = str(error) if ours else f"{type(error).__name__}: {error}"
        answer("refused" if isinstance(error, UserError) else "failed", said)


def _known(late: Late) -> _Known:
    """Return what tells of a model; if it is not loaded, from an earlier run if there was one."""
    key = late.key(what="size and fingerprint")
    known: _Known | None = None if late.is_loaded else stored(_KNOWN, key)
    if known is None:
        known = _Known(model_size(late.loaded.model), late.loaded.fingerprint)
        if key is not None:
            result_cache.write(key, asdict(known))
    return known


def read_texts(sources: Sequence[str], settings: PerplexitySettings) -> list[EvaluationText]:
    """Return the corpora; UserError if one cannot be read."""

    def read(source: str, text_field: str | None) -> EvaluationText:
        return load_evaluation_text(source, settings.but(text_field=text_field))

    return [*read_each(read, sources, settings.text_field).values()]
