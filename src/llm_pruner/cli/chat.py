"""``llm-pruner chat``: talk to a model, or to two models that are asked the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, warn, write_json
from llm_pruner.errors import UserError
from llm_pruner.report.text import clean
from llm_pruner.runtime.signals import only_broken_off
from llm_pruner.settings.chat import ChatSettings

if TYPE_CHECKING:
    from llm_pruner.commands.chat import Turn

_COMMANDS = "/new begins another conversation, /quit ends, Ctrl-C breaks an answer off"

EXAMPLES = f"""\b
Examples:
  llm-pruner chat ./small
  llm-pruner chat ./small --against MODEL
  echo "What is a bridge?" | llm-pruner chat ./small
{_COMMANDS}.
"""


def run(settings: ChatSettings, json: str | None) -> None:
    """Talk to a model, or to two models that are asked the same.

    Lines of a pipe are questions, and then only the answers are printed.
    """
    from llm_pruner.commands.chat import ask, begun

    conversations, out, turns = begun(settings), Screen(), []
    typed = json != "-" and sys.stdin.isatty()
    try:
        for line in _typed(out) if typed else filter(None, map(str.strip, sys.stdin)):
            if line == "/quit":
                break
            if line == "/new":
                for one in conversations:
                    one.begin()
            elif (turn := _answered(out, ask(conversations, line), typed)) is not None:
                turns.append(turn)
                if json != "-":
                    _print(out, turn, typed)
    finally:  # what was answered before an error is not lost
        write_json(turns, json)


def _typed(out: Screen) -> Iterator[str]:
    """Yield what is typed, up to Ctrl-C or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines and remember them
    out.print(_COMMANDS, style="dim")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if isinstance(end, KeyboardInterrupt) and not only_broken_off():
                raise
            out.print()
            return
        if line[:1] == "/" and " " not in line and line not in ("/new", "/quit"):
            out.print(f"{clean(line)} is no command; use /new or /quit", style="dim")
        elif line:
            yield line


def _answered(out: Screen, turns: Iterator[Turn], typed: bool) -> Turn | None:
    """Return the answers, as far as they went; print that of one model as it grows."""
    turn, shown = None, ""
    try:
        for turn in turns:
            if typed and len(turn.answers) == 1:
                (answer,) = turn.answers.values()
                # Of the last character, not all bytes may be written.
                text = answer.text.rstrip("\N{REPLACEMENT CHARACTER}")
                out.out(clean(text[len(shown) :], "\n\t"), end="", highlight=False)
                shown = text
    except UserError as error:
        if not typed:
            raise
        warn(str(error))
    except KeyboardInterrupt:
        if not only_broken_off():
            raise
    return turn


def _print(out: Screen, turn: Turn, typed: bool) -> None:
    """Print the answers, with names where there are two, and for a reader how fast they came."""
    two = len(turn.answers) > 1
    for name, answer in turn.answers.items():
        if two:
            out.out(f"{clean(name)}:", highlight=False)
        out.out(clean(answer.text, "\n\t") if two or not typed else "", highlight=False)
        if typed:
            rate = "" if answer.rate is None else f", {answer.rate:.1f} tokens/s"
            took = f"{answer.tokens} tokens{rate}, the first after {answer.first:.1f} s"
            out.print(took, style="dim")
