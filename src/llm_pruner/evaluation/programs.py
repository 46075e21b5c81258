"""Runs programs that a model wrote, each in a process of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_pruner.errors import LLMPrunerError, UserError

Ending = Literal["passed", "failed", "timed out"]
"""How a program ended; ``failed`` is any exception, ``SystemExit`` too, and any other early end."""

SECONDS = 5.0
"""Time that one program may compute. OpenAI's own runner gives three seconds of the wall clock, in
which the same program passes on an idle machine alone."""
WAITING = 6
"""Times as long that it may take, all in all: a busy machine is slower, and a program may sleep."""
MEMORY, PROCESSES, FILE_BYTES = 2**30, 16, 2**24
"""Address space of a process in bytes, processes of a program, bytes of a file."""


@dataclass(frozen=True)
class ProgramRun:
    """How a program ended, and how it was shut off."""

    ending: Ending
    error: str | None
    namespaces: bool
    read_only: bool


def require_sandbox() -> None:
    """Raise UserError where programs cannot be run apart."""
    if sys.platform != "linux":
        raise UserError(
            "--run-code shuts programs off with what Linux has; use Linux, or leave humaneval out"
        )


def run_program(source: str, *, seconds: float = SECONDS) -> ProgramRun:
    """Run a Python program and return how it ended; it passed if its last line was reached.

    It runs in an empty temporary folder, with an empty environment and nothing to read, within
    limits of time, memory, processes and sizes of files, see ``sandbox``. All that it started is
    killed with it, and it with this process. What it means to do to its own verdict, it can: this
    is no judge of malice.
    """
    script = Path(__file__).with_name("sandbox.py")
    numbers = (os.getpid(), MEMORY, PROCESSES, FILE_BYTES, math.ceil(seconds))
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(script), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        with child:
            try:
                assert child.stdin is not None
                with suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(source.encode())
                with suppress(subprocess.TimeoutExpired):
                    child.wait(WAITING * seconds)
            finally:
                # Its child dies with it, and as the first process of a namespace takes all others.
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            assert child.stdout is not None
            held, _, said = child.stdout.read().decode(errors="replace").partition("\n")
    if not held:
        raise LLMPrunerError(f"programs cannot be run: {script.name} ended with {child.returncode}")
    killed = child.returncode == -signal.SIGKILL or said.endswith("timed out")
    ending: Ending = "timed out" if killed else "passed" if said == "passed" else "failed"
    error = said if ending == "failed" and said else None
    return ProgramRun(ending, error, **json.loads(held))
