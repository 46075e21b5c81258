"""``llm-pruner export``: a model as a file of another program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, hand_over, warn
from llm_pruner.report.text import clean
from llm_pruner.settings.export import ExportSettings

if TYPE_CHECKING:
    from llm_pruner.commands.export import Exported

EXAMPLES = """\b
Examples:
  llm-pruner export small --to gguf --out small.gguf
  llm-pruner export small --type q4_k_m --out small-q4.gguf
  llm-pruner export small --type q8_0 --like dense.gguf --out small-q8.gguf
"""


def run(settings: ExportSettings, json: str | None) -> None:
    """Write a model as a file of another program, such as llama.cpp."""
    from llm_pruner.commands.export import export

    done = export(settings)
    hand_over(done, json, show)


def show(done: Exported) -> None:
    """Print what was written."""
    facts = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in done.facts.items()
        if value not in (None, 0) and name != "left_in_f16"
    )
    out = Screen()
    out.print(f"{clean(done.model)} as {done.to}, type {done.type}: {clean(facts)}", soft_wrap=True)
    out.places(done.path, None, done.bytes)
    if left := done.facts.get("left_in_f16"):
        warn(
            f"{left} matrices have inputs that are no multiple of 32 and stay in f16, so the file "
            "is larger than it could be; prune with --round-to gguf"
        )
