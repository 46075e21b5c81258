"""Whether an output can be made, asked before the work that it is the result of."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from llm_pruner.errors import UserError

_BESIDE = 32
"""Bytes that names of what is made beside an output are longer (``.NAME.partial-abcdefgh``)."""

_INSIDE = 128
"""Bytes of the longest path inside a checkpoint or a run."""

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def check_place(path: Path, option: str) -> None:
    """Raise UserError unless a file or folder can be made at ``path``; whether it may is not asked.

    Folders that are missing would be made, so the nearest one that is there is tried: permissions
    say nothing of a file system that is mounted for reading.
    """
    path = Path(path).absolute()
    if "\0" in str(path):
        raise UserError(f"{option} {path.name!a} has a zero byte; give another name")
    there = nearest(path.parent)
    if not there.is_dir():
        raise UserError(
            f"{path} cannot be made, since {there} is not a folder that may be written; "
            f"give another {option}"
        )
    for part in path.relative_to(there).parts:
        longest = _limit(there, "PC_NAME_MAX", 255) - (_BESIDE if part == path.name else 0)
        _check_length(part, longest, option)
    _check_length(str(path), _limit(there, "PC_PATH_MAX", 4096) - _BESIDE - _INSIDE, option)
    try:
        tempfile.TemporaryDirectory(prefix=".llm-pruner-", dir=there).cleanup()
    except OSError as error:
        raise UserError(
            f"{path} cannot be made, since {there} is not a folder that may be written "
            f"({error.strerror}); give another {option}"
        ) from error


def nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that is there."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # unlike Path.exists, says no of a name that is too long
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Return how much can be written where ``path`` is or will be."""
    return shutil.disk_usage(nearest(path)).free


def check_shard_size(size: str) -> None:
    """Raise UserError unless ``size`` is one such as ``5GB`` that a weight file can have."""
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    try:
        bytes_ = int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        bytes_ = 0
    if bytes_ < 1:
        raise UserError(
            f"--max-shard-size {size[:40]!r} is no size of a file; use a number above 0 with KB, "
            "MB, GB or TB, such as 5GB"
        )


def _check_length(name: str, longest: int, option: str) -> None:
    length = len(os.fsencode(name))
    if length > longest:
        raise UserError(
            f"{option} {name[:20]}... has {length} bytes, and the file system takes {longest}; "
            "give a shorter one"
        )


def _limit(folder: Path, name: str, default: int) -> int:
    """Return a limit of the file system; ``default`` where the system does not say."""
    try:
        return os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):  # not on Windows
        return default
