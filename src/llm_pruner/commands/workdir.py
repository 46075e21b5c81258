"""The folder in which a run of several stages keeps what it has, to go on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from llm_pruner.errors import UserError
from llm_pruner.files.disk import (
    discard,
    expanded,
    locked,
    make_parents,
    put,
    read_json,
    remove,
    remove_empty,
    tidy,
)
from llm_pruner.files.outputs import RECOVERY_FILE, check_output, write_output
from llm_pruner.report.records import as_json

_T = TypeVar("_T")

_SETTINGS, _PROGRESS, _LOCK = "settings.json", "progress.json", "lock"

RUN = "run.json"
"""What a recovery in progress was asked to do."""

_RESULT = "result.sha256"
"""How the record begins that the result of a recovery has: in 16 hex digits of its SHA-256."""

_DATA = "data_fingerprint"

_CHANGEABLE = (
    *("save_every", "report_to", "control", "control_fingerprint", "control_dtype"),
    *("gradient_checkpointing", "micro_tokens"),
)
"""Settings that a resumed run may have otherwise."""


@dataclass(frozen=True)
class Kind:
    """How the folder of a command's runs is called and known.

    Attributes:
        doing: ending of its name.
        marks: names of which one lies in every such folder, as a pattern.
        names: all names that may lie in one, likewise.
    """

    doing: str
    marks: str
    names: str

    def beside(self, out: Path) -> Path:
        """Return the folder in which a run that will end in ``out`` keeps what it has."""
        out = out.resolve()  # beside what a link leads to: renaming does not cross file systems
        return out.with_name(f"{out.name}.{self.doing}")


_PARTIAL = r"\..+\.(partial|old)-[a-z0-9_]{8}"
_OF_WORK = f"{_SETTINGS}|{_PROGRESS}|{_LOCK}|{_PARTIAL}"
"""What lies in the folder of a `Work`."""

COMPRESSING = Kind(
    "compressing",
    f"{_SETTINGS}|{_LOCK}",
    rf"{_OF_WORK}|(dense|pruned|amount|recovered|quantized|result|pruned\.plan)\.json"
    r"|vocab|pruned|recovered|recovered\.recovering|quantized|replaced|text",
)
MEASURING = Kind(
    "measuring",
    f"{_SETTINGS}|{_LOCK}",
    rf"{_OF_WORK}|(plan|point)-[\d.e-]+\.json|result\.json|shared\.safetensors|curve",
)
RECOVERING = Kind(
    "recovering",
    rf"{RUN}|{_LOCK}|(self|pruned)-[0-9a-f]{{16}}",
    rf"{RUN}|{_LOCK}|{_RESULT}|{_PARTIAL}|(self|pruned|control)-[0-9a-f]{{16}}|step-\d+|teacher|adapter",
)


def check_ours(folder: Path, kind: Kind) -> None:
    """Raise UserError if a folder is there that holds anything but a run."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    strange = [name for name in names if not re.fullmatch(kind.names, name)]
    if not strange and not any(re.fullmatch(kind.marks, name) for name in names):
        strange = names
    if strange or (os.path.lexists(folder) and not folder.is_dir()):
        holds = f"holds {min(strange)}, which no run wrote" if strange else "is no folder"
        raise UserError(
            f"{folder.name} {holds}, and a run would keep its work there; move that away or give "
            "another --out"
        )


def is_busy(folder: Path) -> bool:
    """Whether another process is at work in the folder of a run."""
    with locked(folder / _LOCK, shared=True) as free:  # several that ask do not see each other
        return free is False and (folder / _LOCK).exists()


def empty(folder: Path, kind: Kind) -> None:
    """Remove all of a run but its lock; nothing that is not its own."""
    for path in folder.iterdir():
        if path.name != _LOCK and re.fullmatch(kind.names, path.name):
            remove(path)


def remove_run(folder: Path, kind: Kind) -> None:
    """Remove a run; half of it is never found. What came to lie there besides stays."""
    try:
        check_ours(folder, kind)
    except UserError:
        empty(folder, kind)
        remove(folder / _LOCK)
    else:
        discard(folder)


@contextmanager
def begun(folder: Path, kind: Kind) -> Iterator[None]:
    """Make the folder of a run, if it is not there, and hold it for this process.

    If the block raises and nothing was done that is worth going on with, it is removed. Raises
    UserError if it holds something else, or another process is at work in it.
    """
    tidy(folder)
    check_ours(folder, kind)
    unlocked = not (folder / _LOCK).exists()
    nothing = {_LOCK} if (folder / RUN).exists() else {_LOCK, RUN}
    made = make_parents(folder)
    try:
        (folder / _LOCK).touch()
        with locked(folder / _LOCK) as free:
            if free is False:  # or another was just done, and has removed the folder
                raise busy(folder)
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    if unlocked:
                        remove(folder / _LOCK)
                    if {path.name for path in folder.iterdir()} <= nothing:
                        remove(folder)
                raise
    except BaseException:
        remove_empty([one for one in made if one != folder])
        raise


class Work:
    """Settings, decisions and times of a run, and the outputs of its stages, in one folder.

    Everything in it appears whole or not at all. What was measured or decided is read again instead
    of being made again, so that a run that is killed ends as one that is not.

    Attributes:
        folder: where all of it lies.
        kind: how it is known.
        continued: whether an earlier process began the run.
        seconds: by stage, of all processes, as far as they finished it.
    """

    def __init__(self, folder: Path, kind: Kind, continued: bool) -> None:
        self.folder, self.kind, self.continued = folder, kind, continued
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
        """Return a record that is made once, in a file of this name; the time goes to the stage."""
        file = self.path(f"{name}.json")
        if (found := read_values(file, kind)) is not None:
            return found
        made = make()
        write_output(file, json.dumps(as_json(made), indent=1) + "\n")
        self.record_time(stage or name)
        return made

    def remove(self) -> None:
        remove_run(self.folder, self.kind)


def move_result(folder: Path, out: Path, overwrite: bool, reads: Iterable[str]) -> None:
    """Put a complete folder in its place; one that is gone was moved before a kill."""
    tidy(out.resolve())
    if not folder.is_dir():
        return
    check_output(out, overwrite, reads)
    put(folder, out.resolve())


@contextmanager
def opened(
    folder: Path, settings: Mapping[str, Any], *, restart: bool, kind: Kind = COMPRESSING
) -> Iterator[Work]:
    """Yield the run in ``folder``; a new one if there is none, or it is to be thrown away.

    ``settings`` are all that decides how the run goes, as plain values. Raises UserError if the run
    there has others, another process is at it, or the folder holds something else.
    """
    with begun(folder, kind):
        if restart:
            empty(folder, kind)
        for left in folder.glob(".*.partial-*"):  # of a process that was killed as it wrote
            remove(left)
        asked = _flat(json.loads(json.dumps(settings)))
        found = read_values(folder / _SETTINGS)
        if found is None:
            others = [path.name for path in folder.iterdir() if path.name != _LOCK]
            if others:
                raise UserError(
                    f"{folder.name} holds no run that can go on; remove it, or pass --restart"
                )
            write_output(folder / _SETTINGS, json.dumps(asked, indent=1) + "\n")
        else:
            _require_same(folder, found, asked)
        yield Work(folder, kind, continued=found is not None)


def content(source: str) -> str | None:
    """Return 16 hex digits of the SHA-256 of a text file; None of what is no file."""
    file, digest = expanded(source), hashlib.sha256()
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def contents(sources: Iterable[str]) -> dict[str, str | None]:
    """Return `content` of each source, under a name that says so."""
    return {f"content of {source}": content(source) for source in sources}


def begin_or_go_on(work: Path, facts: dict[str, Any], *, resume: bool, writes: bool) -> None:
    """Write what decides a recovery, if this process writes; refuse to resume another one."""
    file, now = work / RUN, json.loads(json.dumps(facts))
    old = (read_values(file) if resume else None) or now
    differ = [key for key in facts if key not in _CHANGEABLE and old.get(key) != now[key]]
    if differ == [_DATA]:
        raise UserError(
            "the samples are not those of the interrupted run: its data, or what the chat template "
            "writes of them (such as the date), changed since; restore them, or begin anew with "
            "--restart"
        )
    differ.sort(key=lambda key: key == _DATA)  # it differs for what an option says, too
    for key in differ[:1]:
        raise UserError(
            f"the interrupted run has {key}={old.get(key)} and this one {key}={facts[key]}; give "
            "the same options, or begin anew with --restart"
        )
    if writes:
        write_output(file, json.dumps(facts, indent=2) + "\n")


def note_result(work: Path, made: Path) -> None:
    """Note the result of a recovery, before it takes its place; no two have the same record."""
    write_output(work / _RESULT, str(content(str(made / RECOVERY_FILE))))


def remove_finished(work: Path, out: Path) -> None:
    """Remove a run that was killed after its result took its place: that which it noted."""
    try:
        noted = (work / _RESULT).read_text(encoding="utf-8")
        finished = noted == content(str(out / RECOVERY_FILE))
    except (OSError, ValueError):
        return
    if finished and not is_busy(work):
        with suppress(FileNotFoundError):  # of several processes, one is the first
            remove_run(work, RECOVERING)


def read_values(file: Path, kind: Any = dict[str, Any]) -> Any:
    """Return the record in a file, None if there is no file; raise UserError if it is damaged."""
    try:
        return TypeAdapter(kind).validate_python(read_json(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError) as error:
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under names such as ``recipe.spread``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _require_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [
        f"{name}={_said(found.get(name))} and not {_said(asked.get(name))}"
        for name in {**found, **asked}
        if found.get(name) != asked.get(name)
    ]
    if differ:
        more = f" ({len(differ) - 1} more differ)" if len(differ) > 1 else ""
        what = "files" if "content" in differ[0].partition("=")[0].split() else "options"
        raise UserError(
            f"{folder.name} holds an interrupted run with {differ[0]}{more}; give the same {what} "
            "to go on, or --restart to throw it away"
        )


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def busy(folder: Path) -> UserError:
    """Return what is said where another process has the folder of a run."""
    return UserError(f"another process is at work in {folder.name}; wait for it, or end it")
