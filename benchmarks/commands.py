"""What benchmarks share that run commands and functions in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def llm_pruner(*arguments: object) -> None:
    """Run a command in a process of its own; what it prints is not shown."""
    command = [sys.executable, "-m", "llm_pruner", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def found_by(*arguments: object) -> dict[str, Any]:
    """Run a command in a process of its own; return what it says to scripts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        llm_pruner(*arguments, "--json", file)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def save_dense(model: str, folder: Path, dtype: str = "float32") -> None:
    """Save a dense model with its tokenizer as a folder."""
    apart(_save_dense, model, folder, dtype)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, whose peak memory is nobody else's.

    Forked: a process that has imported everything and computed nothing has no threads.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _save_dense(model: str, folder: Path, dtype: str) -> None:
    from llm_pruner import load
    from llm_pruner.checkpoints.save import silent_writing

    with silent_writing():
        loaded = load(model, dtype=dtype)
        loaded.network.save_pretrained(folder)
        assert loaded.tokenizer is not None
        loaded.tokenizer.save_pretrained(folder)
