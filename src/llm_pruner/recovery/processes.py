"""Several processes that train one model: each holds it whole and runs its share of a step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from llm_pruner.errors import UserError

_PATIENCE = timedelta(days=7)
"""How long a process waits for another: the first one may be writing text for hours."""

_OTHER_KINDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Who this process is among those that train together; alone, nothing here does anything.

    What is asked of all processes (all but ``share``) must be asked by each of them, in the same
    order.

    Attributes:
        rank: number of this process; the first, 0, writes and speaks.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that are this process's to do."""
        return items[self.rank :: self.count]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64, the same to the bit in each of them."""
        if self.count == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(every, own)
        return [float(value) for value in torch.stack(every).sum(0)]

    def from_first(self, value: float) -> float:
        """Return the first process's value."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        distributed.broadcast(shared, src=0)
        return float(shared)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sums([0.0])

    @contextmanager
    def first(self) -> Iterator[None]:
        """Have the first process run the block before the others do.

        If it fails there, the others run into the same and end alike.
        """
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
    if _started() > 1:
        raise UserError(
            f"{command} runs in one process, and several were started; start it without "
            "torchrun or accelerate launch, or prune first and start recover with them"
        )


def own_device(device: str) -> str:
    """Return the device of this process: of several, each has the GPU of its own number.

    Raises:
        UserError: there is no such device, or it is one for all.
    """
    if _started() == 1:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if device != "cuda":
        raise UserError(
            f"--device {device} is one device, and several processes were started; use cuda, "
            "which gives each process its own GPU, or cpu"
        )
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"--device cuda: this machine has {there} GPUs and more processes were started; "
            "start one process for each GPU"
        )
    return f"cuda:{number}"


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun or accelerate started; part when the block ends well.

    Args:
        device: this process's, as from ``own_device``.

    Raises:
        UserError: they were started for something else than data parallel training, or by
            something that did not say where they meet.
    """
    for variable, kind in _OTHER_KINDS.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise UserError(
                f"recover trains several processes with DDP, and {kind} was asked for; "
                "choose multi-GPU or multi-CPU in accelerate config, or start with torchrun"
            )
    if _started() == 1:
        yield Processes()
        return
    alone = not distributed.is_initialized()
    if alone:
        _join(device)
    yield Processes(distributed.get_rank(), distributed.get_world_size())
    if alone:
        distributed.destroy_process_group()


def _join(device: str) -> None:
    on_gpus = device.startswith("cuda")
    try:
        if on_gpus:
            torch.cuda.set_device(device)
        # What this module sends lies on the CPU; gradients lie where the model does.
        distributed.init_process_group("cuda:nccl,cpu:gloo" if on_gpus else "gloo", None, _PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"WORLD_SIZE says that {_started()} processes were started, and they cannot meet "
            f"({reason}); start them with torchrun or accelerate launch"
        ) from error


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
