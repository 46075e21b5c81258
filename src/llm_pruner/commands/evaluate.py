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
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llm_pruner.commands.abilities import Late, Prepared, abilities, prepare, stored
from llm_pruner.data.files import read_task
from llm_pruner.data.text import EvaluationText, load_evaluation_text, read_each
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.evaluation import result_cache, zero_shot
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.evaluation.samples import check_prompt, sample_continuation
from llm_pruner.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, Speed, measure_speed
from llm_pruner.files.outputs import atomic_directory, check_output
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import exceeds
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.report.records import Abilities, Measured
from llm_pruner.report.write import check_measured
from llm_pruner.runtime.memory import give_back, keep_large_blocks
from llm_pruner.runtime.processes import new_python
from llm_pruner.runtime.signals import end_with_parent
from llm_pruner.settings.evaluate import EvaluateSettings, PerplexitySettings
from llm_pruner.settings.words import LOCAL_TASKS
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
    *,
    strict: bool = True,
) -> Measured:
    """Load a model and measure what is asked for.

    With ``chat`` a model whose tokenizer has a chat template is asked the prompts as a user would.
    If only tasks, skills or health are asked for and all is known, no model is loaded.

    Args:
        window: tokens in a window of text in place of what the settings say; fewer if the model
            does not read so many.
        first: is told the size and the perplexities, before the rest is measured.
        strict: whether a speed that cannot be measured is refused; otherwise it is left out.

    Raises:
        UserError: the model, a corpus or a task cannot be read.
    """
    # First what takes less time than to load a model.
    texts = read_texts(settings.perplexity, settings)
    prepared = prepare(settings)
    asks = prepared != Prepared()
    # With texts, both models are in memory at once.
    room = partial(settings.room, models=2 if texts and settings.against else 1)
    writes = asks or bool(settings.prompt)
    reads = bool(texts) or writes
    late = Late(settings.loading(), asks and settings.cache, room, prepared.written, reads)
    if settings.report is not None:
        check_measured(settings.report, settings.model, _known(late).size.total)
    dense = None
    if settings.against is not None:
        like = settings.loading(settings.against)
        dense = Late(like, late.keeps, settings.room, late.asked)
    if (settings.speed or writes) and _is_read_often(settings, late, alone=asks and bool(dense)):
        if settings.speed and strict:
            raise _no_speed(settings)
        settings = settings.but(speed=False)
        if writes:
            _LOG.warning(
                "for each batch of a task, and each token that is written, all weights of %s are "
                "read",
                settings.model,
            )
    if settings.speed and (refused := _too_short(late)):
        if strict:
            raise refused
        settings = settings.but(speed=False)
    for prompt in settings.prompt:
        check_prompt(late.loaded.model, late.loaded.tokenizer, prompt, chat=settings.chat)
    if texts and window is not None:
        longest = maximum_length(late.loaded.model)
        settings = settings.but(seq_len=window if longest is None else min(window, longest))
    perplexities = []
    if texts:
        loaded = late.loaded
        beside = with_tokens_of(dense.loaded, loaded) if dense else None
        perplexities = [
            perplexity(loaded.model, loaded.tokenizer, text, settings, beside) for text in texts
        ]
        del beside
        del loaded
    size = _known(late).size
    begun = Measured(
        model=late.name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=perplexities,
    )
    first(begun)
    of_dense = None
    if asks and dense:
        late.unload()  # from here on, each is alone in memory
        late.room = settings.room
        of_dense = abilities(settings, prepare(settings), dense)  # a task runs once
    against = _known(dense) if dense else None
    dense = None
    if asks:
        begun = _joined(begun, abilities(settings, prepared, late), of_dense)
    return replace(
        begun,
        parameters_against=None if against is None else against.size.total,
        fingerprint_against=None if against is None else against.fingerprint,
        speed=_speed(settings, late, strict=strict) if settings.speed else None,
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


def _no_speed(settings: EvaluateSettings) -> UserError:
    return UserError(
        f"--speed would time how fast the weights of {settings.model} are read; give a --memory "
        "that holds them, or leave it out"
    )


def _too_short(late: Late) -> UserError | None:
    """Return what is said of a model that reads fewer tokens than it would be timed on."""
    limit = maximum_length(late.loaded.model)
    if limit is None or limit >= PROMPT_TOKENS + NEW_TOKENS:
        return None
    return UserError(
        f"--speed times {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS} new ones, more than the "
        f"{limit} positions of {late.name}; use llm-pruner bench with fewer, or leave it out"
    )


def _speed(settings: EvaluateSettings, late: Late, *, strict: bool) -> Speed | None:
    """Return the speed of a model in memory; None of another one, or refuse it."""
    if is_model_streamed(late.loaded.model):  # of the hub, of which no size was known before
        if strict:
            raise _no_speed(settings)
        return None
    return measure_speed([late.loaded.model])[0]


def _is_read_often(settings: EvaluateSettings, late: Late, *, alone: bool) -> bool:
    """Whether the weights are read block by block for all but texts; it may be alone by then."""
    if alone:
        return exceeds(late.settings, settings.room(settings.device))
    if settings.speed or late.is_loaded:
        return is_model_streamed(late.loaded.model)
    return exceeds(late.settings, late.room(settings.device))


def _joined(begun: Measured, found: Abilities, dense: Abilities | None) -> Measured:
    tasks, kept = found.zero_shot, None
    if dense and dense.zero_shot and tasks:
        kept = zero_shot.kept(tasks.tasks, dense.zero_shot.tasks, dense.model)
    return replace(
        begun, zero_shot=tasks, skills=found.skills, health=found.health, dense=dense, kept=kept
    )


def measure_apart(
    settings: EvaluateSettings,
    window: int | None = None,
    first: Callable[[Measured], None] = lambda _: None,
    *,
    strict: bool = True,
) -> Measured:
    """Do the same in a process of its own, so that models do not share memory.

    Raises UserError as ``measure``, LLMPrunerError if the process failed.
    """
    give_back()  # of a GPU, or it would be held for models that are gone
    command = new_python(f"from {__name__} import _measure_there; _measure_there()")
    answer: dict[str, Any] = {}
    asked = {"parent": os.getpid(), "settings": settings.written()}
    asked |= {"window": window, "strict": strict}
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
        if child.returncode < 0:
            said = (
                f"its process was ended by signal {-child.returncode}; if memory was short, use a "
                "smaller --dtype"
            )
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
        window, strict = asked["window"], asked["strict"]
        found = measure(settings, window, lambda one: begun(asdict(one)), strict=strict)
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
    """Return the corpora; raise UserError if one cannot be read, or two have one name."""

    def read(source: str, text_field: str | None) -> EvaluationText:
        return load_evaluation_text(source, settings.but(text_field=text_field))

    texts = [*read_each(read, sources, settings.text_field).values()]
    names = [text[:2] for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two texts are called {twice[0][0]}, by which results are told apart; rename one"
        )
    return texts


def write_task_files(
    out: Path, data: Path, tasks: tuple[str, ...] = LOCAL_TASKS, *, overwrite: bool = False
) -> list[Path]:
    """Write a folder that ``lm_eval --include_path`` reads; it holds the records and can be moved.

    Raises UserError: the harness is missing, the data is not sound, or ``out`` is taken.
    """
    check_output(out, overwrite, [data])
    zero_shot.require_harness()
    records = {task: read_task(data, task) for task in tasks}
    with atomic_directory(out, overwrite) as folder:
        files = {f"{zero_shot.READER}.py": zero_shot.READER_SOURCE}
        for task, found in records.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found)
            files[f"{task}.jsonl"] = "".join(lines)
            files[f"{task}.yaml"] = zero_shot.definition_text(task, f"{task}.jsonl")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [out / f"{task}.yaml" for task in tasks]
