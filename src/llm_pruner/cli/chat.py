"""``llm-pruner chat``: talk to a model, or to two side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llm_pruner.cli.output import Screen, warn, write_json
from llm_pruner.errors import UserError
from llm_pruner.report.text import clean
from llm_pruner.runtime.signals import only_broken_off
from llm_pruner.settings.chat import ChatSettings

if TYPE_CHECKING:
    from llm_pruner.commands.chat import Answer, Turn

_COMMANDS = "/new begins another conversation, /quit ends"

EXAMPLES = f"""\b
Examples:
  llm-pruner chat ./small
  llm-pruner chat ./small --against MODEL
  echo "What is a bridge?" | llm-pruner chat ./small
{_COMMANDS}, Ctrl-C breaks an answer off.
"""

_AROUND = 6
"""Lines of a terminal beside those of an answer in a table."""

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a character looks like of which not all bytes are written."""


def run(settings: ChatSettings, json: str | None) -> None:
    """Talk to a model, or to two models side by side.

    Lines of a pipe are questions, and then the answers alone are printed.
    """
    from llm_pruner.commands.chat import ask, begun

    with suppress(AttributeError):  # of something else in its place
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    conversations, out, turns = begun(settings), Screen(), []
    typed = json != "-" and sys.stdin.isatty() and out.is_terminal
    try:
        for line in _typed(out) if typed else filter(None, map(str.strip, sys.stdin)):
            if line == "/quit":
                break
            if line == "/new":
                for one in conversations:
                    one.begin()
            elif typed:
                turns += _answered(out, ask(conversations, line), len(conversations))
            else:
                *_, turn = ask(conversations, line)
                turns.append(turn)
                if json != "-":
                    _print(out, turn)
    finally:  # what was answered before something went wrong is not lost
        write_json(turns, json)


def _typed(out: Screen) -> Iterator[str]:
    """Yield what is typed, up to Ctrl-C or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  # with it input() edits lines and remembers them
    out.print(f"{_COMMANDS}, Ctrl-C breaks an answer off", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if isinstance(end, KeyboardInterrupt) and not only_broken_off():
                raise
            out.print()
            return
        if line[:1] == "/" and " " not in line and line not in ("/new", "/quit"):
            out.print(f"{clean(line)} is no command; {_COMMANDS}", style="dim")
        elif line:
            yield line


def _print(out: Screen, turn: Turn) -> None:
    """Print the answers, with the names of the models where there are two."""
    for name, answer in turn.answers.items():
        if len(turn.answers) > 1:
            out.out(f"{clean(name)}:", highlight=False)
        out.out(clean(answer.text, "\n\t"), highlight=False)


def _answered(out: Screen, turns: Iterator[Turn], models: int) -> list[Turn]:
    """Show answers as they grow; return them, as far as they went, or nothing if there are none."""
    turn = None
    try:
        with (_streamed if models == 1 else _side_by_side)(out) as show:
            for turn in turns:
                show(turn)
    except UserError as error:
        warn(str(error))
    except KeyboardInterrupt:
        if not only_broken_off():
            raise
    return [turn] if turn else []


@contextmanager
def _streamed(out: Screen) -> Iterator[Callable[[Turn], None]]:
    """Print what is added to an answer, and at the end how fast that went."""
    shown, answer = "", None

    def show(turn: Turn) -> None:
        nonlocal shown, answer
        (answer,) = turn.answers.values()
        text = answer.text.rstrip(_HALF)
        out.out(clean(text[len(shown) :], "\n\t"), end="", highlight=False)
        shown = text

    try:
        yield show
    finally:
        out.print()
        if answer is not None:
            out.print(_speed(answer), style="dim")


@contextmanager
def _side_by_side(out: Screen) -> Iterator[Callable[[Turn], None]]:
    """Draw the ends of growing answers as columns, and at the end all of them."""
    last: Turn | None = None

    def show(turn: Turn) -> None:
        nonlocal last
        last = turn
        live.update(_columns(out, turn, max(out.height - _AROUND, 1)), refresh=True)

    try:
        with Live(console=out, auto_refresh=False, transient=True) as live:
            yield show
    finally:
        if last is not None:
            out.print(_columns(out, last))


def _columns(out: Screen, turn: Turn, most: int | None = None) -> Table:
    """Return a column for each answer, of its last lines where not all have room."""
    table = Table(box=SIMPLE, expand=True, show_footer=True, pad_edge=False)
    width = max(out.width // len(turn.answers) - 4, 1)
    cells = []
    for name, answer in turn.answers.items():
        table.add_column(Text(clean(name)), Text(_speed(answer), style="dim"), ratio=1)
        lines = Text(clean(answer.text, "\n\t")).wrap(out, width)
        cells.append(Text("\n").join(lines[-most:] if most else lines))
    table.add_row(*cells)
    return table


def _speed(answer: Answer) -> str:
    if answer.rate is None:
        return f"{answer.tokens} tokens"
    return (
        f"{answer.tokens} tokens, {answer.rate:.1f} tokens/s, the first after {answer.first:.1f} s"
    )
