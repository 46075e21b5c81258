"""How training goes, on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_pruner.recovery import Progress


class Narrator:
    """Tells standard error how training goes: a line that is rewritten, and one for each score."""

    def __init__(self, quiet: bool) -> None:
        self._live = sys.stderr.isatty()
        self._silent = quiet and not self._live
        self._first: tuple[int, float, int] | None = None

    def __call__(self, progress: Progress) -> None:
        if self._silent:
            return
        run, step = progress.run, progress.step
        if self._first is None:
            self._first = (step, run.seconds, run.tokens)
        steps, seconds, tokens = (
            now - then
            for now, then in zip((step, run.seconds, run.tokens), self._first, strict=True)
        )
        line = f"step {step} of {run.total}: loss {progress.loss:.3f}"
        line += f", held-out {run.evaluations[-1].loss:.3f}" if run.evaluations else ""
        if steps and seconds > 0:
            left = (run.total - step) * seconds / steps
            line += f", {tokens / seconds:,.0f} tokens/s, {duration(left)} left"
        if self._live:
            end = "\n" if progress.evaluated else ""
            print(f"\r\x1b[2K{line}", end=end, file=sys.stderr, flush=True)
        elif progress.evaluated:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
