"""``llm-pruner vocab``: the same model with fewer tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, hand_over
from llm_pruner.report.text import clean, count
from llm_pruner.settings.vocab import VocabSettings

if TYPE_CHECKING:
    from llm_pruner.commands.vocab import Trimmed

EXAMPLES = """\b
Examples:
  llm-pruner vocab qwen --text c4 --text code --size 64000 --out qwen-64k
  llm-pruner prune qwen-64k --ratio 0.2 --out small
"""


def run(settings: VocabSettings, json: str | None) -> None:
    """Remove the tokens that a text does not need."""
    from llm_pruner.commands.vocab import vocab

    done = vocab(settings)
    hand_over(done, json, show)


def show(done: Trimmed) -> None:
    """Print what became of the model."""
    out = Screen()
    size, tokens = done.parameters, done.tokens
    out.print(
        f"{clean(done.model)}: {tokens.before:,} -> {tokens.after:,} tokens, {count(size.before)} "
        f"-> {count(size.after)} parameters ({1 - size.after / size.before:.1%} removed)"
    )
    bits, length = done.bits_per_byte, done.tokens_per_kilobyte
    out.print(
        f"on text that was not read: {bits.before:.4f} -> {bits.after:.4f} bits per byte, "
        f"{length.after / length.before - 1:+.1%} tokens"
    )
    out.print(f"logits of the tokens that stay: largest difference {done.difference:.1e}")
    out.places(done.path, None, done.bytes)
    out.loads(done.needs)
    out.print("adapters of the dense model do not fit it")
