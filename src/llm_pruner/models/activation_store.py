"""Hidden states at the boundaries between blocks, in memory up to a budget, then in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from llm_pruner.errors import UserError


class ActivationStore:
    """Arrays of one shape, written and read by ranges of samples.

    Files are plain bytes that are read into fresh memory, not mapped, so that what is on disk does
    not count as resident memory.

    Args:
        wanted: keys of the arrays.
        shape: (samples, ...) of every array.
        dtype: of every array.
        budget: bytes that may stay in memory.

    Raises:
        UserError: the temporary folder has no room for the rest.
    """

    def __init__(
        self, wanted: range, shape: tuple[int, ...], dtype: torch.dtype, budget: int
    ) -> None:
        self._shape, self._dtype = shape, dtype
        self._bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        in_memory = budget // self._bytes if self._bytes else len(wanted)
        self._arrays = {
            key: torch.empty(shape, dtype=dtype) for key in wanted[: min(in_memory, len(wanted))]
        }
        filed = wanted[len(self._arrays) :]
        need, folder = len(filed) * self._bytes, tempfile.gettempdir()
        if filed and (free := shutil.disk_usage(folder).free) < need:
            raise UserError(
                f"the hidden states of {shape[0]} samples need {need / 2**30:.1f} GiB on disk and "
                f"{folder} has {free / 2**30:.1f} GiB free; set TMPDIR to a larger disk, or use "
                "fewer or shorter samples"
            )
        # Without a name, so that a killed process leaves nothing behind.
        self._files = {key: tempfile.TemporaryFile(buffering=0) for key in filed}  # noqa: SIM115

    @property
    def resident(self) -> int:
        """Bytes held in memory."""
        return len(self._arrays) * self._bytes

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete everything."""
        for key in (*self._arrays, *self._files):
            self.drop(key)

    def write(self, key: int, samples: slice, values: torch.Tensor) -> None:
        """Store ``values``, shape (samples in the slice, ...)."""
        values = values.detach().to("cpu", self._dtype).contiguous()
        if key in self._arrays:
            self._arrays[key][samples] = values
            return
        file = self._files[key]
        file.seek(self._offset(samples))
        _all_bytes(values, file.write)

    def read(self, key: int, samples: slice) -> torch.Tensor:
        """Return the stored values of a range of samples; not to be changed in place."""
        if key in self._arrays:
            return self._arrays[key][samples]
        values = torch.empty((samples.stop - samples.start, *self._shape[1:]), dtype=self._dtype)
        file = self._files[key]
        file.seek(self._offset(samples))
        _all_bytes(values, file.readinto)
        return values

    def drop(self, key: int) -> None:
        """Forget one array."""
        self._arrays.pop(key, None)
        if key in self._files:
            self._files.pop(key).close()

    def _offset(self, samples: slice) -> int:
        return int(samples.start) * (self._bytes // self._shape[0])


def _all_bytes(values: torch.Tensor, move: Callable[[memoryview], int | None]) -> None:
    """Pass every byte of a contiguous tensor to ``move``, which may take a part at a time."""
    array: Any = values.view(-1).view(torch.uint8).numpy()  # not every numpy says: a buffer
    rest = memoryview(array)
    while len(rest):
        moved = move(rest)
        if not moved:
            raise OSError("a temporary file ended early")
        rest = rest[moved:]
