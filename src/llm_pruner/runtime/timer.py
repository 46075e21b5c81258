"""How long each stage of a run takes."""

from __future__ import annotations

import time

from llm_pruner.runtime.memory import give_back


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Book the time since the last call on a stage; leave the next one its memory."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        give_back()
