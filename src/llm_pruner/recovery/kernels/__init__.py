"""Faster arithmetic for training, each part with a switch of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from llm_pruner.recovery.kernels.chunked_loss import logits_at_once
from llm_pruner.runtime.attention import by_sample
from llm_pruner.runtime.processes import Processes
from llm_pruner.settings.recover import TrainingSettings


@contextmanager
def kernels(settings: TrainingSettings, processes: Processes) -> Iterator[None]:
    """Have training use the arithmetic that was asked for until the block ends.

    Where processes hold parts of each weight, only a model's own forward pass puts them together,
    and logits are made within it.
    """
    with ExitStack() as chosen:
        if not settings.uses("loss") or processes.sharded:
            chosen.enter_context(logits_at_once())
        if settings.uses("attention"):
            chosen.enter_context(by_sample())
        yield
