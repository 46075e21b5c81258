"""Write beside, then rename: an output is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_pruner.errors import UserError


def check_output(out: Path, overwrite: bool) -> None:
    """Raise UserError if ``out`` cannot become the output folder; meant to run before long work.

    An empty folder is fine; a folder with content only with ``overwrite``; a file never.
    """
    out = Path(out)
    if out.is_dir():
        if not overwrite and any(out.iterdir()):
            raise UserError(
                f"{out} exists and is not empty, so nothing was written; "
                "choose another folder or pass --overwrite"
            )
    elif out.exists() or out.is_symlink():
        raise UserError(f"{out} is a file, but the output is a folder; choose another name")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be made, since {parent} is not a folder that may be written")


@contextmanager
def atomic_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well.

    If the block raises, the new folder is removed, with those of its parents that had to be made,
    and ``out`` is as it was. With ``overwrite`` the old folder is replaced only at the end.

    Raises:
        UserError: ``out`` exists and is not empty and ``overwrite`` is false, or is a file.
    """
    out = Path(out).absolute()
    check_output(out, overwrite)
    made = _make_parents(out.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o777 & ~umask())
        yield partial
        check_output(out, overwrite)  # it may have come into being during the work
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            folder.rmdir()
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends; the file holds all of it or is as it was."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        partial.chmod(0o666 & ~umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Make the folder and its parents; return those that were missing, outermost first."""
    missing: list[Path] = []
    folder = parent
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for folder in missing:
        folder.mkdir(exist_ok=True)
    return missing


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    # A full folder cannot be renamed over: the old one steps aside and goes last.
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    old = aside / out.name
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def umask() -> int:
    """Return the process's umask; temporary files are private, which results should not be."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
