"""The bridge to lm-evaluation-harness: a loaded model as it wants one, tasks, and silence."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stderr
from functools import cache
from typing import Any, TextIO

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llm_pruner.errors import UserError, in_short
from llm_pruner.evaluation.likelihood import log_likelihoods, truncated
from llm_pruner.evaluation.zero_shot import definition_file
from llm_pruner.runtime.progress import quiet as silenced
from llm_pruner.settings.options import near

Tasks = dict[str, Any]
"""What the harness's task manager returns: ``tasks`` by name, ``groups``, ``group_map``."""

_GENERATION_BATCH = 8


class LoadedLM(HFLM):
    """A loaded model for the harness; scores answers with ``likelihood.log_likelihoods``."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        # The harness may give the tokenizer a padding token.
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size or _GENERATION_BATCH,
        )
        self.sequences = batch_size
        self.terminal: TextIO = sys.stderr
        self.title = ""
        self.truncated = 0

    def loglikelihood(
        self,
        requests: list[Any],
        disable_tqdm: bool = True,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        """Score answers under this package's own progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

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
        """Generate, with the harness's progress bar if there is a terminal."""
        with redirect_stderr(self.terminal):
            silent = disable_tqdm or not self.terminal.isatty()
            return super().generate_until(requests, disable_tqdm=silent)


@cache
def all_tasks() -> TaskManager:
    """Return the index of all tasks of the harness, which takes ten seconds to build."""
    return TaskManager()


def load_named(name: str) -> Tasks:
    """Return a task, group or tag of the harness, its dataset fetched.

    Raises:
        UserError: the harness has no such task, or its data cannot be had.
    """
    with quiet():
        file = definition_file(name)
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
            return _usable(name, manager.load([spec]))
        except UserError:
            raise
        except Exception as error:  # tasks run code of their own and fetch data
            offline = "or give --tasks-data" if file is not None else "and what the task needs"
            raise UserError(
                f"task {name} cannot be prepared ({in_short(error)}); check the connection "
                f"{offline}"
            ) from error


def load_defined(definition: dict[str, Any]) -> Tasks:
    """Return the task that a definition makes."""
    with quiet():
        return TaskManager(include_defaults=False).load([definition])


def run(lm: LoadedLM, tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """Return the harness's results for these tasks, as its own command line computes them.

    Args:
        lm: the model.
        tasks: what one of the loaders returned; used up by this.
        limit: take only this many documents of each task.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    lm.terminal = sys.stderr
    with quiet():
        return evaluator.evaluate(lm, tasks, limit=limit, log_samples=False)


def quiet() -> AbstractContextManager[None]:
    """Hold back what the harness and what it calls print, log and warn about."""
    return silenced("lm_eval", "transformers", "datasets", stdout=True, stderr=True)


def _usable(name: str, tasks: Tasks) -> Tasks:
    for each in tasks["tasks"].values():
        if getattr(each, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs code that the model writes, which this command never does; "
                "use lm_eval itself in a sandbox"
            )
        if getattr(each, "MULTIMODAL", False):
            raise UserError(f"task {name} needs images or sound; name a task of text")
    return tasks
