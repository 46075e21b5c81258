"""Zero-shot tasks of a model: from local records or the harness's data, kept from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from llm_pruner.checkpoints import atomic_directory
from llm_pruner.data.files import read_task
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.zero_shot import (
    READER,
    READER_SOURCE,
    Mean,
    MetricResult,
    PreparedTask,
    TaskResult,
    TaskRunner,
    definition_text,
    harness_version,
    means,
    prepare,
    require_harness,
)
from llm_pruner.files.outputs import check_output
from llm_pruner.models.load import LoadedModel
from llm_pruner.settings.common import TaskSettings
from llm_pruner.settings.evaluate import EvaluateSettings
from llm_pruner.settings.limits import MOST, check_number
from llm_pruner.settings.words import LOCAL_TASKS
from llm_pruner.version import __version__


@dataclass(frozen=True)
class ZeroShot:
    """Results of all tasks with what a reader needs to compare them.

    Attributes:
        tasks: one for each task, and for each group with a result of its own.
        mean: over the paper's seven tasks, or None if one is missing.
        mean_without_boolq: over the other six, or None if one is missing.
        cached: names of the tasks whose results were there from an earlier run.
        data: ``local`` or ``harness``.
        limit: largest number of documents of a task, or None for all.
        dtype: as it was asked for.
        versions: of the packages that a result depends on.
    """

    tasks: list[TaskResult]
    mean: Mean | None
    mean_without_boolq: Mean | None
    cached: list[str]
    data: str
    limit: int | None
    dtype: str
    versions: dict[str, str]


def check(settings: TaskSettings) -> None:
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
    check(settings)
    records = {
        task: None if settings.tasks_data is None else read_task(settings.tasks_data, task)
        for task in settings.tasks or ()
    }
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
    versions = {
        "lm_eval": harness_version(),
        "llm_pruner": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers_version,
    }
    runner: TaskRunner | None = None
    results: list[TaskResult] = []
    cached = []
    for task in tasks:
        name = None
        if identity is not None:
            name = result_cache.key(
                identity, settings, task=task.identity, lm_eval=versions["lm_eval"]
            )
            kept = _from_json(result_cache.read(name))
            if kept is not None:
                results += kept
                cached.append(task.name)
                continue
        if runner is None:
            loaded = load()
            runner = TaskRunner(loaded.model, loaded.tokenizer, settings.sequences)
        found = runner.run(task, settings.limit)
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


def _from_json(data: dict[str, Any] | None) -> list[TaskResult] | None:
    """Return stored results; None if they cannot be used."""
    try:
        return [
            TaskResult(
                **{
                    **result,
                    "metrics": {
                        name: MetricResult(**metric) for name, metric in result["metrics"].items()
                    },
                }
            )
            for result in (data or {})["results"]
        ]
    except (KeyError, TypeError, AttributeError):
        return None
