"""The Hugging Face Trainer, with packed steps and checkpoints of the trained weights alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.errors import UserError
from llm_pruner.files.disk import put
from llm_pruner.recovery import checkpoint as state
from llm_pruner.recovery.arguments import said_in_one_line
from llm_pruner.recovery.chunked_loss import summed_loss
from llm_pruner.recovery.objective import Guide, text_objective
from llm_pruner.recovery.packing import Batch, StepSamples, lay_out, target_tokens
from llm_pruner.recovery.scoring import Evaluation
from llm_pruner.runtime.processes import ALONE, Processes
from llm_pruner.settings.recover import TrainingSettings

_LOG = logging.getLogger(__name__)

_WEIGHTS, _BEST, _RUN = "weights.safetensors", "best.safetensors", "run.json"
"""What a checkpoint holds beside the Trainer's own files."""


@dataclass
class RunState:
    """What changes while a run goes on, and is kept in its checkpoints.

    Attributes:
        total: steps that the run will have.
        every: steps between evaluations.
        evaluations: in order, the first before training.
        best: index of the best of them.
        seconds: time spent in this and earlier processes, evaluations included.
        tokens: tokens trained on, padding left out.
        before: score of the model that came in; None before it was measured.
        seconds_to_score: how long the last score took.
        seconds_to_judge: how long that of the model that came in took, in the type of its weights,
            as the last one will be.
        stopped: why the run ended before its steps were done; None if it did not.
        planned: whether the first plans are over. From then on the run is scored, and the rest of
            it planned anew at each score, if it is planned by the clock.
    """

    total: int
    every: int
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    tokens: int = 0
    stopped: str | None = None
    planned: bool = True
    before: Evaluation | None = None
    seconds_to_score: float = 0.0
    seconds_to_judge: float = 0.0

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        """Read what a checkpoint keeps of it."""
        return TypeAdapter(cls).validate_json((checkpoint / _RUN).read_text())


class Steps(Dataset[list[Batch]]):
    """One item is one optimizer step: the batches of its samples."""

    def __init__(self, sequences: Sequence[TrainingSequence], steps: StepSamples, **layout: Any):
        self._sequences, self._steps, self._layout = sequences, steps, layout

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> list[Batch]:
        return lay_out(self._sequences, self._steps[index], **self._layout)


class RecoveryTrainer(Trainer):
    """A Trainer whose batches are whole optimizer steps, laid out by ``lay_out``.

    Loss of a step: sum over its learned tokens, divided by their number; so it does not depend on
    how the samples are spread over forward passes and processes.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        settings: TrainingSettings,
        steps: Steps,
        run: RunState,
        teacher: Guide | None,
        work: Path | None,
        processes: Processes = ALONE,
        **own: Any,
    ) -> None:
        self.settings, self.run, self.processes = settings, run, processes
        self._teacher, self._work = teacher, work
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.last_loss = math.nan
        own = {"model": model, "args": args, "train_dataset": steps, "data_collator": _only, **own}
        with said_in_one_line(settings):
            super().__init__(**own)
        self.remove_callback(PrinterCallback)

    # Data and schedule.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the steps, in order and whole: each process takes its share of them."""
        steps: Any = self.train_dataset
        return DataLoader(steps, batch_size=1, collate_fn=_only)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Follow ``rate`` where the schedule is linear or cosine, else the Trainer's own."""
        schedule = self.args.lr_scheduler_type
        if schedule not in ("linear", "cosine"):
            with said_in_one_line(self.settings):
                return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:  # type: ignore[has-type]
            warmup = self.args.get_warmup_steps(self.run.total)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate(step, self.run.total, warmup, schedule),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, *args: Any, **keywords: Any) -> torch.optim.Optimizer:
        """Make the optimizer that was named; UserError if its package is missing or refuses."""
        with said_in_one_line(self.settings):
            return super().create_optimizer(*args, **keywords)

    # One step.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        """Run forward and backward over this process's batches of a step; return its mean loss."""
        model.train()
        if self.processes.count > 1:  # dropout of each its own, also after a resume
            step = self.state.global_step + 1
            torch.manual_seed(self.settings.seed + 1_000_003 * step + self.processes.rank)
        batches: list[Batch] = inputs["batches"]
        count = sum(batch.targets for batch in batches)
        self.run.tokens += sum(batch.tokens for batch in batches)
        # A process without a batch runs one for nothing: the others await its gradient.
        own = self.processes.share(batches)
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(own):
            # Processes add up their gradients at the last batch; of parts of weights at each one.
            stay = number < len(own) - 1 and not self.processes.sharded
            with self.accelerator.no_sync(model) if stay else nullcontext():
                with self.compute_loss_context_manager():
                    if batch is None:
                        loss = 0 * self._loss(model, batches[0], None)
                    else:
                        loss = self._loss(model, batch, self._teacher) / count
                # DDP and FSDP divide the sum of the gradients by the number of processes.
                self.accelerator.backward(loss * self.processes.count)
            total += loss.detach().to(total.device)
        (self.last_loss,) = self.processes.sums([float(total)])
        if not math.isfinite(self.last_loss):
            said = f"the loss of step {self.state.global_step + 1} is {self.last_loss}"
            if self.state.global_step == 0:
                raise UserError(f"{said}; look at the data, or use --dtype float32")
            # The weights from here on are lost; the best before may still be a gain.
            self.run.stopped = f"{said}; a lower --learning-rate goes further"
        return torch.tensor(self.last_loss, device=self.args.device)

    @staticmethod
    def _loss(model: Any, batch: Batch, teacher: Guide | None) -> torch.Tensor:
        by_text = text_objective(target_tokens(batch))
        return summed_loss(model, batch, teacher.objective(batch) if teacher else by_text)

    def compute_loss_context_manager(self) -> Any:
        """Return a step's precision, output embedding and teacher included, unlike accelerate's."""
        return self.accelerator.autocast()

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Nothing reads it."""
        return 0

    # Checkpoints.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002
        """Write all that ``train(resume_from_checkpoint=...)`` reads, whole or not at all."""
        if self._work is None:
            return
        path = state.step_folder(self._work, self.state.global_step)
        if path.exists():
            return
        partial = path.with_name(f".{path.name}")
        partial.mkdir(exist_ok=True)
        weights = state.trained_weights(self.model)
        try:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if self.processes.is_first:
                save_file(weights, partial / _WEIGHTS)
                if self.best_weights is not None:
                    save_file(self.best_weights, partial / _BEST)
                (partial / _RUN).write_text(json.dumps(asdict(self.run)))
                self.state.save_to_json(str(partial / "trainer_state.json"))
        except (OSError, RuntimeError) as error:
            _LOG.warning(
                "the checkpoint of step %d was not written (%s); training goes on, and --resume "
                "would go on from the one before",
                self.state.global_step,
                error,
            )
            return
        self.processes.barrier()
        if self.processes.is_first:
            put(partial, path)
            state.drop_older(self._work, path)
        self.processes.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        folder = Path(resume_from_checkpoint)
        state.set_weights_(self.model, load_file(folder / _WEIGHTS))
        best = folder / _BEST
        self.best_weights = load_file(best) if best.is_file() else None


def rate(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    Linear from 1/w at the first of w warm-up steps to 1, where w is at most a tenth of the run;
    then 1 - x (linear) or (1 + cos(pi x)) / 2 (cosine), where x is the share of the rest that is
    done.
    """
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def _only(items: list[Any]) -> dict[str, Any]:
    return {"batches": items[0]}
