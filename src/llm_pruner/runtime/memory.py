"""Let the C library keep the memory of large tensors for the next ones, stage by stage.

By default glibc gives every large block back to the kernel when it is freed, and the next
activation of the same size is faulted in again, page by page: on a CPU that can take longer than
computing it. Between stages, whose tensors have other sizes, it is given back.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError, in_short

BLOCK = 2**25
"""Blocks of up to this many bytes are kept; glibc takes no larger limit on all systems."""

KEPT = 2**27
"""Free bytes at the top of the heap that are kept."""

KEPT_OF_ALL = 2**30
"""The same where blocks of every size are kept."""

PRUNING, BOTH, TRAINING = 128, 512, 4096
"""Matrix products, of a shape each, whose kernels are kept: where every width that is tried is a
shape of its own; where a model of many widths is trained on rows of one length besides; and where
it is trained on rows of several."""

_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Has PyTorch ask for them on Linux."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_chosen = False  # that this process keeps large blocks

_GROUPS, _CONTROLS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_SAID = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_large_blocks() -> bool:
    """Set this process's malloc so; return whether it was.

    Nothing is set where the C library is not glibc, or where the user said otherwise in the
    environment. Has to come before PyTorch's first large tensor.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")
    mallopt = _glibc("mallopt")
    if mallopt is None or any(name in os.environ for name in _SAID):
        return False
    global _chosen
    _chosen = bool(mallopt(_MMAP_THRESHOLD, BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
    return _chosen


def keep_all_blocks() -> bool:
    """Where malloc keeps large blocks, have it keep blocks of all sizes; return whether it does.

    For weights that are widened for their turn (180 MB for a block of a 7B), and for activations
    and Gram matrices of larger models.
    """
    mallopt = _glibc("mallopt")
    return _chosen and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_OF_ALL))


def keep_kernels(number: int) -> None:
    """Have oneDNN forget all but the last kernels that it made for a matrix product's shape.

    Each holds up to a megabyte, and is compiled when it is first needed. Works before the first
    product; what the user said in the environment stands.
    """
    for name in _KERNELS:
        os.environ.setdefault(name, str(number))


def on_gpu(device: str) -> bool:
    """Whether a device is a GPU; ``auto`` is one if there is one."""
    import torch  # whose first large tensor comes after `keep_large_blocks`

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def free_bytes(device: str) -> int:
    """Return the free memory of a device; of ``auto`` that of a GPU, if there is one."""
    import psutil
    import torch

    if on_gpu(device):
        give_back()
        try:
            return int(torch.cuda.mem_get_info(None if device == "auto" else device)[0])
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device {device!r} cannot be used here ({in_short(error)}); use cpu or one that "
                "is there"
            ) from error
    return min([int(psutil.virtual_memory().available), *_limits_left()])


def _limits_left() -> Iterator[int]:
    """Yield what is left of each limit that a container or a job scheduler has put on memory."""
    try:
        groups = _GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        number, _, path = line.split(":", maxsplit=2)
        if number != "0":  # of the older kind of groups
            continue
        place = _CONTROLS / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(_CONTROLS):
                break
            with suppress(OSError, ValueError):  # none there, or no number but "max"
                limit = int((folder / "memory.max").read_text())
                yield limit - int((folder / "memory.current").read_text()) + _cached(folder)


def _cached(folder: Path) -> int:
    """Return the bytes of files in a group's memory that it would give up: mapped weights."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(
        int(number)
        for name, _, number in (line.partition(" ") for line in lines)
        if name in ("inactive_file", "active_file")
    )


def give_back() -> None:
    """Return free memory to the system, where the C library is glibc, and that of a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # what went in circles would stay there
        torch.cuda.empty_cache()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
