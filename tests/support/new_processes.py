"""Runs code in new processes that have PyTorch and transformers loaded, and not this package."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest import mock

_LOADED = ["peft", "transformers.models.llama.modeling_llama", "transformers.trainer"]


@cache
def _context() -> ForkServerContext:
    """Start the process of which all others are copies: to load its libraries takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    with mock.patch.dict("os.environ", TORCH_DEVICE_BACKEND_AUTOLOAD="0"):
        forkserver.ensure_running()
    return context


def start(code: str, *args: object, said: Path, **environment: str) -> ForkServerProcess:
    """Start Python on code, with arguments, in the current folder.

    Args:
        said: file for what the process prints, errors as well.
        environment: variables in place of those of this process.
    """
    words, variables = list(map(str, args)), {**os.environ, **environment}
    said.touch()
    process = _context().Process(target=_execute, args=(code, words, said, variables), daemon=True)
    process.start()
    return process


def _execute(code: str, args: list[str], said: Path, variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["-c", *args]
    exec(compile(code, "code of a new process", "exec"), {"__name__": "__main__"})


def run_new(code: str, *args: object, said: Path, **environment: str) -> str:
    """Run code as ``start`` does to its end, a good one; return what it printed."""
    process = start(code, *args, said=said, **environment)
    process.join(600)
    assert process.exitcode == 0, said.read_text()
    return said.read_text()
