"""The folder in which a run of several stages keeps what it has, to go on after a kill."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_pruner.checkpoints import atomic_write_text
from llm_pruner.errors import UserError

_SETTINGS, _PROGRESS, _LOCK = "settings.json", "progress.json", "lock"


def folder_beside(out: Path, doing: str) -> Path:
    """Return the folder in which a run that will end in ``out`` keeps what it has."""
    out = out.absolute()
    return out.with_name(f"{out.name}.{doing}")


class Work:
    """Settings, decisions and times of a run, and the outputs of its stages, in one folder.

    Everything in it appears whole or not at all. What was measured or decided is read again instead
    of being made again, so that a run that is killed ends as one that is not.

    Attributes:
        folder: where all of it lies.
        continued: whether an earlier process began the run.
        seconds: by stage, of all processes, as far as they finished it.
    """

    def __init__(self, folder: Path, continued: bool) -> None:
        self.folder, self.continued = folder, continued
        progress = self._read(_PROGRESS) or {}
        self.seconds: dict[str, float] = dict(progress.get("seconds", {}))
        self._peak = int(progress.get("peak_bytes", 0))
        self._decided: dict[str, Any] = dict(progress.get("decided", {}))
        self._last = time.monotonic()

    @property
    def peak_bytes(self) -> int:
        """Most memory that a process of the run held at once."""
        self._peak = max(self._peak, peak_memory())
        return self._peak

    @property
    def spent(self) -> float:
        """Seconds of the run until now."""
        return sum(self.seconds.values()) + time.monotonic() - self._last

    def path(self, name: str) -> Path:
        """Return the place of an output."""
        return self.folder / name

    def book(self, stage: str) -> None:
        """Book the time since the last call on a stage."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        self._keep()

    def kept(
        self, name: str, make: Callable[[], dict[str, Any]], stage: str | None = None
    ) -> dict[str, Any]:
        """Return values that are made once; the time goes to the stage, by default of that name."""
        found = self._read(f"{name}.json")
        if found is None:
            found = make()
            atomic_write_text(self.path(f"{name}.json"), json.dumps(found, indent=1) + "\n")
            self.book(stage or name)
        return found

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """Return what was decided by measured speed; it is decided once."""
        if name not in self._decided:
            self._decided[name] = decide()
            self._keep()
        return self._decided[name]

    def _keep(self) -> None:
        data = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "decided": self._decided}
        atomic_write_text(self.path(_PROGRESS), json.dumps(data, indent=1) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_values(self.path(name))

    def remove(self) -> None:
        """Remove the folder; it goes under another name, so that half of it is never found."""
        aside = _aside(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        self.folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], *, restart: bool) -> Iterator[Work]:
    """Yield the run in ``folder``, a new one if there is none.

    Args:
        folder: where it is kept.
        settings: all that decides how the run goes, as plain values.
        restart: throw away what is there.

    Raises:
        UserError: the run there has other settings, or another process is at it.
    """
    shutil.rmtree(_aside(folder), ignore_errors=True)
    there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if restart:
            for path in folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        asked = _flat(json.loads(json.dumps(settings)))
        found = read_values(folder / _SETTINGS)
        if found is None:
            others = [path.name for path in folder.iterdir() if path.name != _LOCK]
            if there and others:
                raise UserError(
                    f"{folder.name} holds no run that can go on; remove it, or pass --restart"
                )
            atomic_write_text(folder / _SETTINGS, json.dumps(asked, indent=1) + "\n")
        else:
            _require_same(folder, found, asked)
            for left in folder.glob(".*.partial-*"):  # of a process that was killed as it wrote
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield Work(folder, continued=found is not None)


def read_values(file: Path) -> dict[str, Any] | None:
    """Return the values in a file of the folder; None if it is not there.

    Raises:
        UserError: it is damaged.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged; begin anew with --restart") from error


def peak_memory() -> int:
    """Return the most bytes that this process or one that it waited for held; 0 if not known."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(unit * resource.getrusage(one).ru_maxrss for one in whose)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under names such as ``recipe.spread``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _require_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [
        f"{name}={_said(found.get(name))} and not {_said(asked.get(name))}"
        for name in {**found, **asked}
        if found.get(name) != asked.get(name)
    ]
    if differ:
        more = f" ({len(differ) - 1} more differ)" if len(differ) > 1 else ""
        raise UserError(
            f"{folder.name} holds an interrupted run with {differ[0]}{more}; give the same options "
            "to go on, or --restart to throw it away"
        )


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a process that dies lets go of it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder.name}; wait for it, or end it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
