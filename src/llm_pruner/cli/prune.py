"""``llm-pruner prune``: a checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

from llm_pruner.cli.output import command_line, write_json
from llm_pruner.cli.pruned import as_data, show
from llm_pruner.runtime.memory import PRUNING, keep_kernels
from llm_pruner.settings.prune import PruneSettings

EXAMPLES = """\b
Examples:
  llm-pruner prune default --out small --ratio 0.2
  llm-pruner prune ./llama --out small --ratio 0.2 --preset paper
  llm-pruner prune ./llama --out small --params 5.4B --calibration c4
  llm-pruner prune ./llama --out plan.json --ratio 0.2 --dry-run
  llm-pruner prune ./llama --out small --plan plan.json
"""


def run(settings: PruneSettings, json: str | None) -> None:
    """Remove the least important structures and save a smaller model."""
    keep_kernels(PRUNING)
    settings.check()
    from llm_pruner.commands.prune import prune_checkpoint

    done = prune_checkpoint(settings, command=command_line())
    write_json(as_data(done), json)
    if json != "-":
        show(done)
