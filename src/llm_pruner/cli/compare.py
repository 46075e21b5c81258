"""``llm-pruner compare``: several pruned models side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llm_pruner.cli.build import Json
from llm_pruner.cli.output import Screen, check_json, write_json
from llm_pruner.errors import UserError
from llm_pruner.report.text import clean

if TYPE_CHECKING:
    from llm_pruner.report.compare import Comparison

EXAMPLES = """\b
Examples:
  llm-pruner compare ./small ./smaller
  llm-pruner compare 20%=./small 50%=./smaller
  llm-pruner compare ./small ./smaller --markdown > table.md
"""

_HEADINGS = {
    "size": "Size",
    "how": "How they were made",
    "perplexity": "Perplexity",
    "accuracy": "Zero-shot accuracy, percent",
    "measured": "Size, speed and skills, measured",
}


def command(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR", help="Folder that prune wrote; or NAME=DIR."),
    ],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print one table in Markdown.")
    ] = False,
    json: Json = None,
) -> None:
    """Put several pruned models side by side."""
    check_json(json)
    if markdown and json == "-":
        raise UserError("--markdown and --json - both write to stdout; give --json a file")

    from llm_pruner.report.compare import compare_folders, render_markdown

    found = compare_folders(folders)
    write_json(found, json)
    if markdown:
        sys.stdout.write(render_markdown(found))
    elif json != "-":
        show(found)


def show(found: Comparison) -> None:
    """Print a table for each subject, with a column for each model."""
    out = Screen()
    for subject, title in _HEADINGS.items():
        columns = [column for column in found.columns if column.subject == subject]
        rows = [(one.name, *(cell or "-" for cell in one.cells)) for one in columns]
        if rows:
            out.table(title, ("", *found.labels), rows)
    for note in found.notes:
        out.print(clean(note))
