"""Measure a model: perplexity, zero-shot tasks, speed, samples; here or in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import __version__ as transformers_version

from llm_pruner.checkpoints import atomic_directory
from llm_pruner.data.files import read_task
from llm_pruner.data.text import EvaluationText, load_evaluation_text
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import PerplexityResult, perplexity
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.speed import measure_speed
from llm_pruner.evaluation.zero_shot import (
    READER,
    READER_SOURCE,
    TaskResult,
    definition_text,
    means,
    require_harness,
)
from llm_pruner.files.outputs import check_output
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.report.records import Measured, ZeroShot
from llm_pruner.runtime.memory import keep_large_blocks
from llm_pruner.runtime.signals import end_with_parent
from llm_pruner.settings.common import ModelSettings, TaskSettings
from llm_pruner.settings.evaluate import EvaluateSettings, PerplexitySettings
from llm_pruner.settings.limits import MOST, check_number
from llm_pruner.settings.words import LOCAL_TASKS
from llm_pruner.types import Size
from llm_pruner.version import __version__

if TYPE_CHECKING:
    from llm_pruner.evaluation.harness import PreparedTask

_RESULTS = TypeAdapter(list[TaskResult])
_SIZE = TypeAdapter(Size)
_MEASURED = TypeAdapter(Measured)


def measure(
    settings: EvaluateSettings,
    window: int | None = None,
    first: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Load a model and measure what is asked for.

    With ``chat`` a model whose tokenizer has a chat template is asked the prompts as a user would.
    If only zero-shot tasks are asked for and all their results are known, no model is loaded.

    Args:
        settings: what to measure.
        window: tokens in a window of text in place of what the settings say; fewer if the model
            does not read so many.
        first: is told the size and the perplexities, before the rest is measured.

    Raises:
        UserError: the model, a corpus or a task cannot be read.
    """
    # First what takes less time than to load a model.
    texts = read_texts(settings.perplexity, settings)
    tasks = prepare_tasks(settings) if settings.tasks is not None else []
    late = _Late(settings.loading())
    if texts and window is not None:
        longest = maximum_length(late.loaded.model)
        settings = settings.but(seq_len=window if longest is None else min(window, longest))
    perplexities = measure_perplexities(late.loaded, texts, settings) if texts else []
    asks, identity = settings.tasks is not None, None
    if asks and settings.cache:
        identity = result_cache.identify(late.settings)
    name, size = _name_and_size(late, identity)
    begun = Measured(
        model=name,
        parameters=size.total,
        parameters_embedding=size.embedding,
        parameters_blocks=size.blocks,
        perplexity=perplexities,
        zero_shot=None,
        speed=None,
        samples={},
    )
    first(begun)
    return replace(
        begun,
        zero_shot=run_tasks(tasks, settings, identity, lambda: late.loaded) if asks else None,
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


def measure_apart(
    settings: EvaluateSettings,
    window: int | None = None,
    first: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Do the same in a process of its own, so that models do not share memory.

    Raises:
        UserError: as ``measure``.
        LLMPrunerError: the process failed.
    """
    command = [sys.executable, "-c", f"from {__name__} import _measure_there; _measure_there()"]
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
        found = measure(settings, asked["window"], lambda begun: answer("begun", asdict(begun)))
        answer("measured", asdict(found))
    except UserError as error:
        answer("refused", str(error))
    except LLMPrunerError as error:
        answer("failed", str(error))
    except Exception as error:  # a library's, which says what the parent is to say
        answer("failed", f"{type(error).__name__}: {error}")


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
        known = _stored(_SIZE, None if late.is_loaded else result_cache.read(key))
        if known is not None:
            return identity.name, known
    size = model_size(late.loaded.model)
    if key is not None:
        result_cache.write(key, asdict(size))
    return late.loaded.name, size


def _stored(kind: TypeAdapter[Any], data: Any) -> Any:
    """Return what an earlier run stored; None if there is nothing that can be used."""
    try:
        return kind.validate_python(data)
    except ValidationError:
        return None


# ------------------------------------------------------------------------------------- perplexity


def read_texts(sources: Sequence[str], settings: PerplexitySettings) -> list[EvaluationText]:
    """Return the corpora.

    Raises:
        UserError: a corpus cannot be read.
    """
    return [load_evaluation_text(source, settings) for source in sources]


def measure_perplexities(
    loaded: LoadedModel, texts: Sequence[EvaluationText], settings: PerplexitySettings
) -> list[PerplexityResult]:
    """Return the perplexity on each text."""
    return [perplexity(loaded.model, loaded.tokenizer, text, settings) for text in texts]


# ---------------------------------------------------------------------------------- zero-shot tasks


def check_tasks(settings: TaskSettings) -> None:
    """Raise UserError for what can be refused without reading anything."""
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"limit={settings.limit} leaves no documents; use 1 or more")
    check_number("--limit", settings.limit, 1, MOST)
    tasks = settings.tasks or ()
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise UserError(f"task {twice[0]} is named twice; name it once")
    if not all(tasks):
        raise UserError("--tasks has an empty name; write such as boolq,piqa")
    require_harness()


def prepare_tasks(settings: TaskSettings) -> list[PreparedTask]:
    """Return the tasks with their documents; nothing of it needs the model.

    Raises:
        UserError: the settings are wrong, a task is unknown, or its data cannot be read.
    """
    check_tasks(settings)
    records = {
        task: None if settings.tasks_data is None else read_task(settings.tasks_data, task)
        for task in settings.tasks or ()
    }
    from llm_pruner.evaluation.harness import prepare  # imports the harness, which takes seconds

    return [prepare(task, found, settings.limit) for task, found in records.items()]


def run_tasks(
    tasks: list[PreparedTask],
    settings: EvaluateSettings,
    identity: result_cache.ModelIdentity | None,
    load: Callable[[], LoadedModel],
) -> ZeroShot:
    """Run the tasks that no earlier run has a result of; each is kept as soon as it is there.

    Args:
        tasks: what ``prepare_tasks`` returned.
        settings: how they are run.
        identity: of the model; None to read and keep nothing.
        load: returns the model; called only if a task has to be run.
    """
    from llm_pruner.evaluation.harness import LoadedLM, run

    versions = {
        "lm_eval": version("lm-eval"),
        "llm_pruner": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers_version,
    }
    lm: LoadedLM | None = None
    results: list[TaskResult] = []
    cached = []
    for task in tasks:
        name = None
        if identity is not None:
            name = result_cache.key(
                identity, settings, task=task.identity, lm_eval=versions["lm_eval"]
            )
            kept = _stored(_RESULTS, (result_cache.read(name) or {}).get("results"))
            if kept is not None:
                results += kept
                cached.append(task.name)
                continue
        if lm is None:
            loaded = load()
            lm = LoadedLM(loaded.model, loaded.tokenizer, settings.sequences)
        found = run(lm, task, settings.limit)
        results += found
        if name is not None:
            result_cache.write(name, {"results": [asdict(result) for result in found]})
    mean, without = means(results)
    return ZeroShot(
        tasks=results,
        mean=mean,
        mean_without_boolq=without,
        cached=cached,
        data="harness" if settings.tasks_data is None else "local",
        limit=settings.limit,
        dtype=settings.dtype,
        versions=versions,
    )


def write_task_files(
    out: Path, data: Path, tasks: tuple[str, ...] = LOCAL_TASKS, *, overwrite: bool = False
) -> list[Path]:
    """Write a folder that ``lm_eval --include_path`` reads; it holds the records and can be moved.

    Raises:
        UserError: the harness is missing, the data is not sound, or ``out`` is taken.
    """
    check_output(out, overwrite, [data])
    require_harness()
    records = {task: read_task(data, task) for task in tasks}
    with atomic_directory(out, overwrite) as folder:
        for task, found in records.items():
            lines = "".join(f"{_line(record)}\n" for record in found)
            _write(folder / f"{task}.jsonl", lines)
            _write(folder / f"{task}.yaml", definition_text(task, f"{task}.jsonl"))
        _write(folder / f"{READER}.py", READER_SOURCE)
    return [out / f"{task}.yaml" for task in tasks]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
