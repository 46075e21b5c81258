"""What a benchmark ran on, as its results say it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata, util
from pathlib import Path

import torch

from llm_pruner.runtime.precision import multiplies_bfloat16


def machine() -> str:
    """Return architecture, widest vector instructions and number of cores.

    Products in bfloat16 are named where the processor has them, as recovery and estimates use them.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    if multiplies_bfloat16():
        instructions += " and bfloat16"
    return f"{platform.machine()} with {instructions}, {os.cpu_count()} cores"


def here() -> dict[str, str]:
    """Return what a row was measured on, and with which versions."""
    versions = f"torch {torch.__version__}, transformers {metadata.version('transformers')}"
    return {"machine": machine(), "versions": versions}


def commits() -> tuple[str, str]:
    """Return the commit of the source that is measured, and the last one that changed it."""
    spec = util.find_spec("llm_pruner")
    git = ["git", "-C", str(Path(str(spec and spec.origin)).parent)]

    def ask(*command: str) -> str:
        done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    dirty = "+" if ask("status", "--porcelain", "--", ".") else ""
    return ask("rev-parse", "--short", "HEAD"), ask("log", "-1", "--format=%h", "--", ".") + dirty
