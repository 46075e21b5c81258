"""What the commands print: tables of 80 columns, plain text when piped, one line for an error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_pruner.errors import Interrupted
from llm_pruner.files.disk import expanded, placed
from llm_pruner.files.outputs import check_file, write_output
from llm_pruner.report.text import at_home, clean, count, megabytes
from llm_pruner.runtime.signals import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from llm_pruner.commands.workdir import Kind

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds in which the first process says what went wrong, if it went wrong there, too."""


class Screen(Console):
    """Standard output; at least 80 columns, so that piped tables are not cut."""

    def __init__(self) -> None:
        how: Any = {"highlight": False, "markup": False, "emoji": False}
        super().__init__(**how)
        if not self.is_terminal:
            width = max(80, self.width)
            super().__init__(**how, width=width, color_system=None)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        text: Sequence[str] = (),
    ) -> None:
        """Print a table; the first column and those named in ``text`` stand to the left.

        Nothing in a cell is markup. Unless to a terminal, the spaces that fill lines are left out.
        """
        shown = Table(title=Text(clean(title)), title_justify="left", box=SIMPLE, pad_edge=False)
        for number, name in enumerate(columns):
            justify: Any = "left" if number == 0 or name in text else "right"
            shown.add_column(Text(clean(name)), justify=justify, overflow="fold", no_wrap=False)
        for row in rows:
            shown.add_row(*(Text(clean(str(cell))) for cell in row))
        if self.is_terminal:
            self.print(shown)
            return
        with self.capture() as captured:
            self.print(shown)
        for line in captured.get().splitlines():
            self.file.write(f"{line.rstrip()}\n")

    def model(self, name: str, before: int, after: int) -> None:
        """Say how many parameters a model had and has."""
        removed = f"{100 * (1 - after / before):.1f}% removed"
        self.print(f"{clean(name)}: {count(before)} -> {count(after)} parameters ({removed})")

    def places(self, folder: Path, report: Path | None, size: int | None = None) -> None:
        """Say where a model was saved, and where its report is."""
        bytes_ = "" if size is None else f" ({megabytes(size)})"
        self.print(f"saved to {clean(str(folder))}{bytes_}", soft_wrap=True)
        if report is not None:
            self.print(f"report: {clean(str(report))}", soft_wrap=True)

    def loads(self, needs: Sequence[str]) -> None:
        """Say how a folder is loaded."""
        and_ = "".join(f" and {need}" for need in needs)
        self.print(f"loads with from_pretrained{and_}")


def check_json(file: str | None, out: Path | None = None) -> None:
    """Raise UserError if results cannot be written to ``file``, beside what goes to ``out``."""
    if file is not None and file != "-":
        check_file("--json", expanded(file), out=out)


def write_json(record: Any, file: str | None) -> None:
    """Write what a command returned to a file for scripts, or to standard output for ``-``."""
    if file is None:
        return
    from llm_pruner.report.records import as_json

    text = json.dumps(as_json(record, inf_nan_mode="null"), indent=2, ensure_ascii=file == "-")
    if file == "-":
        print(text)
    else:
        write_output(expanded(file), text + "\n")
        placed.append(expanded(file))


def hand_over(record: T, json: str | None, show: Callable[[T], None]) -> None:
    """Write what a command returned for scripts, and print it unless JSON is printed."""
    write_json(record, json)
    if json != "-":
        show(record)


def command_line() -> str:
    """Return the command that runs now, as a shell reads it, with ``~`` for the home folder.

    Reports are published, and the name of a user's account is private.
    """
    words = [at_home(word) for word in sys.argv[1:]]
    # A shell reads ~ only without quotes, and at the beginning of a word.
    quoted = [f"~/{shlex.quote(w[2:])}" if w[:2] == "~/" else shlex.quote(w) for w in words]
    return " ".join(["llm-pruner", *quoted])


def speaks() -> bool:
    """Whether this process prints: all do but the later ones of several that a launcher started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def one_line(message: str) -> str:
    """Return a message in one line; a name that a user gave may hold line feeds."""
    return " ".join(message.splitlines())


def tell_stage(stage: str) -> None:
    """Say on a terminal which stage of a long run begins."""
    if sys.stderr.isatty():
        print(f"llm-pruner: {stage}", file=sys.stderr, flush=True)


def tell_going_on(folder: Path) -> None:
    """Say that the run in a folder, which was interrupted, goes on."""
    name = clean(folder.name)
    print(f"llm-pruner: going on with the run in {name}", file=sys.stderr, flush=True)


@contextmanager
def telling_how_to_go_on(kind: Kind, out: Path, *, restart: bool) -> Iterator[None]:
    """Have a run that is interrupted, and has kept what it has, say how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if not kind.beside(out).is_dir():
            raise
        # The same command would throw away what there is.
        how = "the same command without restart" if restart else "the same command"
        raise Interrupted(f"interrupted; {how} goes on from here") from None


def warn(message: str) -> None:
    """Print a warning to standard error and go on."""
    print(f"llm-pruner: warning: {clean(one_line(message))}", file=sys.stderr)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to standard error and exit; of several processes, the first one speaks."""
    sys.stdout.flush()
    if speaks():
        print(f"llm-pruner: {clean(message)}", file=sys.stderr)
    elif code not in (INTERRUPTED, TERMINATED):
        time.sleep(_PATIENCE)  # the launcher ends this process when the first one has failed, too
    sys.exit(code)
