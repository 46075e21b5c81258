"""``llm-pruner recover``: train a pruned model, and keep it only if it became better."""

from __future__ import annotations

import sys

from llm_pruner.cli.output import command_line, speaks, write_json
from llm_pruner.cli.recovered import as_data, no_gain, show
from llm_pruner.cli.training_lines import Narrator
from llm_pruner.errors import Interrupted
from llm_pruner.files.disk import placed
from llm_pruner.runtime.memory import TRAINING, keep_kernels
from llm_pruner.settings.recover import RecoverSettings

EXAMPLES = """\b
Examples:
  llm-pruner recover ./small --out better --data alpaca.jsonl --max-minutes 20
  llm-pruner recover ./small --out better --data self --teacher default
  llm-pruner recover ./small --out better --data yahma/alpaca-cleaned \\
      --preset paper
"""


def run(settings: RecoverSettings, json: str | None) -> None:
    """Train a pruned model, and keep it only if it became better."""
    keep_kernels(TRAINING)
    from llm_pruner.commands.recover import recover_checkpoint, work_folder

    say = Narrator(quiet=json == "-") if speaks() else lambda _: None
    try:
        done = recover_checkpoint(settings, command=command_line(), say=say)
    except KeyboardInterrupt:
        if settings.out.resolve() in placed or not work_folder(settings.out).is_dir():
            raise
        raise Interrupted("interrupted; go on with --resume") from None
    if not speaks():
        return
    write_json(as_data(done), json)
    if json != "-":
        show(done)
    if not done.gained:
        print(f"llm-pruner: {no_gain(done)}", file=sys.stderr)
