"""Multiply float32 matrices at the speed of the machine's short formats."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from llm_pruner.runtime.attention import by_sample

_EXPORTING = "is_torchdynamo_exporting"
"""What transformers asks before it takes a kernel of another package."""


@contextmanager
def fast_matmul(model: nn.Module) -> Iterator[None]:
    """Inside, modules multiply as `mixed_precision` says and all else as `fast_products`.

    For scores of ``model``, which only rank.
    """
    with fast_products(), mixed_precision(model):
        yield


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, factors of float32 products may be rounded to bfloat16 or TF32.

    Sums and results are float32, also where modules multiply in bfloat16 outside.
    """
    with _products("medium"), torch.autocast("cpu", enabled=False):
        yield


def rounded(factor: torch.Tensor) -> torch.Tensor:
    """Return a factor of products that may be rounded as it may be, in the type that is fastest.

    `fast_products` keep what they make in float32, which takes a processor twice as long.
    """
    if factor.dtype == torch.float32 and multiplies_bfloat16(factor.device.type):
        return factor.bfloat16()
    return factor


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, factors of float32 matrix products are not rounded, whatever is set outside.

    Nor does transformers take kernels of packages such as flash-linear-attention, which round them.
    """
    with _products("highest"), torch_functions():
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Inside, float32 products are of a precision, for whatever backend another was set before."""
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    before = [(one, one.fp32_precision) for one in backends if hasattr(one, "fp32_precision")]
    of_all = None
    with suppress(RuntimeError):  # where that of a backend was set alone
        of_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for backend, value in before:  # PyTorch from 2.9 on
            backend.fp32_precision = value


@contextmanager
def torch_functions() -> Iterator[None]:
    """Inside, transformers runs its own functions in place of kernels of other packages.

    As when a model is exported: no operation of such a kernel is one of PyTorch's.
    """
    kernels: Any = sys.modules.get("transformers.integrations.hub_kernels")
    before = getattr(kernels, _EXPORTING, None)
    if before is None:
        yield
        return
    setattr(kernels, _EXPORTING, lambda: True)
    try:
        yield
    finally:
        setattr(kernels, _EXPORTING, before)


@contextmanager
def mixed_precision(model: nn.Module) -> Iterator[None]:
    """Inside, modules multiply in bfloat16 on a processor that has instructions for it.

    Unless ``model`` is in float16 or float64: such a tensor and a bfloat16 one make a third type or
    the wider one, and hidden states would change their type from block to block.

    A linear module takes a float32 input and gives a bfloat16 output, as in mixed-precision
    training; sums over tokens that are taken in place stay float32. Elsewhere nothing changes.

    Attention is computed sample by sample: PyTorch's own kernel on such a processor hands its
    bfloat16 products to float32 kernels, unless it has tiles, and takes twice as long.
    """
    others = (torch.float16, torch.float64)
    own = any(parameter.dtype in others for parameter in model.parameters())
    if own or not multiplies_bfloat16():
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), by_sample():
        yield


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Return whether a device is faster at matrices of a type of 16 bits than of float32 ones.

    Where training is: its products are in bfloat16, in which small gradients are not lost. Other
    products are not, and of float16 a processor is slow at them.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return multiplies_bfloat16(device) and (dtype == torch.bfloat16 or on_gpu)


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Return whether a device is faster at products of bfloat16 matrices than of float32 ones.

    A processor if it has instructions for them (x86), a GPU if its own cores do.
    """
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    on_cpu = device in ("cpu", "auto")
    return on_cpu and any(bool(getattr(torch.cpu, name, bool)()) for name in names)
