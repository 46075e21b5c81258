"""``llm-pruner tasks``: local records as task files for lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_pruner.cli.output import clean, console

EXAMPLES = """\b
Examples:
  llm-pruner tasks --tasks-data tasks/ --out offline
  lm_eval --model_args pretrained=small --include_path offline --tasks piqa
"""


def command(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    tasks_data: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder with boolq.jsonl, piqa.jsonl, hellaswag.jsonl, winogrande.jsonl, "
            "arc_easy.jsonl, arc_challenge.jsonl and openbookqa.jsonl.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Only these, such as boolq,piqa. [default: all seven]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out, if llm-pruner wrote all in it.")
    ] = False,
) -> None:
    """Write the paper's tasks on local data for lm_eval."""
    from llm_pruner.commands.zero_shot import write_task_files
    from llm_pruner.settings.words import LOCAL_TASKS

    names = LOCAL_TASKS if tasks is None else tuple(name.strip() for name in tasks.split(","))
    files = write_task_files(Path(out), Path(tasks_data), names, overwrite=overwrite)
    shown = console()
    shown.print(f"{clean(out)}: {', '.join(file.stem for file in files)}")
    shown.print(
        "Give it to lm-evaluation-harness with --include_path, and name the tasks with --tasks."
    )
