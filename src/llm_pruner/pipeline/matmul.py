"""Multiply float32 matrices at the speed of the machine's short formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside, factors of all matrix products may be rounded to bfloat16 or TF32.

    For scores, which only rank. Sums are float32 still.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with mixed_precision():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def mixed_precision() -> AbstractContextManager[None]:
    """Inside, modules multiply in bfloat16 on a processor that has instructions for it.

    A linear module takes a float32 input and gives a bfloat16 output, as in mixed-precision
    training; sums over tokens that are taken in place stay float32. Elsewhere nothing changes.
    """
    context: AbstractContextManager[None] = torch.autocast(
        "cpu", torch.bfloat16, enabled=multiplies_bfloat16()
    )
    return context


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16 matrices (x86)."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
