"""Files and folders that appear whole or not at all, and are on the disk when they do.

What is being made lies beside its place as ``.NAME.partial-XXXXXXXX``, and a folder that gives way
to a new one as ``.NAME.old-XXXXXXXX``. Both are locked for as long as their process lives, so that
the next process that writes there can tell what a dead one left. JSON that anybody may have
written is read within bounds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

_RUST_CODE = re.compile(r"\(os error (\d+)\)")

placed: list[Path] = []
"""Folders and files that this process has given their place, for what is said when it is
interrupted."""


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``place`` that takes its place when the block ends well.

    What is there goes only then. If the block raises, nothing has changed, but for the parents of
    ``place`` that other processes use by now. What a library in Rust raises becomes OSError.
    """
    made = make_parents(place.parent)
    try:
        with _beside(place, "partial", folder=True) as partial, _system_errors():
            inherited = partial.stat().st_mode & 0o7000  # such as the group of a shared folder
            partial.chmod(0o777 & ~umask() | inherited)
            yield partial
            put(partial, place)
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """Yield an empty file beside ``place``, as ``new_folder``; what dead processes left goes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    tidy(place)
    with _beside(place, "partial", folder=False) as partial, _system_errors():
        yield partial
        partial.chmod(0o666 & ~umask())
        flush(partial)
        partial.replace(place)
        flush(place.parent)


@contextmanager
def scratch_file(place: Path) -> Iterator[Path]:
    """Yield an empty file beside ``place``, which is gone at the end."""
    with _beside(place, "partial", folder=False) as partial, _system_errors():
        yield partial


def put(folder: Path, place: Path) -> None:
    """Give a complete folder its place; on return it is on the disk, and what was there is gone."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)
    try:
        _move(folder, place)  # over an empty folder as well, but on Windows
    except OSError:
        if not place.exists():
            raise
        # A full folder cannot be renamed over: the old one steps aside and goes last. If nothing
        # takes its place, it returns.
        with _beside(place, "old", folder=True) as aside:
            place.rename(aside / place.name)
            _move(folder, place)


def _move(folder: Path, place: Path) -> None:
    folder.rename(place)
    placed.append(place)
    flush(place.parent)


def can_move(folder: Path) -> bool:
    """Whether a full folder can step aside: one that an overlay shows of a lower layer cannot."""
    with _beside(folder, "old", folder=True) as aside:
        (aside / folder.name / "full").mkdir(parents=True)
        try:
            folder.rename(aside / folder.name)
        except OSError as error:
            return error.errno != errno.EXDEV
    return True


def discard(folder: Path) -> None:
    """Remove a folder, under another name, so that half of it is never found under its own."""
    with _beside(folder, "partial", folder=True) as aside:
        folder.rename(aside / folder.name)


def tidy(place: Path) -> None:
    """Remove what processes that are dead left beside ``place``.

    A folder that had stepped aside returns if nothing took its place.
    """
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(partial|old)-[a-z0-9_]{{8}}")
    with suppress(OSError):  # no such folder, or none that may be changed
        for left in [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]:
            with locked(left) as held:
                if held:
                    _clear(left, place)


@contextmanager
def _beside(place: Path, what: Literal["partial", "old"], *, folder: bool) -> Iterator[Path]:
    """Yield a locked folder or file beside ``place``; whatever it holds goes at the end."""
    prefix = f".{place.name}.{what}-"
    with ExitStack() as stack:
        while True:
            if folder:
                path = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
            else:
                opened, name = tempfile.mkstemp(prefix=prefix, dir=place.parent)
                os.close(opened)
                path = Path(name)
            if stack.enter_context(locked(path, wait=True)) or path.exists():
                break
            # Another process took it for one of a dead process before it was locked.
        stack.callback(_clear, path, place)
        yield path


@contextmanager
def locked(path: Path, *, wait: bool = False, shared: bool = False) -> Iterator[bool | None]:
    """Hold a file or folder, and yield whether it is held; a process that dies lets go of it.

    Yields:
        False if another process has it, or has removed it; None where nothing can be locked, as on
        Windows, or cannot be told to be left by a dead process.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    handle = held = None
    try:
        # NFS locks for one alone only what may be written.
        access = os.O_RDONLY if shared or path.is_dir() else os.O_RDWR
        handle = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
        held = os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:  # a file system without locks
        pass
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def _clear(left: Path, place: Path) -> None:
    old = left / place.name
    if left.name.startswith(f".{place.name}.old-") and old.exists() and not os.path.lexists(place):
        old.rename(place)
    remove(left)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def folder_bytes(path: str | Path) -> int:
    """Return the bytes of all files under a folder, or of one file."""
    path = Path(path)
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def starts_with(file: Path, start: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def make_parents(parent: Path) -> list[Path]:
    """Make the folder and its parents; return those that were missing, outermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def remove_empty(folders: list[Path]) -> None:
    """Remove what ``make_parents`` made, unless something has come to lie there."""
    with suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    try:
        # Windows flushes what may be written, Linux also what is shared read-only.
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():  # some systems cannot do it for a folder
            raise


def allocate(file: Path, size: int) -> None:
    """Make a file of ``size`` bytes, zeros where it had none, whose room on the disk is its own.

    A hole that is filled through a memory map would end the process when the disk is full. Raises
    OSError if there is no room; a file that was not there is not there.
    """
    new = not file.exists()
    try:
        file.touch()
        with file.open("r+b") as stream:  # some systems allocate in no file that is appended to
            if stream.seek(0, os.SEEK_END) != size:
                stream.truncate(0)
            if size and hasattr(os, "posix_fallocate"):
                _allocate_at_once(stream.fileno(), size)
            for written in range(stream.seek(0, os.SEEK_END), size, 2**20):
                stream.write(bytes(min(2**20, size - written)))
    except OSError:
        if new:
            file.unlink(missing_ok=True)
        raise


def _allocate_at_once(handle: int, size: int) -> None:
    """Have the system do so, if it can for this file."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise what libraries written in Rust raise for an error of the system as OSError."""
    try:
        yield
    except Exception as error:
        code = _RUST_CODE.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def short_digest(*parts: str | bytes) -> str:
    """Return 16 hex digits of the SHA-256 of what is given, one after the other."""
    data = [part.encode() if isinstance(part, str) else part for part in parts]
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for ``~``; ``~name`` of nobody here is a name."""
    return Path(os.path.expanduser(path))


def umask() -> int:
    """Return the process's umask; temporary files are private, which results should not be."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


MOST_BYTES = 64 * 2**20
"""A larger file is none that this package wrote."""


def read_text(file: Path) -> str:
    """Return the text of a file; OSError, or ValueError beyond ``MOST_BYTES`` or if not UTF-8."""
    # The size that the system states says nothing of a device or a pipe.
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES // 2**20} MiB")
    return data.decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return what a JSON text says; ValueError if it is none or nested too deeply to be read."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path) -> Any:
    """Return what a JSON file says; raise as ``read_text`` and ``parse_json``."""
    return parse_json(read_text(file))


def json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
