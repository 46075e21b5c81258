"""How a process ends: by SIGTERM as by Ctrl-C, and with the one that started it."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C, which is Typer's too, and after SIGTERM."""

_PARENT = "LLM_PRUNER_PARENT"
_PR_SET_PDEATHSIG = 1
_SOON = 0.02
"""Seconds, in which Python is out of what it was in."""

_terminated = False


def exit_code() -> int:
    """Return what a process that was interrupted exits with."""
    return TERMINATED if _terminated else INTERRUPTED


@contextmanager
def ended_alike() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does.

    Not where somebody else cares for it, nor in one of several processes that a launcher started:
    it may be waiting for the others inside a library, where Python does not get to act on a signal.
    """
    global _terminated
    _terminated = False
    if (
        threading.current_thread() is not threading.main_thread()
        or os.environ.get("WORLD_SIZE", "1") != "1"
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    others = sys.unraisablehook
    sys.unraisablehook = partial(_heard_again, others)
    try:
        yield
    finally:
        sys.unraisablehook = others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    raise KeyboardInterrupt


def _heard_again(others: Callable[[Any], object], unraisable: Any) -> None:
    """Send a signal once more that was heard where Python drops exceptions, as in ``__del__``."""
    if unraisable.exc_type is not KeyboardInterrupt:
        others(unraisable)
        return
    number = signal.SIGTERM if _terminated else signal.SIGINT
    later = threading.Timer(_SOON, os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()


def deaf_at_the_end() -> None:
    """Have an interpreter that is taken down ignore signals: it would print a traceback."""
    atexit.register(_ignore)


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def for_child() -> dict[str, str]:
    """Return the environment of a process that is to end with this one."""
    return {**os.environ, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Have the system kill this process when the one that asked for that by ``for_child`` ends.

    Only Linux can.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has ended already
        os._exit(1)
