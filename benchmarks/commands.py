"""What benchmarks of the command line share: a command in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def llm_pruner(*arguments: object) -> None:
    """Run a command in a process of its own; what it prints is not shown."""
    command = [sys.executable, "-m", "llm_pruner", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
