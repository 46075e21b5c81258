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
    from lm_eval.tasks._yaml_loader import load_yaml

    file = definition_file(task)
    if file is None:
        raise LLMPrunerError(
            f"the installed lm-eval has no {_FILES[task]}, which defines {task}; "
            "install the version that llm-pruner asks for: pip install 'llm-pruner[eval]'"
        )
    whole = load_yaml(file, resolve_func=True)
    kind = "test_split" if whole.get("test_split") else "validation_split"
    split = whole[kind]
    own = {key: value for key, value in whole.items() if key not in (*_DATA, *_SPLITS)}

    def load(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list([dict(record) for record in records])}

    return own | {kind: split, "custom_dataset": load}


def _tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """Results of a task, or of a group of tasks under the group's name."""

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
        tasks: task -> (a - chance) / (d - chance), for accuracies a and d by the paper's metric;
            None where the dense model is no better than chance.
        flips: share of documents that one of both answers right and the other wrong, the mean over
            the tasks (arXiv 2407.09141); None likewise.
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

    def quotient(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    above = {
        task: [one.metrics[str(one.paper_metric)].value - CHANCE[task] for one in pair]
        for task, pair in pairs.items()
    }
    whole = sum(of for _, of in above.values())
    value = quotient(sum(part for part, _ in above.values()), whole)
    answers = [_both_right(*pair) for pair in pairs.values()]
    rows = [both for both in answers if both is not None]
    told = len(rows) == len(pairs)
    flips = [own != other for own, other in rows] if told else []
    ratios = [own - value * other for own, other in rows] if told and value is not None else []
    return Kept(
        against=against,
        tasks={task: quotient(*each) for task, each in above.items()},
        value=value,
        stderr=math.hypot(*map(_mean_error, ratios)) / whole if ratios else None,
        flips=float(np.mean([one.mean() for one in flips])) if flips else None,
        flips_stderr=math.hypot(*map(_mean_error, flips)) / len(flips) if flips else None,
    )


def _both_right(model: TaskResult, dense: TaskResult) -> np.ndarray | None:
    """Return which documents each of two answers right, (2, documents); None if not of the same."""
    if model.right is None or dense.right is None or model.digest != dense.digest:
        return None
    both = np.array([[*map(int, row)] for row in (model.right, dense.right)], dtype=np.float64)
    return both if both.shape[1] > 1 else None


def _mean_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
