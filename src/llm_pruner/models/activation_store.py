"""Hidden states at the boundaries between blocks, in memory up to a budget, then in files."""

from __future__ import annotations

import os
import shutil
import tempfile
from io import BufferedRandom
from typing import Any

import psutil
import torch

from llm_pruner.errors import UserError


class ActivationStore:
    """Arrays of ``samples`` each, up to ``memory`` bytes in memory and the others in files.

    Files are read, not mapped, so that they do not count as resident memory.
    """

    def __init__(self, keys: range, samples: int, memory: int) -> None:
        self.keys, self._samples, self._memory = keys, samples, memory
        self._form = torch.empty(0, device="cpu")  # one sample
        self._arrays: dict[int, torch.Tensor] = {}
        self._files: dict[int, BufferedRandom] = {}

    def _make(self, values: torch.Tensor) -> None:
        self._form = torch.empty_like(values[0], device="meta")
        size = self._samples * self._form.nbytes
        in_memory = self._memory // size if size else len(self.keys)
        for key in self.keys[: min(in_memory, len(self.keys))]:
            self._arrays[key] = values.new_empty((self._samples, *values.shape[1:]), device="cpu")
        filed = self.keys[len(self._arrays) :]
        need, free = len(filed) * size, free_on_disk()
        if filed and free < need:
            raise UserError(
                f"the hidden states of {self._samples} samples need {need / 2**30:.1f} GiB on disk "
                f"and {scratch_folder()} has {free / 2**30:.1f} GiB free; set TMPDIR to a "
                "larger disk, or use fewer or shorter samples"
            )
        # Without a name, so that a killed process leaves nothing behind.
        self._files = {key: tempfile.TemporaryFile(dir=scratch_folder()) for key in filed}  # noqa: SIM115

    def close(self) -> None:
        """Delete everything."""
        for key in (*self._arrays, *self._files):
            self.drop(key)

    def write(self, key: int, samples: slice, values: torch.Tensor) -> None:
        """Store (samples in the slice, ...) in the type of the first; UserError without room."""
        values = values.detach()
        if not self._arrays and not self._files:
            self._make(values)
        values = values.to("cpu", self._form.dtype).contiguous()
        if key in self._arrays:
            self._arrays[key][samples] = values
            return
        file = self._files[key]
        file.seek(self._offset(samples))
        file.write(_bytes_of(values))

    def read(self, key: int, samples: slice) -> torch.Tensor:
        """Return the stored values of a range of samples; not to be changed in place."""
        if key in self._arrays:
            return self._arrays[key][samples]
        shape = (samples.stop - samples.start, *self._form.shape)
        values = torch.empty(shape, dtype=self._form.dtype, device="cpu")
        file = self._files[key]
        file.seek(self._offset(samples))
        if file.readinto(_bytes_of(values)) != values.nbytes:
            raise OSError("a temporary file ended early")
        return values

    def drop(self, key: int) -> None:
        """Forget one array."""
        self._arrays.pop(key, None)
        if key in self._files:
            self._files.pop(key).close()

    def bytes_on_disk(self) -> int:
        """Return what the files take."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    def _offset(self, samples: slice) -> int:
        return int(samples.start) * self._form.nbytes


def free_on_disk() -> int:
    """Return the free bytes where arrays that do not fit in memory would lie."""
    return shutil.disk_usage(scratch_folder()).free


def scratch_folder() -> str:
    """Return the temporary folder; /var/tmp, which outlives a boot, where that lies in memory."""
    place, other = tempfile.gettempdir(), "/var/tmp"
    disks = psutil.disk_partitions(all=True)
    in_memory = any(one.mountpoint == place and one.fstype == "tmpfs" for one in disks)
    named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return other if in_memory and not named and os.access(other, os.W_OK) else place


class HiddenStates:
    """Hidden states before each block, and behind the last, for later passes over the same text."""

    def __init__(self) -> None:
        self._input_ids = torch.empty(0, dtype=torch.long, device="cpu")
        self._store: ActivationStore | None = None

    def close(self) -> None:
        """Delete them."""
        if self._store is not None:
            self._store.close()
        self._store = None

    def bytes_on_disk(self) -> int:
        """Return what they take there, which is free once they are closed."""
        return 0 if self._store is None else self._store.bytes_on_disk()

    def keep(self, input_ids: torch.Tensor, store: ActivationStore) -> None:
        """Take over a store with an array for each boundary, of tokens (samples, seq_len)."""
        self.close()
        self._input_ids, self._store = input_ids.cpu(), store

    def count(self, input_ids: torch.Tensor) -> int:
        """Return how many of these samples, (samples, seq_len), from the first on, are there."""
        if self._store is None or self._input_ids.shape[1:] != input_ids.shape[1:]:
            return 0
        samples = min(len(self._input_ids), len(input_ids))
        same = (self._input_ids[:samples] == input_ids[:samples].cpu()).all(-1)
        return int(same.cumprod(0).sum())

    def has(self, block: int) -> bool:
        """Whether those that enter a block are there; its number may be that behind the last."""
        return self._store is not None and block in self._store.keys

    def read(self, block: int, samples: slice) -> torch.Tensor:
        """Return those of a range of samples that enter a block; not to be changed in place."""
        assert self._store is not None
        return self._store.read(block, samples)


def _bytes_of(values: torch.Tensor) -> Any:
    return values.view(-1).view(torch.uint8).numpy()
