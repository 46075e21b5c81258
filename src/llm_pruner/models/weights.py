"""The safetensors files of a folder: which they are, whether they are whole, what they hold.

Only their headers are read. Pickles can run code and are refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from llm_pruner.errors import UserError
from llm_pruner.files.disk import parse_json, read_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"(?!.*\.\.)[^/\\\0][^\\\0]*\.safetensors")
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOST_HEADER = 100_000_000
"""Bytes of a header; the format knows no longer one."""


class Stored(NamedTuple):
    """A tensor in a file: its type, as safetensors calls it, bytes and number of elements."""

    dtype: str
    bytes: int
    elements: int


def has_weights(folder: Path) -> bool:
    """Whether there are weights under the names that transformers gives them."""
    return any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))


def stored_tensors(folder: Path) -> list[Stored]:
    """Return what the weight files of a folder hold, each compared with what its header promises.

    Raises:
        UserError: there are none, or not all that there should be, or one is damaged.
    """
    return [tensor for file in _weight_files(folder) for tensor in _tensors(file)]


def commonest_type(tensors: list[Stored]) -> torch.dtype:
    """Return the floating-point type of most elements; float32 if there are none."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype in _FLOATS:
            elements[_FLOATS[tensor.dtype]] += tensor.elements
    return elements.most_common(1)[0][0] if elements else torch.float32


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code and "
                "is not read; convert it to safetensors first"
            )
        raise UserError(
            f"{folder} has no weights ({_WEIGHTS} or {_INDEX}); name a complete checkpoint"
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        odd = [name for name in names if not _SHARD.fullmatch(name)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} is damaged ({error!r}); restore it from the original checkpoint"
        ) from error
    if odd:
        raise UserError(
            f"{index} names {odd[0][:80]!r}, which is no safetensors file of this folder, and "
            "no other is read; convert the weights to safetensors first"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(names)} weight files that {_INDEX} names, "
            f"{absent[0]} first; copy or download them"
        )
    return [folder / name for name in names]


def _tensors(file: Path) -> list[Stored]:
    """Return what one file holds, after a look at its size."""
    no_header = UserError(f"{file} has no safetensors header; copy or download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if _MOST_HEADER < length <= size:
            raise no_header
        if size < 8 + length:
            raise _damaged(file, size, f"at least {8 + length}", "truncated")
        header = stream.read(length)
    try:
        entries = [entry for name, entry in parse_json(header).items() if name[:2] != "__"]
        places = [tuple(map(int, entry["data_offsets"])) for entry in entries]
        found = [
            Stored(str(entry["dtype"]), end - start, math.prod(map(int, entry["shape"])))
            for entry, (start, end) in zip(entries, places, strict=True)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise no_header from error
    promised = 8 + length + max((end for _, end in places), default=0)
    if size != promised:
        raise _damaged(file, size, promised, "truncated" if size < promised else "damaged")
    return found


def _damaged(file: Path, size: int, promised: int | str, state: str) -> UserError:
    return UserError(
        f"{file} is {state}: it holds {size} bytes and its header promises {promised}; "
        "copy or download it again"
    )
