"""The folder in which a run of several stages keeps its outputs, so that it can go on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded, locked, put, read_json, remove, short_digest, tidy
from llm_pruner.files.outputs import check_output, write_output
from llm_pruner.report.records import as_json

_T = TypeVar("_T")

_SETTINGS, _PROGRESS, _LOCK = "settings.json", "progress.json", "lock"

RUN = "run.json"
"""Settings of a recovery in progress."""

_DATA = "data_fingerprint"

_CHANGEABLE = (*("control", "control_fingerprint", "control_dtype", "micro_tokens"),)
"""Settings that a resumed run may have otherwise."""


@dataclass(frozen=True)
class Kind:
    """The ending of the folder in which a command works."""

    doing: str

    def beside(self, out: Path) -> Path:
        """Return the folder of a run that writes ``out``, on the same file system."""
        out = out.resolve()
        return out.with_name(f"{out.name}.{self.doing}")


COMPRESSING, MEASURING, RECOVERING = Kind("compressing"), Kind("measuring"), Kind("recovering")


def empty(folder: Path) -> None:
    """Remove all of a run but its lock."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            remove(path)


@contextmanager
def begun(folder: Path) -> Iterator[None]:
    """Make the folder of a run, if it is not there, and lock it for this process.

    If the block raises before anything was done, the folder is removed. Raises UserError if the
    folder is not that of a run, or another process works in it.
    """
    lock = folder / _LOCK
    if folder.exists() and not (lock.exists() or not any(folder.iterdir())):
        raise UserError(
            f"{folder.name} is no folder of a run, and a run would keep its work there; move it "
            "away or give another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with locked(lock) as free:
        if free is False:
            raise busy(folder)
        begins = not (folder / RUN).exists()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if {path.name for path in folder.iterdir()} <= {_LOCK, *[RUN] * begins}:
                    remove(folder)
            raise


def busy(folder: Path) -> UserError:
    """Return what is said where another process has the folder of a run."""
    return UserError(f"another process is at work in {folder.name}; wait for it, or end it")


class Work:
    """Settings, decisions, times and outputs of a run, in one folder.

    What was measured or decided is read again instead of made again, so that a run that was killed
    ends as one that was not.

    Attributes:
        continued: whether an earlier process began the run.
        seconds: of each stage, summed over all processes of the run.
    """

    def __init__(self, folder: Path, continued: bool) -> None:
        self.folder, self.continued = folder, continued
        progress = read_values(self.path(_PROGRESS)) or {}
        self.seconds: dict[str, float] = dict(progress.get("seconds", {}))
        self._peak = int(progress.get("peak_bytes", 0))
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

    def record_time(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        data = {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        write_output(self.path(_PROGRESS), json.dumps(data, indent=1) + "\n")

    def once(
        self, name: str, kind: type[_T], make: Callable[[], _T], stage: str | None = None
    ) -> _T:
        """Return the record in the file ``name``; make and write it if there is none."""
        file = self.path(f"{name}.json")
        if (found := read_values(file, kind)) is not None:
            return found
        made = make()
        write_output(file, json.dumps(as_json(made), indent=1) + "\n")
        self.record_time(stage or name)
        return made

    def remove(self) -> None:
        """Remove the folder."""
        remove(self.folder)


def move_result(folder: Path, out: Path, overwrite: bool, reads: Iterable[str]) -> None:
    """Move a complete folder to its place, if that was not done before a kill."""
    tidy(out.resolve())
    if folder.is_dir():
        check_output(out, overwrite, reads)
        put(folder, out.resolve())


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], *, restart: bool) -> Iterator[Work]:
    """Yield the run in ``folder``; a new one if there is none, or with ``restart``.

    ``settings`` are all that decides how the run goes, as plain values. Raises UserError if the run
    there has others, or as `begun`.
    """
    with begun(folder):
        if restart:
            empty(folder)
        for left in folder.glob(".*.partial-*"):  # of a process that was killed
            remove(left)
        found = read_values(folder / _SETTINGS)
        if found is None:
            write_output(folder / _SETTINGS, json.dumps(settings, indent=1) + "\n")
        else:
            _require_same(found, settings)
        yield Work(folder, continued=found is not None)


def content(source: str) -> str | None:
    """Return 16 hex digits of the SHA-256 of a text file; None if there is no such file."""
    file = expanded(source)
    return short_digest(file.read_bytes()) if file.is_file() else None


def contents(sources: Iterable[str]) -> dict[str, str | None]:
    """Return `content` of each source, under a name that says so."""
    return {f"content of {source}": content(source) for source in sources}


def begin_or_go_on(work: Path, facts: dict[str, Any], *, resume: bool, writes: bool) -> None:
    """Write the settings of a recovery, if this process writes; refuse to resume another one."""
    old = read_values(work / RUN) if resume else None
    if old is not None:
        now = {name: of for name, of in facts.items() if name not in _CHANGEABLE}
        names = sorted(now, key=lambda name: name == _DATA)  # other options change the data, too
        _require_same({name: old.get(name) for name in names}, now)
    if writes:
        write_output(work / RUN, json.dumps(facts, indent=2) + "\n")


def read_values(file: Path, kind: Any = dict[str, Any]) -> Any:
    """Return the record in a file, None if there is no file; raise UserError if it is damaged."""
    try:
        return TypeAdapter(kind).validate_python(read_json(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{file} is damaged; begin anew (--set restart=true; recover: --overwrite)"
        ) from error


def peak_memory() -> int:
    """Return the most bytes that this process or a finished child of it held; 0 if not known."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(unit * resource.getrusage(one).ru_maxrss for one in whose)


def _require_same(found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise UserError if a run is asked for with other values than were ``found``."""
    asked = json.loads(json.dumps(asked))
    for name, one in found.items():
        other = asked.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            _require_same({**dict.fromkeys(other), **one}, other)
        elif one != other:
            raise UserError(
                f"the interrupted run has {name}={one} and this one {name}={other}; give the same "
                "options and files, or begin anew (--set restart=true; recover: --overwrite)"
            )
