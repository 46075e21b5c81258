"""Zero-shot tasks as the installed lm-evaluation-harness defines them, and their mean.

Nothing of a definition is written here: prompts, answers and metrics come from the harness's own
files, so they are those of whatever version is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llm_pruner.errors import LLMPrunerError, UserError

_TASKS = {
    "boolq": ("acc", "super_glue/boolq/default.yaml"),
    "piqa": ("acc", "piqa/piqa.yaml"),
    "hellaswag": ("acc_norm", "hellaswag/hellaswag.yaml"),
    "winogrande": ("acc", "winogrande/default.yaml"),
    "arc_easy": ("acc", "arc/arc_easy.yaml"),
    "arc_challenge": ("acc_norm", "arc/arc_challenge.yaml"),
    "openbookqa": ("acc_norm", "openbookqa/openbookqa.yaml"),
}
"""The seven tasks of LLM-Pruner (arXiv 2305.11627): the metric that reproduces its tables, and the
harness's file, because its index of all tasks takes ten seconds to build."""

PAPER_METRICS = {task: metric for task, (metric, _) in _TASKS.items()}
CHANCE = dict.fromkeys(_TASKS, 0.25) | dict.fromkeys(("boolq", "piqa", "winogrande"), 0.5)
"""Accuracy of guessing; a few items of ARC have three answers or five."""

_FILES = {task: file for task, (_, file) in _TASKS.items()} | {"gsm8k_cot": "gsm8k/gsm8k-cot.yaml"}

_DATA = ("dataset_path", "dataset_name", "dataset_kwargs", "tag")
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")

READER = "offline_data"
"""Name of the module that is written beside task files."""

READER_SOURCE = '''\
"""Reads the records beside this file; written by llm-pruner."""

import json
from pathlib import Path

import datasets


def load(local_file, local_split, **_):
    """Return the records of a file as the only split."""
    path = Path(__file__).parent / local_file
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return {local_split: datasets.Dataset.from_list(records)}
'''


def require_harness() -> None:
    """Raise UserError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "zero-shot tasks are run by lm-evaluation-harness, which is not installed; "
            "run: pip install 'llm-pruner[eval]'"
        )


def definition_file(task: str) -> Path | None:
    """Return the harness's file that defines one of the tasks known here; None for any other."""
    if task not in _FILES:
        return None
    file = _tasks_folder() / _FILES[task]
    return file if file.is_file() else None


def local_definition(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the harness's definition of a task for these records; LLMPrunerError if it moved."""
    from datasets import Dataset

    definition, split = _without_data(task, resolve=True)

    def load(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list([dict(record) for record in records])}

    return definition | {"custom_dataset": load}


def definition_text(task: str, records_file: str) -> str:
    """Return the same as YAML, which reads ``records_file`` beside it with ``READER``."""
    definition, split = _without_data(task, resolve=False)
    definition["custom_dataset"] = _Function(f"{READER}.load")
    definition["dataset_kwargs"] = {"local_file": records_file, "local_split": split}
    return yaml.safe_dump(definition, sort_keys=False, allow_unicode=True, width=100)


def _without_data(task: str, *, resolve: bool) -> tuple[dict[str, Any], str]:
    """Return a definition without its dataset, and the name of the split that is evaluated."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file = definition_file(task)
    if file is None:
        raise LLMPrunerError(
            f"the installed lm-eval has no {_FILES[task]}, which defines {task}; "
            "install the version that llm-pruner asks for: pip install 'llm-pruner[eval]'"
        )
    definition = load_yaml(file, resolve_func=resolve)
    split = definition.get("test_split") or definition["validation_split"]
    kept = {key: value for key, value in definition.items() if key not in (*_DATA, *_SPLITS)}
    kept["test_split" if definition.get("test_split") else "validation_split"] = split
    if not resolve:
        kept = {key: _as_function(value) for key, value in kept.items()}
    return kept, split


class _Function(str):
    """A dotted name that YAML marks with ``!function``."""

    __slots__ = ()


yaml.SafeDumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


def _as_function(value: Any) -> Any:
    """Turn a path into the harness, which its loader makes of ``!function``, into a module name."""
    folder = f"{_tasks_folder()}/"
    if isinstance(value, str) and value.startswith(folder):
        return _Function("lm_eval.tasks." + value.removeprefix(folder).replace("/", "."))
    return value


def _tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-evaluation-harness is not installed")
    return Path(spec.origin).parent / "tasks"


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        value: as the harness computes it; a share between 0 and 1 for ``acc`` and ``acc_norm``.
        stderr: standard error over documents; None where the harness gives none.
        higher_is_better: None where the harness does not say.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """Results of a task, or of a group of tasks under the group's name.

    Attributes:
        metrics: by name; one that belongs to a filter is named ``metric,filter``.
        paper_metric: the one that LLM-Pruner reports, or None.
        documents_total: number that the task has.
        truncated: answers that were too long for the model with their text, which lost its start.
        right: whether each document was answered right by ``paper_metric``, in their order, as 0
            and 1; None without that metric, and of results of earlier versions.
    """

    task: str
    metrics: dict[str, MetricResult]
    paper_metric: str | None
    documents: int
    documents_total: int
    num_fewshot: int
    version: str
    truncated: int
    digest: str | None = None
    right: str | None = None


@dataclass(frozen=True)
class Mean:
    """The mean over tasks, each by the metric that the paper reports.

    Attributes:
        value: (1/n) sum of the tasks' values.
        stderr: (1/n) sqrt(sum of squared standard errors); tasks are independent.
    """

    value: float
    stderr: float | None
    metrics: dict[str, str]


def means(results: Sequence[TaskResult]) -> tuple[Mean | None, Mean | None]:
    """Return the mean over the paper's seven tasks, and over the six without BoolQ.

    BoolQ is often left out, since its majority answer is right in 62% of cases. A mean is None
    unless all its tasks are there.
    """
    by_name = {result.task: result.metrics for result in results}

    def mean(metrics: dict[str, str]) -> Mean | None:
        if not metrics.keys() <= by_name.keys():
            return None
        chosen = [by_name[task][metric] for task, metric in metrics.items()]
        errors = [each.stderr for each in chosen if each.stderr is not None]
        stderr = math.hypot(*errors) / len(chosen) if len(errors) == len(chosen) else None
        return Mean(sum(each.value for each in chosen) / len(chosen), stderr, metrics)

    without = {task: metric for task, metric in PAPER_METRICS.items() if task != "boolq"}
    return mean(PAPER_METRICS), mean(without)


@dataclass(frozen=True)
class Kept:
    """What a model keeps of the dense model's accuracy above chance.

    Attributes:
        against: name of the dense model.
        tasks: task -> (a - chance) / (d - chance), for accuracies a and d by the paper's metric;
            None where the dense model is no better than chance.
        value: r, the same of the means over these tasks; None likewise.
        stderr: its standard error, that of the mean of a - r d over the documents, by the mean of
            d - chance; a and d taken as independent where answers to the same documents are not
            known, which is more. None where an error is unknown.
        flips: share of documents that one of both answers right and the other wrong, the mean over
            the tasks (arXiv 2407.09141); None where answers to the same documents are not known.
        flips_stderr: its standard error.
    """

    against: str
    tasks: dict[str, float | None]
    value: float | None
    stderr: float | None
    flips: float | None = None
    flips_stderr: float | None = None


def kept(model: Sequence[TaskResult], dense: Sequence[TaskResult], against: str) -> Kept | None:
    """Return what is kept on those of the paper's tasks that both were put to; None without any."""
    known = {one.task: one for one in dense if one.paper_metric}
    pairs = {
        one.task: (one, known[one.task])
        for one in model
        if one.task in CHANCE and one.paper_metric and one.task in known
    }
    if not pairs:
        return None
    above = {
        task: [_measured(one).value - CHANCE[task] for one in pair] for task, pair in pairs.items()
    }
    whole = sum(of for _, of in above.values())
    value = _quotient(sum(part for part, _ in above.values()), whole)
    errors = [] if value is None else [_difference_error(*each, value) for each in pairs.values()]
    answers = [both for each in pairs.values() if (both := _both_right(*each)) is not None]
    flips = [own != other for own, other in answers] if len(answers) == len(pairs) else []
    return Kept(
        against=against,
        tasks={task: _quotient(*each) for task, each in above.items()},
        value=value,
        stderr=None if not errors or None in errors else math.hypot(*filter(None, errors)) / whole,
        flips=float(np.mean([one.mean() for one in flips])) if flips else None,
        flips_stderr=math.hypot(*map(_mean_error, flips)) / len(flips) if flips else None,
    )


def _measured(result: TaskResult) -> MetricResult:
    return result.metrics[str(result.paper_metric)]


def _both_right(model: TaskResult, dense: TaskResult) -> np.ndarray | None:
    """Return which documents each of two answers right, (2, documents); None if not of the same."""
    rows = (model.right, dense.right)
    if None in rows or model.digest != dense.digest or model.paper_metric != dense.paper_metric:
        return None
    both = [np.array([*map(int, str(row))], dtype=float) for row in rows]
    return np.stack(both) if both[0].shape == both[1].shape and len(both[0]) > 1 else None


def _difference_error(model: TaskResult, dense: TaskResult, share: float) -> float | None:
    """Return the standard error of a - share d, for the accuracies a and d of two models."""
    both = _both_right(model, dense)
    if both is not None:
        return _mean_error(both[0] - share * both[1])
    a, d = (_measured(one).stderr for one in (model, dense))
    return None if a is None or d is None else math.hypot(a, share * d)


def _mean_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _quotient(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
