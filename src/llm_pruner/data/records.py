"""The raw rows of WikiText and Penn Treebank, and how they become one text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Protocol = Literal["paper", "standard"]
Format = Literal["wikitext", "ptb"]

_HEADING = re.compile(r" = [^=].* = ?\n?")


def record_format(records: Sequence[str]) -> Format | None:
    """Return the corpus whose raw rows these look like, or None.

    WikiText rows start with a space or are blank, and some are headings between ``=`` signs. Penn
    Treebank rows have no capital letter but the ``N`` that stands for a number, and some have
    ``<unk>``.
    """
    rows = [record for record in records[:2000] if record.strip()]
    if len(rows) < 2:
        return None
    if all(row.startswith(" ") for row in rows) and any(map(_HEADING.fullmatch, rows)):
        return "wikitext"
    if any("<unk>" in row for row in rows) and all(_is_ptb(row) for row in rows):
        return "ptb"
    return None


def join_records(records: Sequence[str], form: Format, protocol: Protocol) -> str:
    """Join the rows of WikiText or Penn Treebank, see ``evaluation.load_evaluation_text``."""
    if form == "wikitext":
        return "\n\n".join(_with_line_end(row) if row.strip() else "" for row in records)
    separator = "\n\n" if protocol == "paper" else " "
    return separator.join(row.strip() for row in records)


def _with_line_end(row: str) -> str:
    return row if row.endswith("\n") else row + "\n"


def _is_ptb(row: str) -> bool:
    return all(word == word.lower() or word == "N" for word in row.split())
