"""``llm-pruner compress``: prune, recover, evaluate and report, in one command that can go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_pruner.cli.output import (
    Screen,
    command_line,
    hand_over,
    tell_going_on,
    tell_stage,
    telling_how_to_go_on,
    warn,
)
from llm_pruner.cli.recover import Narrator, show_control
from llm_pruner.report.text import clean, count, measured, megabytes
from llm_pruner.runtime.memory import BOTH, keep_kernels
from llm_pruner.settings.compress import CompressSettings

if TYPE_CHECKING:
    from llm_pruner.evaluation.perplexity import PerplexityResult
    from llm_pruner.report.records import Compressed

EXAMPLES = """\b
Examples:
  llm-pruner compress default --out small --time-budget 30m
  llm-pruner compress ./llama --out small --ratio 0.3 --data alpaca.jsonl
  llm-pruner compress ./llama --out small --calibration c4 \\
      --perplexity wikitext2 --tasks paper
  llm-pruner compress qwen --out small --params 1.42B \\
      --vocab-text c4 --vocab-text code --set vocab_size=49152
"""


def run(settings: CompressSettings, json: str | None) -> None:
    """Make a smaller model: prune, recover, evaluate, report.

    An interrupted run goes on when the same command is given again.
    """
    keep_kernels(BOTH)
    settings.check()
    from llm_pruner.commands.compress import compress
    from llm_pruner.commands.workdir import COMPRESSING

    with telling_how_to_go_on(COMPRESSING, settings.out, restart=settings.restart):
        done = compress(
            settings,
            command=command_line(),
            tell=tell_stage,
            say=Narrator(quiet=True),
            going_on=tell_going_on,
        )
    for note in done.notes:
        warn(note)
    hand_over(done, json, show)


def show(done: Compressed) -> None:
    """Print the models beside each other, and what it took."""
    out = Screen()
    out.model(done.model, done.parameters.before, done.parameters.after)
    found = list(done.measured.values())
    rows = [
        ("parameters", *(count(one.parameters) for one in found)),
        ("size on disk", *(megabytes(one.bytes) if one.bytes else "-" for one in found)),
    ]
    # A token of one vocabulary is not one of the other.
    shown, form = ("perplexity", _perplexity) if done.tokens is None else ("bits per byte", _bits)
    if done.tokens is not None:
        kept = [f"{done.tokens.after:,}"] * (len(found) - 1)
        rows.append(("tokens", f"{done.tokens.before:,}", *kept))
    for texts in zip(*(one.perplexity for one in found), strict=True):
        rows.append((f"{shown}, {texts[0].corpus}", *map(form, texts)))
    for tasks in zip(*(one.zero_shot.tasks for one in found if one.zero_shot), strict=True):
        metric = tasks[0].paper_metric or next(iter(tasks[0].metrics))
        values = (f"{task.metrics[metric].value:.4f}" for task in tasks)
        rows.append((f"{tasks[0].task}, {metric}", *values))
    for what in ("prefill", "decode"):
        speeds = (getattr(one.speed, f"{what}_tokens_per_second", None) for one in found)
        values = ("-" if speed is None else f"{speed:.1f}" for speed in speeds)
        rows.append((f"{what} tokens/s", *values))
    out.table("Before and after", ("", *done.measured), rows)
    for text, last in zip(found[0].perplexity, found[-1].perplexity, strict=True):
        tokens = f"{text.tokens:,}" + ("" if done.tokens is None else f" -> {last.tokens:,}")
        out.print(f"{clean(text.corpus)}: {tokens} tokens in windows of {text.window}")
    show_control(out, None if done.recovery is None else done.recovery.control)
    took = ", ".join(f"{name} {one:.0f}" for name, one in done.seconds.items() if one >= 0.5)
    out.print(f"seconds: {took}; {sum(done.seconds.values()):.0f} in all", soft_wrap=False)
    if done.peak_bytes:
        out.print(f"peak memory: {megabytes(done.peak_bytes)}")
    out.places(done.path, done.report)


def _perplexity(found: PerplexityResult) -> str:
    return measured(found.perplexity, found.stderr, ".2f")


def _bits(found: PerplexityResult) -> str:
    return "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
