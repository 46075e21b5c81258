"""How long a training step takes, from those that were timed."""

from __future__ import annotations

TIMED_STEPS = 3
"""Steps that are timed before the first estimate; one before them warms up, and is not counted."""


class Pace:
    """Estimates the seconds of a step.

    The first steps are slower than those to come: each new length of a row has its kernels compiled
    and its memory allocated; and a machine's speed drifts. So an estimate is the mean of the newer
    half of the steps, of the first three at least.
    """

    def __init__(self) -> None:
        self._warm = False
        self._seconds: list[float] = []

    def add(self, seconds: float) -> bool:
        """Take in a step; return whether to estimate anew: after 3 steps, 6, 12, 24 and so on."""
        if not self._warm:
            self._warm = True
            return False
        self._seconds.append(seconds)
        rounds, rest = divmod(len(self._seconds), TIMED_STEPS)
        return not rest and not rounds & (rounds - 1)

    def estimate(self) -> float | None:
        """Return the seconds of a step; None before enough of them were timed."""
        if len(self._seconds) < TIMED_STEPS:
            return None
        newer = self._seconds[-max(TIMED_STEPS, len(self._seconds) // 2) :]
        return sum(newer) / len(newer)
