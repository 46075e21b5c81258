"""Where a command writes: one check before work begins, and writing whole or not at all.

A folder that this package writes lists its files in ``MANIFEST``. ``--overwrite`` replaces only
such a folder, and only if it holds nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from llm_pruner.errors import UserError
from llm_pruner.files.disk import (
    expanded,
    json_object,
    new_file,
    new_folder,
    read_json,
    starts_with,
    tidy,
)

MANIFEST = ".written-by-llm-pruner"
"""A name without an ending, so that no program takes it for a part of the model."""

RECOVERY_FILE = "recovery.json"
"""What ``recover`` writes about a run, beside the weights."""

_OF_MODEL = re.compile(
    r"(.*config|.*index|plan.*|report|recovery|vocabulary|curve|tokenizer|special_tokens_map"
    r"|added_tokens|vocab|chat_template)\.json|README\.md|report\.html"
)
"""Files of a model or beside it that could be mistaken for results or a page."""

_HALF = re.compile(r"\..+\.partial-[a-z0-9_]{8}")

Kind = Literal["results", "page", "plan", "GGUF"]

Source = str | Path | None
"""What a command reads: a path, a name on the hub, a word such as ``self``, or nothing."""

_WORDS = (None, "", "default", "demo", "self", "chat", "pruned")


def check_output(out: Path, overwrite: bool, reads: Iterable[Source] = ()) -> None:
    """Raise UserError if ``out`` cannot become the output folder.

    It may be absent or empty, or with ``overwrite`` a folder that only this package wrote to and
    that holds nothing of what the command ``reads``. What killed processes left is removed.
    """
    check_place(out, "--out")
    place = out.resolve()
    tidy(place)
    if not place.is_dir():
        if place.exists():
            raise UserError(f"{out} is a file, but the output is a folder; choose another name")
        return
    if os.path.ismount(place):
        raise UserError(f"{out} is a mount point and cannot be replaced; name a folder in it")
    if place in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{out} is the current folder or holds it; name another folder")
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{out} exists and is not empty, so nothing was written; "
            "choose another folder or pass --overwrite"
        )
    for source, read in _places(reads):
        if read.exists() and (place in (read, *read.parents) or read in place.parents):
            raise UserError(
                f"{out} is not replaced, since this command reads {source}; give another --out"
            )
    if (strange := not_ours(place)) is not None:
        raise UserError(
            f"{out} holds {strange}, which llm-pruner did not write, so it is not replaced; "
            "move that away or give another --out"
        )


def check_file(
    option: str,
    file: Path,
    kind: Kind = "results",
    reads: Iterable[Source] = (),
    out: Path | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Raise UserError if a file cannot be written.

    A file that is there is replaced if it holds what will be written, and is no part of a model.

    Args:
        option: which names the file.
        kind: what will be written.
        reads: all that the command reads, and other files that it writes.
        out: the folder or file that the command writes.
        overwrite: whether a file that is there may be replaced at all.
    """
    what = f"{option} {file}"
    if file.is_dir():
        raise UserError(f"{what} is a folder; name the file to write")
    if _is_stream(file):
        return
    check_place(file, option)
    place, made = file.resolve(), None if out is None else out.resolve()
    if (made and place in (made, *made.parents)) or place in (read for _, read in _places(reads)):
        raise UserError(f"{what} is used by this command otherwise; name another file")
    if place.exists() and not overwrite:
        raise UserError(f"{what} exists; give another one, or --overwrite to replace it")
    lone_plan = kind == "plan" and not (place.parent / "config.json").is_file()
    there = place.exists() or place.parent == made
    if there and _OF_MODEL.fullmatch(place.name) and not lone_plan:
        raise UserError(f"{what} would replace a file of a model; name another file")
    if place.exists() and not _holds(place, kind):
        raise UserError(f"{what} exists and holds something else than {kind}; name another file")


def check_place(path: Path, option: str) -> None:
    """Raise UserError unless a file or folder can be made at ``path``."""
    path = Path(os.path.realpath(path))
    there = nearest(path.parent)
    try:
        # Permissions do not tell whether a file system is mounted read-only.
        tempfile.TemporaryDirectory(prefix=".llm-pruner-", dir=there).cleanup()
    except OSError as error:
        raise UserError(
            f"{path} cannot be made, since {there} is not a folder that may be written; "
            f"give another {option}"
        ) from error


def write_output(file: Path, text: str) -> None:
    """Write ``text`` as UTF-8; the file holds all of it or stays as it was.

    A pipe or an open file such as ``/dev/stdout`` is written into.
    """
    file = Path(file)
    if _is_stream(file):
        with file.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        return
    place = file.resolve()
    rewrite(place.parent, {place.name: text})


def rewrite(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of a folder, and list them in its manifest if it has one."""
    if (listed := _listed(folder)) is not None:
        texts = {MANIFEST: _manifest(listed | texts.keys()), **texts}
    for name, text in texts.items():
        with new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")


def not_ours(folder: Path) -> str | None:
    """Return the name of a file in a folder that this package did not write; None if all are."""
    return min(_names(folder) - (_listed(folder) or set()) - {MANIFEST}, default=None)


@contextmanager
def atomic_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends.

    If the block raises, ``out`` is as it was. Raises UserError as ``check_output``.
    """
    check_output(Path(out), overwrite)
    with new_folder(Path(out).resolve()) as folder:
        yield folder
        check_output(Path(out), overwrite)  # it may have been made during the work
        (folder / MANIFEST).write_text(_manifest(_names(folder)), encoding="utf-8")


def nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that exists."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # False for a name that is too long, unlike Path.exists
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Return how much can be written where ``path`` is or will be."""
    return shutil.disk_usage(nearest(path)).free


_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as ``5GB``, in steps of a thousand; 0 if it is none."""
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    try:
        return int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        return 0


def _places(reads: Iterable[Source]) -> Iterator[tuple[Source, Path]]:
    """Yield each source and the path that it may mean."""
    for source in reads:
        if source not in _WORDS:
            yield source, expanded(str(source)).resolve()


def _is_stream(file: Path) -> bool:
    """Return whether a path is a device or a pipe, or names an open file."""
    if str(file).startswith(("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/")):
        return True
    return file.exists() and not stat.S_ISREG(file.stat().st_mode)


def _holds(file: Path, kind: Kind) -> bool:
    """Return whether a file is empty or holds what is to be written."""
    if file.stat().st_size == 0:
        return True
    if kind == "page":
        return starts_with(file, b"<!doctype") or starts_with(file, b"<!DOCTYPE")
    if kind == "GGUF":
        return starts_with(file, b"GGUF")
    if kind == "plan":
        return {"groups", "package_version"} <= json_object(file).keys()
    try:
        return isinstance(read_json(file), dict | list)
    except (OSError, ValueError):
        return False


def _names(folder: Path) -> set[str]:
    """Return the files and links under a folder, as paths from it, but unfinished ones."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return {name for name in names if not _HALF.fullmatch(name)}


def _listed(folder: Path) -> set[str] | None:
    """Return the files in the manifest of a folder; None if it has none."""
    files = json_object(folder / MANIFEST).get("files")
    return None if files is None else set(files)


def _manifest(names: Iterable[str]) -> str:
    return json.dumps({"files": sorted(names)}, indent=1) + "\n"
