"""Runs of streamed models in step, so that a block's weights are read once for all of them.

Every run is a thread of its own, since PyTorch keeps modes, gradients and autocast by thread. One
goes at a time. Before a block it waits until no other has an earlier block before it; then the
weights are read, and all that wait run the block in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from threading import Condition, Thread
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import nn

from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.streaming import before_turn, is_model_streamed, turn
from llm_pruner.runtime.progress import track

T = TypeVar("T")

Job: TypeAlias = Callable[[nn.Module], T]

Outcome: TypeAlias = T | BaseException
"""What a job returned, or raised."""


TOGETHER = 256
"""Runs of a streamed model in step at most, each of which holds hidden states of its own."""

_ROOM = 2**29
"""Bytes that they may hold together."""

_MODULES = 2_500_000
"""Bytes of a copy of a model without its weights."""


@dataclass(frozen=True)
class Side(Generic[T]):
    """A streamed model and its jobs; ``around`` is made anew whenever they go."""

    model: nn.Module
    jobs: Sequence[Job[T]]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def runs_in_step(model: nn.Module, tokens: int) -> int:
    """Return how many runs on so many tokens go in step, by hidden states and buffers of each."""
    whole: Any = model
    states = 4 * tokens * whole.get_input_embeddings().weight.shape[1]
    buffers = sum(one.nbytes for one in model.buffers())
    return max(1, min(TOGETHER, _ROOM // (states + buffers + _MODULES)))


def in_step(model: nn.Module, jobs: Sequence[Job[T]], label: str) -> Iterator[Outcome[T]]:
    """Yield the outcome of each job, which is given a model to run; a full GPU raises.

    Jobs on a streamed model run in step, each in a thread with a copy, since a run changes the
    mode, hooks and buffers of its model. Any other model runs when the outcome is asked for.
    """
    if is_model_streamed(model):
        yield from together([Side(model, jobs)], label)
        return
    for job in jobs:
        try:
            yield job(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            yield error


def result_of(outcome: Outcome[T]) -> T:
    """Return what a job returned, or raise what it raised."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class _Stopped(BaseException):
    """Ends a run that nobody waits for any more."""


class _Run(Thread, Generic[T]):
    """A job in a thread that goes when it is told to, as far as its next block.

    Attributes:
        block, number: what it waits for, and its place among the blocks; None if for nothing.
        done: whether it has come to its end.
        outcome: what the job returned or raised.
    """

    def __init__(self, job: Callable[[], T], side: Side[T]) -> None:
        super().__init__(daemon=True)
        self.side = side
        self.block: nn.Module | None = None
        self.number = 0
        self.done = False
        self.outcome: Outcome[T] = _Stopped()
        self._job = job
        self._changed = Condition()
        self._goes = self._stopped = False
        self._autocast = [
            torch.autocast(kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        self.start()

    def go_on(self) -> None:
        """Let it go as far as its next block, or its end; return when it is there."""
        try:
            self._set(True)
            self._wait(False)
        finally:
            # Interrupted here, it still works with weights that must not be taken away.
            self._wait(False)

    def stop(self) -> None:
        """End it where it is."""
        self._stopped = True
        while not self.done:  # interrupted in `go_on`, it may yet come to a block
            self.go_on()
        self.join()

    def run(self) -> None:
        """Do the job, in the thread."""
        self._wait(True)
        before_turn.set(self._pause)
        try:
            with ExitStack() as stack:
                for context in self._autocast:
                    stack.enter_context(context)
                if not self._stopped:
                    self.outcome = self._job()
        except BaseException as error:
            self.outcome = error
        self.block, self.done = None, True
        self._set(False)

    def _pause(self, block: nn.Module, number: int) -> None:
        self.block, self.number = block, number
        self._set(False)
        self._wait(True)
        if self._stopped:
            raise _Stopped

    def _set(self, goes: bool) -> None:
        with self._changed:
            self._goes = goes
            self._changed.notify_all()

    def _wait(self, goes: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._goes is goes)


def together(sides: Sequence[Side[T]], label: str) -> list[Outcome[T]]:
    """Return the outcomes of all jobs, of models whose blocks, less lost ones, are the same."""
    runs: list[_Run[T]] = []
    with redirect_stdout(sys.stdout):  # runs that replace it may put it back in any order
        try:
            for side in sides:
                with side.around():
                    for job in side.jobs:
                        # Its mode, hooks and buffers are its own.
                        model = sharing_copy(side.model, buffers=False)
                        runs.append(_Run(partial(job, model), side))
                        runs[-1].go_on()
            for block, there in track(_meetings(runs), label):
                with there[0].side.around(), turn(block):
                    for run in there:
                        run.go_on()
        finally:
            for run in runs:
                run.stop()
    for run in runs:
        if isinstance(run.outcome, torch.OutOfMemoryError):
            raise run.outcome
    return [run.outcome for run in runs]


def _meetings(runs: Sequence[_Run[T]]) -> Iterator[tuple[nn.Module, list[_Run[T]]]]:
    """Yield the next block to be read and those that wait for it, while there are any."""
    while waiting := [run for run in runs if run.block is not None]:
        number = min(run.number for run in waiting)
        there = [run for run in waiting if run.number == number]
        for _, alike in groupby(there, key=lambda run: id(run.side)):
            first, *others = alike
            assert first.block is not None
            yield first.block, [first, *others]
