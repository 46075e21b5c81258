"""How a process ends: by SIGTERM or SIGHUP as by Ctrl-C, and with the one that started it."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C, which is Typer's too, and after the signals that follow."""

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a process from outside; SIGHUP, not on Windows, says that its terminal is gone."""

_PR_SET_PDEATHSIG = 1
_heard: int | None = None
"""The last signal that told this process to end."""


def heard() -> bool:
    """Whether a signal told this process to end; libraries may have made something else of it."""
    return _heard is not None


def exit_code() -> int:
    """Return what a process that was interrupted exits with."""
    return TERMINATED if _heard in _ENDING else INTERRUPTED


def only_broken_off() -> bool:
    """Whether what was heard is Ctrl-C, which is forgotten then, and not the end from outside."""
    global _heard
    if _heard in _ENDING:
        return False
    _heard = None
    return True


@contextmanager
def ended_alike() -> Iterator[None]:
    """Have what ends a process from outside do what Ctrl-C does.

    Not where somebody else cares for it (``nohup``), nor in one of several processes that a
    launcher started: it may be waiting for the others inside a library, where Python does not get
    to act on a signal.
    """
    global _heard
    _heard = None
    usual: dict[int, Any] = dict.fromkeys(_ENDING, signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: old for number, old in usual.items() if signal.getsignal(number) == old}
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _heard
    _heard = number
    raise KeyboardInterrupt


def deaf_at_the_end() -> None:
    """Have an interpreter that is taken down ignore signals: it would print a traceback."""
    for number in (signal.SIGINT, *_ENDING):
        atexit.register(signal.signal, number, signal.SIG_IGN)


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its ``parent``, an id, ends; only Linux can."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
