"""Several processes at one model: each holds it whole and runs its share of the text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather
from torch import distributed

from llm_pruner.errors import UserError, in_short

_PATIENCE = timedelta(days=7)
"""How long a process waits for another: the first one may be writing text for hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Who this process is among those that work together; alone, nothing here does anything.

    What is asked of all processes (all but ``share``) must be asked by each of them, in the same
    order.

    Attributes:
        rank: number of this process; the first, 0, writes and speaks.
        count: number of processes.
        sharded: whether each holds a part of every weight (FSDP2), and not the whole model.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T | None]:
        """Return what is this process's to do; None, for nothing, where all must run the model."""
        own: list[T | None] = list(items[self.rank :: self.count])
        least = -(-len(items) // self.count) if self.sharded else 1
        return own + [None] * (least - len(own))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64, the same to the bit in each of them."""
        if self.count == 1:
            return list(values)
        own = torch.tensor([values], dtype=torch.float64, device=PartialState().device)
        return [float(value) for value in gather(own).sum(0)]

    def from_first(self, value: float) -> float:
        """Return the first process's value."""
        if self.count == 1:
            return value
        own = torch.tensor([value], dtype=torch.float64, device=PartialState().device)
        return float(broadcast(own))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sums([0.0])

    @contextmanager
    def first(self) -> Iterator[None]:
        """Have the first process run the block before the others; they fail alike."""
        if not self.is_first:
            self.barrier()
        try:
            yield
        except Exception:
            if self.is_first:
                self.barrier()
            raise
        if self.is_first:
            self.barrier()


ALONE = Processes()
"""One process."""


def only_one(command: str) -> None:
    """Raise UserError if several processes run a command that is for one."""
    if started() > 1:
        raise UserError(
            f"{command} runs in one process, and several were started; start it without "
            "torchrun or accelerate launch"
        )


def new_python(code: str) -> list[str]:
    """Return the command that runs code in a Python with our modules, not the folder's."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!a}\n{code}"]


def started() -> int:
    """Return how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """Return the device of this process, of several the GPU of its number; UserError if none.

    Where each is to hold a part of every weight, the model begins on the CPU.
    """
    if started() == 1:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or is_sharded():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that a launcher started, on ``device``; part when the block ends well.

    Raises UserError if they cannot meet.
    """
    if started() == 1:
        yield Processes()
        return
    sharded = is_sharded()
    if sharded:
        # Each process reads the model whole; accelerate would take buffers for parts of it.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    alone = not distributed.is_initialized()
    try:
        on_cpu = not device.startswith("cuda") and not sharded
        state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        AcceleratorState._reset_state(reset_partial_state=True)
        raise UserError(
            f"WORLD_SIZE says that {started()} processes were started, and they cannot meet "
            f"({in_short(error)}); start them with torchrun or accelerate launch"
        ) from error
    yield Processes(state.process_index, state.num_processes, sharded)
    if alone:
        state.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def check_trains(device: str) -> None:
    """Raise UserError for a GPU that the Trainer would not train on: of one process, the first."""
    kind, _, number = device.partition(":")
    if started() == 1 and kind == "cuda" and number not in ("", "0"):
        raise UserError(
            f"--device {device}: training takes the first GPU that it sees; set "
            f"CUDA_VISIBLE_DEVICES={number} and use --device cuda"
        )


def is_sharded() -> bool:
    """Whether each process is to hold a part of every weight."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    return started() > 1 and asked
