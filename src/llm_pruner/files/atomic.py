"""Write beside, then rename: an output is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_pruner.files.disk import new_folder
from llm_pruner.files.outputs import check_output, write_manifest
from llm_pruner.files.outputs import write_output as atomic_write_text

__all__ = ["atomic_directory", "atomic_write_text", "check_output"]


@contextmanager
def atomic_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well.

    If the block raises, the new folder is removed, with those of its parents that had to be made,
    and ``out`` is as it was. With ``overwrite`` the old folder is replaced only at the end.

    Raises:
        UserError: as ``check_output``.
    """
    check_output(Path(out), overwrite)
    with new_folder(Path(out).resolve()) as folder:
        yield folder
        check_output(Path(out), overwrite)  # it may have come into being during the work
        write_manifest(folder)
