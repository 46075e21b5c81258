"""Multiply float32 matrices at the speed of the machine's short formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside, float32 factors may be rounded to bfloat16 or TF32; sums stay in float32.

    For scores, which only rank: nothing that ends up in a weight is computed so. Nor is what has
    many shapes, since oneDNN keeps a kernel and its memory for each. Processors without such
    formats multiply as ever.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
