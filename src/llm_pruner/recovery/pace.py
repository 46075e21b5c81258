"""How long a training step takes, from those that were timed."""

from __future__ import annotations

TIMED_STEPS = 3
"""Steps that are timed before the first estimate; one before them warms up, and is not counted."""


class Pace:
    """Estimates the seconds of a step, and again whenever as many steps more have been timed.

    The first steps are slower than those to come: each new length of a row has its kernels compiled
    and its memory allocated. So an estimate is the mean of the newer half of the steps (after 3, 6,
    12, 24 steps and so on; the first is of all three).
    """

    def __init__(self) -> None:
        self._warm = False
        self._seconds: list[float] = []

    def after(self, seconds: float) -> float | None:
        """Take in a step; return a new estimate, None if it is not time for one."""
        if not self._warm:
            self._warm = True
            return None
        self._seconds.append(seconds)
        count = len(self._seconds)
        rounds, rest = divmod(count, TIMED_STEPS)
        if rest or rounds & (rounds - 1):
            return None
        newer = self._seconds[-max(TIMED_STEPS, count // 2) :]
        return sum(newer) / len(newer)
