"""Runs tasks of lm-evaluation-harness on a loaded model; importing it imports the harness."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any, TextIO

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llm_pruner.errors import UserError, in_short
from llm_pruner.evaluation import zero_shot
from llm_pruner.evaluation.answers import sees_padding
from llm_pruner.evaluation.likelihood import log_likelihoods, truncated
from llm_pruner.runtime.progress import quiet as silenced
from llm_pruner.settings.options import near

_GENERATION_BATCH = 8


@dataclass(frozen=True)
class PreparedTask:
    """A task with its documents, before it is run."""

    name: str
    tasks: dict[str, Any]
    documents: dict[str, str]
    identity: str


class LoadedLM(HFLM):
    """A loaded model for the harness; ``batch_size`` None keeps batches of sequences small."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        # The harness may give the tokenizer a padding token.
        own, size = copy.deepcopy(tokenizer), batch_size or _GENERATION_BATCH
        with quiet(), _untied(model):
            super().__init__(pretrained=model, tokenizer=own, batch_size=size)
        self.sequences = batch_size
        self.terminal: TextIO = sys.stderr
        self.title = ""
        self.truncated = 0

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = [(context, answer) for _, context, answer in requests]
        self.truncated += truncated(pairs, self.max_length)
        with redirect_stderr(self.terminal):
            return log_likelihoods(
                self.model,
                pairs,
                max_length=self.max_length,
                batch_size=self.sequences,
                description=self.title,
            )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate; a recurrent model that reads padding gets one prompt at a time."""
        token = next(iter(self.tok_encode("a")), 0)
        rows = [[token], [token] * 8]
        if sees_padding(self.model, rows, self.tokenizer.pad_token_id):
            self.batch_size_per_gpu = 1
        with redirect_stderr(self.terminal):
            silent = disable_tqdm or not self.terminal.isatty()
            try:
                return super().generate_until(requests, disable_tqdm=silent)
            except AssertionError as error:  # such as longer answers than the model reads
                raise UserError(
                    f"{self.title} cannot be run ({in_short(error)}); leave this task out"
                ) from error

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **how: Any
    ) -> Any:
        """Encode prompts, as the harness does, and count those that lose their start."""
        if left_truncate_len:
            lengths = [len(self.tok_encode(one)) for one in strings]
            self.truncated += sum(length > left_truncate_len for length in lengths)
        return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **how)


@contextmanager
def _untied(model: Any) -> Iterator[None]:
    """Leave the weights to the checkpoint: its head may differ from an embedding it is tied to."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


@cache
def all_tasks() -> TaskManager:
    """Return the index of all tasks of the harness, which takes ten seconds to build."""
    return TaskManager()


def prepare(
    name: str, records: Sequence[Mapping[str, Any]] | None, limit: int | None
) -> PreparedTask:
    """Return a task, group or tag of the harness, on these records or on its own dataset.

    Raises UserError if it has none, LLMPrunerError if it does not define it where it used to.
    """
    with quiet():
        if records is None:
            tasks = _named(name)
        else:
            definition = zero_shot.local_definition(name, records)
            tasks = TaskManager(include_defaults=False).load([definition])
        documents = {
            each: _hash([*islice(task.eval_docs, limit)]) for each, task in tasks["tasks"].items()
        }
        return PreparedTask(name, tasks, documents, _identity(tasks, documents, limit))


def _named(name: str) -> dict[str, Any]:
    file = zero_shot.definition_file(name)
    if file is not None:
        manager, spec = TaskManager(include_defaults=False), str(file)
    else:
        manager, spec = all_tasks(), name
        if name not in manager.task_index:
            raise UserError(
                f"lm-evaluation-harness has no task {name!r}; {near(name, manager.all_tasks)}"
                "'lm_eval ls tasks' lists all"
            )
    try:
        tasks: dict[str, Any] = manager.load([spec])
    except Exception as error:  # tasks run code of their own and fetch data
        offline = "or give tasks_data" if file is not None else "and what the task needs"
        raise UserError(
            f"task {name} cannot be prepared ({in_short(error)}); check the connection {offline}"
        ) from error
    for each in tasks["tasks"].values():
        if getattr(each, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs code that the model writes, which this command never does; "
                "use lm_eval itself in a sandbox"
            )
    return tasks


def _identity(tasks: dict[str, Any], documents: dict[str, str], limit: int | None) -> str:
    data = {"metadata", "custom_dataset", "dataset_kwargs"}
    parts: list[Any] = [limit, tasks.get("group_map")]
    for name, task in sorted(tasks["tasks"].items()):
        definition = {key: said for key, said in task.dump_config().items() if key not in data}
        parts.append([name, str(task.VERSION), definition, documents[name]])
    return _hash(parts)


def _hash(parts: list[Any]) -> str:
    text = json.dumps(parts, sort_keys=True, default=_stable)
    return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: Any) -> str:
    """Return a text that says the same in the next process, which an address does not."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return str(value)


def run(lm: LoadedLM, task: PreparedTask, limit: int | None) -> list[zero_shot.TaskResult]:
    """Return the results of a task, or of its group, as the harness's command line does; once."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for each in task.tasks["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    lm.terminal, lm.title, lm.truncated = sys.stderr, task.name, 0
    known = not zero_shot.PAPER_METRICS.keys().isdisjoint(task.tasks["tasks"])
    with quiet():
        found = evaluator.evaluate(lm, task.tasks, limit=limit, log_samples=known)
    # Of several they are counted together, and told of the group or, of a tag, of its first task.
    names = [*found["results"]]
    of = task.name if task.name in names else names[0]
    return [
        replace(
            _result(name, found, lm.truncated if name == of else 0),
            digest=_hash([task.documents[each] for each in sorted(_members(name, found))])[:16],
        )
        for name in names
    ]


def _result(name: str, found: dict[str, Any], truncated: int) -> zero_shot.TaskResult:
    values = found["results"][name]
    better = found["higher_is_better"].get(name) or {}
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else key] = zero_shot.MetricResult(
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            better.get(metric),
        )
    counts = [found["n-samples"][each] for each in sorted(_members(name, found))]
    return zero_shot.TaskResult(
        task=name,
        metrics=metrics,
        paper_metric=zero_shot.PAPER_METRICS.get(name),
        documents=sum(count["effective"] for count in counts),
        documents_total=sum(count["original"] for count in counts),
        num_fewshot=found["n-shot"].get(name) or 0,
        version=str(found["versions"].get(name)),
        truncated=truncated,
        right=_right(name, found),
    )


def _right(name: str, found: dict[str, Any]) -> str | None:
    metric = zero_shot.PAPER_METRICS.get(name)
    if metric is None:
        return None
    answers = sorted(found["samples"][name], key=lambda one: one["doc_id"])
    return "".join(str(int(one[metric])) for one in answers)


def _members(name: str, found: dict[str, Any]) -> set[str]:
    if name in found["n-samples"]:
        return {name}
    return {one for part in found["group_subtasks"][name] for one in _members(part, found)}


def quiet() -> AbstractContextManager[None]:
    """Hold back what the harness and what it calls print, log and warn about."""
    return silenced("lm_eval", "transformers", "datasets", stdout=True, stderr=True)
