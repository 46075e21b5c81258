"""What a benchmark ran on, as its results say it."""

from __future__ import annotations

import os
import platform

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
