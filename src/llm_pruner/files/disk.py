"""Files and folders that appear whole or not at all.

Each is made beside its place as ``.NAME.partial-XXXXXXXX`` and renamed when it is complete. Its
process holds a lock on it, so that the next one can remove what a killed process left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_RUST_CODE = re.compile(r"\(os error (\d+)\)")

placed: list[Path] = []
"""Outputs that this process has finished; the message about an interrupt names them."""


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``place`` that takes its place when the block ends.

    If the block raises, nothing has changed.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _beside(place, folder=True) as partial:
        inherited = partial.stat().st_mode & 0o7000  # such as the group of a shared folder
        partial.chmod(0o777 & ~umask() | inherited)
        yield partial
        put(partial, place)


@contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """Yield an empty file beside ``place`` that takes its place when the block ends."""
    place.parent.mkdir(parents=True, exist_ok=True)
    tidy(place)
    with _beside(place) as partial:
        yield partial
        partial.chmod(0o666 & ~umask())
        _flush(partial)
        partial.replace(place)


def put(folder: Path, place: Path) -> None:
    """Move a complete folder to its place, in exchange for what is there."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)
    try:
        folder.rename(place)  # works over an empty folder
    except OSError:
        if not place.exists():
            raise
        # The old folder is moved away, and removed last. `tidy` brings it back after a kill here.
        with _beside(place, "old", folder=True) as aside:
            place.rename(aside / place.name)
            folder.rename(place)
            placed.append(place)
    else:
        placed.append(place)


def tidy(place: Path) -> None:
    """Remove what killed processes left beside ``place``.

    A folder that was moved away returns if nothing took its place.
    """
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(partial|old)-[a-z0-9_]{{8}}")
    with suppress(OSError):  # no such folder, or it may not be changed
        for left in [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]:
            with locked(left) as held:
                if held:
                    _clear(left, place)


@contextmanager
def _beside(place: Path, what: str = "partial", *, folder: bool = False) -> Iterator[Path]:
    """Yield a locked folder or file beside ``place``, which is removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=f".{place.name}.{what}-", dir=place.parent))
    if not folder:
        path.rmdir()
        path.touch()
    with locked(path), _system_errors():
        try:
            yield path
        finally:
            _clear(path, place)


def _clear(left: Path, place: Path) -> None:
    old = left / place.name
    if left.name.startswith(f".{place.name}.old-") and old.exists() and not place.exists():
        old.rename(place)
    remove(left)


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder; yield whether that worked. The lock ends with the process.

    Yields False if another process holds it or the path is gone, None where nothing can be locked,
    as on Windows.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    handle = held = None
    try:
        # NFS needs write access for an exclusive lock.
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Return whether a file begins with these bytes."""
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def _flush(file: Path) -> None:
    """Write a file to the disk, so that a power cut after its renaming leaves it whole."""
    with file.open("rb+" if os.name == "nt" else "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise system errors of libraries written in Rust, such as a full disk, as OSError."""
    try:
        yield
    except Exception as error:
        code = _RUST_CODE.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def short_digest(*parts: str | bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of the parts together."""
    data = [part.encode() if isinstance(part, str) else part for part in parts]
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for ``~``; the name of no user stays as it is."""
    return Path(os.path.expanduser(path))


def umask() -> int:
    """Return the process's umask: temporary files are private, results should not be."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


MOST_BYTES = 64 * 2**20
"""Larger JSON files are not read: no file of this package is so large."""


def read_text(file: Path) -> str:
    """Return the text of a file; OSError, or ValueError beyond ``MOST_BYTES`` or if not UTF-8."""
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES // 2**20} MiB")
    return data.decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return what a JSON text says; ValueError if it is malformed or nested too deeply."""
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
