"""What a run shows and what it keeps back: progress bars, time of stages, what libraries say."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

from rich.console import Console
from rich.control import Control
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.segment import ControlType
from rich.text import Text

from llm_pruner.runtime.memory import give_back

T = TypeVar("T")


class _RateColumn(ProgressColumn):
    """Items finished per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- it/s" if speed is None else f"{speed:.1f} it/s")


def track(
    items: Iterable[T], description: str, total: int | None = None
) -> Generator[T, None, None]:
    """Yield ``items`` while the first process's bar shows how many are done, and the time left."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield from items
        return
    columns = (BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # What recovery wrote there last is a line without an end.
    console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))
    with Progress("{task.description}", *columns, console=console, transient=True) as progress:
        yield from progress.track(items, total, description=description)


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Book the time since the last call on a stage; leave the next one its memory."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        give_back()


@contextmanager
def quiet(
    *loggers: str,
    level: int = logging.ERROR,
    warned: str | None = "",
    stdout: bool = False,
    stderr: bool = False,
) -> Iterator[None]:
    """Hold back warnings and what some loggers say below a level; what goes wrong is raised.

    Args:
        loggers: names, such as ``transformers``.
        level: the least that they still say.
        warned: regular expression of the warnings that are held back, by default all; None for
            none.
        stdout, stderr: hold back what is printed there.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        for logger in map(logging.getLogger, loggers):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        if warned is not None:
            warnings.filterwarnings("ignore", message=warned)
        if stdout:
            stack.enter_context(redirect_stdout(io.StringIO()))
        if stderr:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


@contextmanager
def quiet_bars(*loggers: str) -> Iterator[None]:
    """Hold back warnings, notes, and bars, even those without a switch, unless on a terminal."""
    with quiet(*loggers, stderr=not sys.stderr.isatty()):
        yield
