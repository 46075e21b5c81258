"""What the commands print: tables of 80 columns, plain text when piped, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_pruner.errors import UserError


def console() -> Console:
    """Return standard output; at least 80 columns, so that piped tables are not cut."""
    plain = Console(highlight=False, markup=False)
    if plain.is_terminal:
        return plain
    return Console(highlight=False, markup=False, width=max(80, plain.width), color_system=None)


def print_table(out: Console, shown: Table) -> None:
    """Print a table; without the spaces that fill its lines, unless to a terminal."""
    if out.is_terminal:
        out.print(shown)
        return
    with out.capture() as captured:
        out.print(shown)
    for line in captured.get().splitlines():
        out.file.write(f"{line.rstrip()}\n")


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    text: Sequence[str] = (),
) -> Table:
    """Return a table; the first column and those named in ``text`` stand to the left.

    Nothing in a cell is markup.
    """
    result = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        result.add_column(
            Text(name),
            justify="left" if number == 0 or name in text else "right",
            overflow="fold",
            no_wrap=False,
        )
    for row in rows:
        result.add_row(*(Text(clean(str(cell))) for cell in row))
    return result


def clean(text: str) -> str:
    """Return text without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def count(value: int) -> str:
    """Return a number of parameters as people say it: 134.5M, 6.74B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            digits = 2 if suffix in "BT" else 1
            return f"{value / limit:.{digits}f}{suffix}"
    return str(value)


def megabytes(value: int) -> str:
    """Return bytes as megabytes of a million."""
    return f"{value / 1e6:,.1f} MB"


def check_json(file: str | None) -> None:
    """Raise UserError if results cannot be written to ``file``; meant to run before long work."""
    if file not in (None, "-") and Path(file).is_dir():
        raise UserError(f"--json {file} is a folder; name the file to write")


def write_json(data: dict[str, Any], file: str | None) -> None:
    """Write results for scripts to a file, or to standard output for ``-``."""
    from llm_pruner.checkpoints import atomic_write_text

    if file is None:
        return
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        atomic_write_text(Path(file), text)


def one_line(message: str) -> str:
    """Return a message in one line; a name that a user gave may hold line feeds."""
    return " ".join(message.splitlines())


def fail(message: str, code: int) -> NoReturn:
    """Print a message to standard error and exit."""
    sys.stdout.flush()
    print(f"llm-pruner: {clean(message)}", file=sys.stderr)
    sys.exit(code)
