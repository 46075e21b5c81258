"""Weights that stay in the files of a checkpoint, and how their values come into memory.

Mixtures store their experts one by one, and transformers joins them when it loads them, so all of
them would lie in memory. Inside ``join_late`` a stack of mapped tensors is a ``Joined``: a note of
its parts, which are joined each time that the values are read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from llm_pruner.models.activation_store import free_on_disk, scratch_folder
from llm_pruner.models.checkpoint_files import FLOATS, stored_tensors, weight_names
from llm_pruner.runtime.memory import give_back

_PIECE = 2**24
"""Bytes of a file that are widened at a time."""

_LARGE = 2**28
"""Bytes of a weight, such as that of a head, for which free memory is gathered."""

FILES = sys.platform.startswith("linux")
"""Whether weights can lie in files without a name, and the addresses of files are known."""

_FILED = 2**16
"""Bytes from which on a weight that replaces another is put on the disk."""

_DONT_NEED = 4  # MADV_DONTNEED: drop the pages; those of a file are read again when needed

Ranges: TypeAlias = Sequence[tuple[int, int]]
"""Addresses at which files are mapped: (first, one behind the last)."""

Changes: TypeAlias = tuple[tuple[int, torch.Tensor, bool], ...]
"""(Axis, positions, whether these alone stay; else they are zero), in order."""


class Joined(torch.Tensor):
    """The ``torch.cat``, or if ``stacked`` the ``torch.stack``, of parts; operations join them."""

    parts: tuple[torch.Tensor, ...]
    axis: int
    stacked: bool

    @staticmethod
    def __new__(cls, parts: tuple[torch.Tensor, ...], axis: int, *, stacked: bool) -> Joined:
        shape = list(parts[0].shape)
        if stacked:
            axis %= len(shape) + 1
            shape.insert(axis, len(parts))
        else:
            axis %= len(shape)
            shape[axis] = sum(part.shape[axis] for part in parts)
        new: Joined = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=parts[0].dtype, device=parts[0].device
        )
        new.parts, new.axis, new.stacked = parts, axis, stacked
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            one = args[0]
            return Joined(one.parts, one.axis, stacked=one.stacked)
        args, kwargs = tree_map_only(Joined, whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values in one piece of memory."""
    if not isinstance(tensor, Joined):
        return tensor
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for leaf, place in leaves(tensor, found):
        place.copy_(leaf)
    return found


def leaves(tensor: torch.Tensor, into: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tensors that one is made of, each with its place in ``into``, of the same shape."""
    if not isinstance(tensor, Joined):
        yield tensor, into
        return
    at = 0
    for part in tensor.parts:
        if tensor.stacked:
            place, at = into.select(tensor.axis, at), at + 1
        else:
            length = part.shape[tensor.axis]
            place, at = into.narrow(tensor.axis, at, length), at + length
        yield from leaves(part, place)


def leaf_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that one is made of."""
    if isinstance(tensor, Joined):
        for part in tensor.parts:
            yield from leaf_tensors(part)
    else:
        yield tensor


def element(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return one element, shape (1,), by its place in the flat tensor, and read no other."""
    if not isinstance(tensor, Joined):
        return tensor.reshape(-1)[index : index + 1]
    place = [int(one) for one in np.unravel_index(index, tensor.shape)]
    if tensor.stacked:
        part = tensor.parts[place.pop(tensor.axis)]
    else:
        ends = np.cumsum([one.shape[tensor.axis] for one in tensor.parts])
        number = int(np.searchsorted(ends, place[tensor.axis], side="right"))
        place[tensor.axis] -= int(ends[number - 1]) if number else 0
        part = tensor.parts[number]
    return element(part, int(np.ravel_multi_index(place, part.shape)))


def are_mapped(tensor: torch.Tensor, ranges: Ranges) -> bool:
    """Whether all values of a tensor lie in ranges of addresses."""
    return all(
        any(
            first <= one.data_ptr() and one.data_ptr() + one.nbytes <= last
            for first, last in ranges
        )
        for one in leaf_tensors(tensor)
    )


class _JoinLate(TorchFunctionMode):
    def __init__(self, mapped: Callable[[], Ranges]) -> None:
        super().__init__()
        self._mapped = mapped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.stack, torch.cat) and self._are_mapped(args[0]):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return Joined(tuple(args[0]), dim, stacked=func is torch.stack)
        return func(*args, **kwargs)

    def _are_mapped(self, tensors: Sequence[torch.Tensor]) -> bool:
        ranges = self._mapped()
        return len({one.dtype for one in tensors}) == 1 and all(
            one.ndim > 0 and one.is_contiguous() and are_mapped(one, ranges) for one in tensors
        )


@contextmanager
def join_late(mapped: Callable[[], Ranges]) -> Iterator[None]:
    """Inside, stacks of tensors at addresses that ``mapped`` returns become ``Joined``."""
    with _JoinLate(mapped):
        yield


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight's values come from: ``stored``, which is a view of files if ``mapped``.

    ``dtype`` and ``device`` are those of computation; several modules use it if ``tied``.
    """

    stored: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    mapped: bool
    tied: bool = False
    changes: Changes = ()

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values, in fresh memory or as they are stored."""
        kind = dtype or self.dtype
        anew = isinstance(self.stored, Joined) or kind != self.stored.dtype
        if not self.changes and anew and self.stored.is_contiguous():
            return self.copied(kind)
        return _changed(whole(self.stored), self.changes).to(self.device, kind)

    def rows(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of these numbers in their own type, where all changes are of columns."""
        across = tuple((-1, places, stay) for _, places, stay in self.changes)
        return _changed(functional.embedding(input, whole(self.stored)), across)

    def copied(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values in fresh memory, with one piece of the file beside them at a time."""
        if self.device.type == "cpu" and self.stored.numel() * dtype.itemsize >= _LARGE:
            give_back()  # what smaller ones have left, which are too small for it
        found = torch.empty(self.stored.shape, dtype=dtype, device=self.device)
        for leaf, place in leaves(self.stored, found):
            for piece, part in _pieces(leaf, place):
                part.copy_(piece.to(part.device))  # in its own type, which may be half as large
                self._forget(piece)
        return found

    def stand_in(self) -> torch.Tensor:
        """Return a single NaN in the shape of the weight."""
        shape = list(self.stored.shape)
        for dim, positions, stay in self.changes:
            if stay:
                shape[dim] = len(positions)
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)

    def forget(self) -> None:
        """Give the pages of the file back."""
        for one in leaf_tensors(self.stored):
            self._forget(one)

    def is_view(self, value: torch.Tensor) -> bool:
        """Whether values that were read are those of the file."""
        own = not isinstance(self.stored, Joined)
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


def _pieces(
    stored: torch.Tensor, place: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows of a tensor, ``_PIECE`` bytes at most if one row is, with their place."""
    if stored.ndim == 0:
        yield stored, place
        return
    rows = max(1, _PIECE * len(stored) // max(1, stored.nbytes))
    yield from zip(stored.split(rows), place.split(rows), strict=True)


def filed(values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return values mapped from a temporary file, and whether they are: few stay in memory."""
    if not FILES or values.nbytes < _FILED or values.nbytes >= free_on_disk() // 2:
        return values, False
    with tempfile.TemporaryFile(dir=scratch_folder()) as file:
        values.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        file.flush()
        name, count = f"/proc/self/fd/{file.fileno()}", values.numel()
        found = torch.from_file(name, shared=False, size=count, dtype=values.dtype)
    return found.view(values.shape), True


def wider_values(model: nn.Module, folder: Path, there: torch.dtype) -> dict[int, torch.Tensor]:
    """Return id of a parameter -> its values, where loading rounded them to the type ``there``."""
    own = model.state_dict(keep_vars=True)
    found: dict[int, torch.Tensor] = {}
    for tensor in stored_tensors(folder):
        kind = FLOATS.get(tensor.dtype, there)
        if torch.promote_types(kind, there) != there and tensor.name in own:
            with safe_open(tensor.file, "pt") as weights:
                found[id(own[tensor.name])] = weights.get_tensor(tensor.name)
    return found


@lru_cache(maxsize=4)
def _real_paths(folder: Path, changed: int) -> frozenset[str]:  # noqa: ARG001 - for the cache
    return frozenset(os.path.realpath(folder / name) for name in weight_names(folder))


def mapped_files(folder: Path) -> list[tuple[int, int]]:
    """Return the addresses at which a folder's weight files, links or not, are mapped, on Linux."""
    if not FILES:
        return []
    names = _real_paths(folder, folder.stat().st_mtime_ns)
    found = []
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            first, last = (int(number, 16) for number in fields[0].split("-"))
            found.append((first, last))
    return found
