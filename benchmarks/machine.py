"""What a benchmark ran on, as its results say it."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """Return architecture, widest instructions for products and number of cores.

    Products in bfloat16 (AMX, AVX512-BF16) are named first, as they change times most.
    """
    names = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    fast = [name for name, check in names.items() if getattr(torch.cpu, check, bool)()]
    instructions = fast[0] if fast else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {instructions}, {os.cpu_count()} cores"
