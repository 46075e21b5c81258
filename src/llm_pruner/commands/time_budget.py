"""Dividing a time between the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SHORTEST = 60.0
"""Seconds below which training is not begun."""

WRITING = 1 / 3
"""Share of the time for recovery in which the dense model may write text to train on."""

_STARTING = 10.0
"""Seconds for what is not timed: starting Python, and drawing the report."""


def time_to_recover(
    budget: float, spent: float, stages: Mapping[str, float], pruning: Mapping[str, float]
) -> float:
    """Return the seconds that writing text and training may take; negative if none are left.

    What is kept back: measuring the recovered model as long as the pruned one took; loading it with
    its teacher and reading it again if there was no gain; saving.

    Args:
        budget: for the whole run.
        spent: until now.
        stages: seconds of the stages until now.
        pruning: seconds of the parts of pruning.
    """
    around = 3 * pruning.get("load", 0.0) + pruning.get("save", 0.0)
    return budget - spent - 1.1 * stages.get("pruned", 0.0) - around - _STARTING


def chunks_in_time(
    there: int,
    most: int,
    seconds: float,
    write: Callable[[int], Any],
    clock: Callable[[], float],
    *,
    longest: float = 0.0,
) -> int:
    """Write chunks of text while time lasts, the first in any case; return how many there are then.

    Args:
        there: chunks that exist.
        most: chunks that are enough.
        seconds: time to write more.
        write: makes the chunk of this number.
        clock: seconds since some beginning.
        longest: seconds that a chunk takes, as far as that is known before.
    """
    begin = last = clock()
    while there < most and (there == 0 or last - begin + longest <= seconds):
        write(there)
        there += 1
        now = clock()
        longest, last = max(longest, now - last), now
    return there
