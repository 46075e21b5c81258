"""A weight as it lies in the files of a checkpoint, and how its values come into memory."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch.nn import functional

from llm_pruner.models.activation_store import free_on_disk, scratch_folder
from llm_pruner.models.assembled import Assembled, files, leaves, whole
from llm_pruner.models.stored import weight_names
from llm_pruner.runtime.memory import give_back

_LOG = logging.getLogger(__name__)

_PIECE = 2**24
"""Bytes of a file that are widened at a time."""

_LARGE = 2**28
"""Bytes of a weight, such as that of a head, for which free memory is gathered."""

FILES = sys.platform.startswith("linux")
"""Whether weights can lie in files without a name, and the addresses of files are known."""

_FILED = 2**16
"""Bytes of a weight that took another one's place from which it is put on the disk."""

_DONT_NEED = 4  # MADV_DONTNEED: drop the pages; those of a file are read again when needed


Changes: TypeAlias = tuple[tuple[int, torch.Tensor, bool], ...]
"""(Axis, positions, whether these alone stay; else they are zero), in order."""


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight's values come from.

    Attributes:
        stored: as it lies in the file, or put together of what lies there.
        dtype, device: of computation.
        mapped: whether ``stored`` is a view of files that nobody writes to.
        tied: whether several modules use it.
        changes: see ``Changes``.
    """

    stored: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    mapped: bool
    tied: bool = False
    changes: Changes = ()

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values, on fresh memory or as they are stored."""
        kind = dtype or self.dtype
        anew = isinstance(self.stored, Assembled) or kind != self.stored.dtype
        if not self.changes and anew and self.stored.is_contiguous():
            return self.copied(kind)
        return _changed(whole(self.stored), self.changes).to(self.device, kind)

    def rows(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of these numbers in their own type, where all changes are of columns."""
        across = tuple((-1, places, stay) for _, places, stay in self.changes)
        return _changed(functional.embedding(input, whole(self.stored)), across)

    def copied(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values on fresh memory; of a file, one piece is there beside them."""
        if self.device.type == "cpu" and self.stored.numel() * dtype.itemsize >= _LARGE:
            give_back()  # what smaller ones have left, which are too small for it
        found = torch.empty(self.stored.shape, dtype=dtype, device=self.device)
        for leaf, place in leaves(self.stored, found):
            for piece, part in _pieces(leaf, place):
                part.copy_(piece.to(part.device))  # in its own type, which may be half as large
                self._forget(piece)
        return found

    def stand_in(self) -> torch.Tensor:
        shape = list(self.stored.shape)
        for dim, positions, stay in self.changes:
            if stay:
                shape[dim] = len(positions)
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)

    def forget(self) -> None:
        """Give the pages of the file back."""
        for one in files(self.stored):
            self._forget(one)

    def is_view(self, value: torch.Tensor) -> bool:
        """Whether values that were read are those of the file."""
        own = not isinstance(self.stored, Assembled)
        return own and value.data_ptr() == self.stored.data_ptr()

    def _forget(self, part: torch.Tensor) -> None:
        if self.mapped:
            start = part.data_ptr()
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                libc = ctypes.CDLL(None)
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


def _changed(value: torch.Tensor, changes: Changes) -> torch.Tensor:
    for dim, places, stay in changes:
        at = places.to(value.device)
        value = value.index_select(dim, at) if stay else value.index_fill(dim, at, 0)
    return value


def filed(values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return values mapped from a temporary file without a name, and whether they are.

    They stay in memory where they are few, the disk has no room, which is said once, or the system
    is not Linux.
    """
    if not FILES or values.nbytes < _FILED:
        return values, False
    if values.nbytes >= free_on_disk() // 2:
        _say_full(scratch_folder())
        return values, False
    with tempfile.TemporaryFile(dir=scratch_folder()) as file:
        values.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        file.flush()
        name, count = f"/proc/self/fd/{file.fileno()}", values.numel()
        found = torch.from_file(name, shared=False, size=count, dtype=values.dtype)
    return found.view(values.shape), True


@cache
def _say_full(folder: str) -> None:
    _LOG.warning("new weights stay in memory: %s has no room; set TMPDIR to a larger disk", folder)


def _pieces(
    stored: torch.Tensor, place: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows of a tensor, ``_PIECE`` bytes at most if one row is, with their place."""
    if stored.ndim == 0:
        yield stored, place
        return
    rows = max(1, _PIECE * len(stored) // max(1, stored.nbytes))
    yield from zip(stored.split(rows), place.split(rows), strict=True)


@lru_cache(maxsize=4)
def _places(folder: Path, changed: int) -> frozenset[str]:  # noqa: ARG001 - for the cache
    return frozenset(os.path.realpath(folder / name) for name in weight_names(folder))


def mapped_files(folder: Path) -> list[tuple[int, int]]:
    """Return the addresses at which a folder's weight files, links or not, are mapped, on Linux."""
    maps = Path("/proc/self/maps")
    if not FILES or not maps.is_file():
        return []
    names = _places(folder, folder.stat().st_mtime_ns)
    found = []
    for line in os.fsdecode(maps.read_bytes()).splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            first, last = (int(number, 16) for number in fields[0].split("-"))
            found.append((first, last))
    return found
