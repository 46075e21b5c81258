"""``llm-pruner recover``: train a pruned model, and keep it only if it became better."""

from __future__ import annotations

import sys
from math import exp, inf
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, command_line, hand_over, speaks, warn
from llm_pruner.errors import Interrupted
from llm_pruner.files.disk import placed
from llm_pruner.report.text import clean, count
from llm_pruner.runtime.memory import TRAINING, keep_kernels
from llm_pruner.settings.recover import RecoverSettings

if TYPE_CHECKING:
    from llm_pruner.recovery import Progress
    from llm_pruner.report.records import Control, Recovered

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
    from llm_pruner.commands.recover import recover_checkpoint
    from llm_pruner.commands.workdir import RECOVERING
    from llm_pruner.evaluation.result_cache import shared_corpora

    say = Narrator(quiet=json == "-") if speaks() else lambda _: None
    try:
        done = recover_checkpoint(settings, command=command_line(), say=say)
    except KeyboardInterrupt:
        if settings.out.resolve() in placed or not RECOVERING.beside(settings.out).is_dir():
            raise
        raise Interrupted("interrupted; go on with --resume") from None
    if not speaks():
        return
    for warning in shared_corpora(str(done.path), settings.perplexity):
        warn(warning)
    if not done.gained:
        alone = " and no adapter" if settings.keep_adapter else ""
        warn(
            f"training brought no gain (held-out loss {done.loss.before:.4f} before, "
            f"{done.loss.after:.4f} after), so {done.path} holds the model as it came{alone}; use "
            "more data, another --learning-rate or more steps"
        )
    hand_over(done, json, show)


class Narrator:
    """Tells standard error how training goes: a line that is rewritten, and one for each score."""

    def __init__(self, quiet: bool) -> None:
        self._live = sys.stderr.isatty()
        self._silent = quiet and not self._live
        self._first: dict[bool, tuple[int, float, int]] = {}

    def __call__(self, progress: Progress) -> None:
        if self._silent:
            return
        run, step = progress.run, progress.step
        here = (step, run.seconds, run.tokens)
        first = self._first.setdefault(progress.control, here)
        steps, seconds, tokens = (now - then for now, then in zip(here, first, strict=True))
        line = "control: " if progress.control else ""
        line += f"step {step} of {run.total}: loss {progress.loss:.3f}"
        line += f", held-out {run.evaluations[-1].loss:.3f}" if run.evaluations else ""
        if steps and seconds > 0:
            left = (run.total - step) * seconds / steps
            line += f", {tokens / seconds:,.0f} tokens/s, {duration(left)} left"
        if self._live:
            end = "\n"
            if not progress.evaluated:  # of a line that is broken in two only the end is rewritten
                line, end = line[: get_terminal_size().columns - 1], ""
            print(f"\r\x1b[2K{line}", end=end, file=sys.stderr, flush=True)
        elif progress.evaluated:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def show(done: Recovered) -> None:
    """Print what was won, and on which data."""
    out = Screen()
    out.print(
        f"{clean(done.model)}: {done.steps:,} steps, {done.tokens:,} tokens, "
        f"{duration(done.seconds)}; {count(done.trained)} of {count(done.parameters)} "
        "parameters trained"
    )
    rows = [
        (
            *(one.name, f"held out, {one.held_out_samples} samples", f"{one.held_out_tokens:,}"),
            *_change(_exp(one.loss_before), _exp(one.loss_after)),
        )
        for one in done.sources
        if one.loss_before is not None and one.loss_after is not None
    ]
    for text in done.perplexity:
        old, new = text.before, text.after
        what = (old.corpus, f"windows of {old.window}", f"{old.tokens:,}")
        rows.append((*what, *_change(old.perplexity, new.perplexity)))
    columns = ("text", "", "tokens", "before", "after", "change")
    out.table("Perplexity", columns, rows, text=("",))
    show_control(out, done.control)
    if done.stopped is not None:
        out.print(f"ended early: {done.stopped}")
    if done.gained and done.best_step != done.steps:
        out.print(f"the weights of step {done.best_step} were the best and are kept")
    out.places(done.path, done.report, done.bytes)
    out.loads(done.needs)


def show_control(out: Screen, control: Control | None) -> None:
    """Print the dense and the pruned model, each with and without the same training."""
    for four in () if control is None else control.texts:
        out.table(four.title, four.columns, four.cells)
        out.print(f"pruned + training is {four.damage:.3f} times dense + training in perplexity")


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.2f}", f"{after:.2f}", f"{100 * (after / before - 1):+.1f}%"


def _exp(loss: float) -> float:
    return exp(loss) if loss < 700 else inf
