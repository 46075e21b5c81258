"""The Hugging Face Trainer, with packed steps and pickle-free resume."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.errors import UserError
from llm_pruner.recovery import checkpoint as state
from llm_pruner.recovery.chunked_loss import summed_loss
from llm_pruner.recovery.objective import Guide, text_objective
from llm_pruner.recovery.packing import Batch, StepSamples, lay_out, target_tokens
from llm_pruner.recovery.scoring import Evaluation
from llm_pruner.runtime.processes import ALONE, Processes
from llm_pruner.settings.limits import check_installed
from llm_pruner.settings.options import near
from llm_pruner.settings.recover import TrainingSettings

_LOG = logging.getLogger(__name__)


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
    def from_json(cls, data: dict[str, Any]) -> RunState:
        """Read what ``asdict`` gave; UserError if it is something else."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise UserError(
                "the state of the interrupted run is damaged; begin anew with --restart"
            ) from error


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
        folder: state.Folder | None,
        work: Path,
        processes: Processes = ALONE,
        **own: Any,
    ) -> None:
        self.settings, self.run, self.processes = settings, run, processes
        self._teacher, self._folder, self._work = teacher, folder, work
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.last_loss = math.nan
        self._warned = False
        own = {"model": model, "args": args, "train_dataset": steps, "data_collator": _only, **own}
        try:
            super().__init__(**own)
        except (KeyError, TypeError, ValueError) as error:
            if not settings.trainer:
                raise
            raise _refused(settings, error) from error
        self.remove_callback(PrinterCallback)

    # Data and schedule.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the steps, in order and whole: each process takes its share of them."""
        steps: Any = self.train_dataset
        return DataLoader(steps, batch_size=1, collate_fn=_only)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm up, then fall to zero at a last step that may yet move; or as the user named."""
        if "lr_scheduler_type" in trainer_arguments(self.settings):
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except (TypeError, ValueError) as error:  # what the schedule needs, or cannot take
                raise _refused(self.settings, error) from error
        if self.lr_scheduler is None:  # type: ignore[has-type]
            warmup, schedule = self.settings.warmup_steps, self.settings.schedule
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate(step, self.run.total, warmup, schedule),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, *args: Any, **keywords: Any) -> torch.optim.Optimizer:
        """Make the optimizer that was named; UserError if its package is missing or refuses."""
        try:
            return super().create_optimizer(*args, **keywords)
        except (ImportError, KeyError, TypeError, ValueError) as error:
            if not self.settings.trainer:
                raise
            raise _refused(self.settings, error) from error

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
        if self._folder is None:
            return
        path = state.step_folder(self._work, self.state.global_step)
        files = {}
        if self.processes.is_first or self.processes.sharded:  # which takes all to put together
            files["weights"] = state.trained_weights(self.model)
        if self.best_weights is not None:
            files["best"] = self.best_weights
        files["optimizer"], optimizer = state.optimizer_values(
            self.optimizer, keep=self.processes.is_first
        )
        if self.processes.is_first and not path.exists():
            try:
                self._write_checkpoint(path, files, optimizer)
            except OSError as error:
                if not self._warned:
                    _LOG.warning(
                        "the checkpoint of step %d was not written (%s): training goes on, and if "
                        "it is interrupted --resume goes on from the one before; free some space",
                        self.state.global_step,
                        error.strerror,
                    )
                self._warned = True
        self.processes.barrier()

    def _write_checkpoint(
        self, path: Path, files: dict[str, dict[str, torch.Tensor]], optimizer: dict[str, Any]
    ) -> None:
        assert self._folder is not None
        assert self.lr_scheduler is not None
        with self._folder(path) as folder:
            for name, tensors in files.items():
                state.write_tensors(folder / f"{name}.safetensors", tensors)
            values = {
                "run": asdict(self.run),
                "optimizer": optimizer,
                "schedule": self.lr_scheduler.state_dict(),
                "random": state.write_random(folder),
            }
            if self.accelerator.scaler is not None:
                values["scaler"] = self.accelerator.scaler.state_dict()
            state.write_values(folder, values)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        state.drop_older(self._work, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        folder = Path(resume_from_checkpoint)
        state.set_weights_(self.model, state.read_tensors(folder / "weights.safetensors"))
        best = folder / "best.safetensors"
        self.best_weights = state.read_tensors(best) if best.is_file() else None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        values = state.read_values(Path(checkpoint))
        state.read_optimizer_(Path(checkpoint), values["optimizer"], self.optimizer)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict({**values["schedule"], "lr_lambdas": [None]})

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            known = state.read_values(Path(checkpoint)).get("scaler")
            if known is not None:  # earlier versions did not write it
                self.accelerator.scaler.load_state_dict(known)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_random(Path(checkpoint), state.read_values(Path(checkpoint))["random"])


def _set_here(
    settings: TrainingSettings, total: int = 1, output: str = "", on_cpu: bool = True
) -> dict[str, Any]:
    """Return the Trainer's arguments that follow from the settings."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": 1,  # a batch is a whole step
        "max_steps": total,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.epochs,
        "gradient_accumulation_steps": 1,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # with it the loss of such a step is 0
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [] if settings.report_to == "none" else [settings.report_to],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": on_cpu,
        "bf16": bool(settings.bf16),
        "seed": settings.seed,
        "data_seed": settings.seed,
    }


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, as it is in Python."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

_UNREAD = re.compile(
    "label_smoothing_factor|torch_empty_cache_steps|average_tokens_across_devices"
    "|train_sampling_strategy|length_column_name|dataloader_.*|eval_(?!strategy).*|load_best_model_at_end"
    "|metric_for_best_model|greater_is_better|ignore_data_skip|push_to_hub|hub_.*"
    "|save_(steps|total_limit|only_model|on_each_node)|resume_from_checkpoint"
    "|include_num_input_tokens_seen|auto_find_batch_size|do_(train|eval|predict)|\\w+_full_eval"
    "|per_device_eval_batch_size|prediction_loss_only|include_for_metrics|batch_eval_metrics"
    "|enable_jit_checkpoint|restore_callback_states_from_checkpoint|logging_first_step|use_cache"
)
"""The Trainer's arguments that are about its own way through the data and through a step."""

_STEADY = re.compile("constant(_with_warmup)?|inverse_sqrt")
"""Schedules that do not depend on how many steps there will be."""

_BY_SCORES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the Trainer's own scores, of which there are none."""

_OF_SOME_MODULES = re.compile(r"(q?galore|apollo)\w*|lomo|adalomo")
"""Optimizers that read ``optim_target_modules``."""

_OF_BITSANDBYTES = re.compile(
    r"(paged_)?(adamw|lion|ademamix|rmsprop)(_bnb)?_(8|32)bit|ademamix|rmsprop_bnb"
)


_OWN_STEP = re.compile(r"schedule_free_\w+|(ada)?lomo|\w+_layerwise|adamw_torch_[48]bit")
"""Optimizers with weights for training alone, that step as the gradient is computed, or whose state
is in a form of its own."""


def trainer_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """Return what ``--trainer`` gives: name -> value, read as YAML; UserError if it cannot."""
    types = get_type_hints(TrainingArguments) if settings.trainer else {}
    given: dict[str, Any] = {}
    known = [field.name for field in fields(TrainingArguments)]
    names_schedule = any(one.startswith("lr_scheduler_type=") for one in settings.trainer)
    if names_schedule and "schedule" in settings.given:
        raise UserError(
            f"--schedule {settings.schedule} and --trainer lr_scheduler_type both name a schedule; "
            "give one of them"
        )
    for one in settings.trainer:
        name, _, value = one.partition("=")
        if name not in known:
            raise UserError(
                f"--trainer {one}: TrainingArguments has no {name}; {near(name, known)}"
                "look at its page in transformers' documentation"
            )
        if _UNREAD.fullmatch(name):
            raise UserError(
                f"--trainer {one}: recover lays out its own steps, in which {name} does nothing; "
                "leave it out"
            )
        if name == "lr_scheduler_type" and value in _BY_SCORES:
            raise UserError(
                f"--trainer {one} follows scores that the Trainer takes, and recover takes its "
                "own; name another, or use --schedule"
            )
        if name == "lr_scheduler_type" and settings.max_minutes and not _STEADY.fullmatch(value):
            raise UserError(
                f"--trainer {one} falls over a number of steps, which --max-minutes finds on the "
                "way; use --max-steps, or leave it out: --schedule follows the clock"
            )
        if name in _set_here(settings) or (name == "warmup_steps" and not names_schedule):
            raise UserError(f"--trainer {one}: recover sets {name} itself; use its own option")
        try:
            given[name] = _of_type(types[name], yaml.load(value, _Yaml), value)
        except yaml.YAMLError:
            raise UserError(
                f"--trainer {one}: {value} is no YAML; close what it opens, or quote it"
            ) from None
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ").split(",")[0]
            raise UserError(f"--trainer {one}: {value} is not {wanted}; give one") from None
        if not names_schedule and name == "lr_scheduler_kwargs":
            raise UserError(
                f"--trainer {one} is for a schedule of the Trainer; name that with --trainer "
                "lr_scheduler_type=..., or use --schedule"
            )
        if name == "neftune_noise_alpha" and not (given[name] or 1) > 0:
            raise UserError(f"--trainer {one}: noise is above 0; correct it, or leave it out")
        if name == "optim_target_modules" and not any(
            _OF_SOME_MODULES.fullmatch(other.removeprefix("optim=")) for other in settings.trainer
        ):
            raise UserError(
                f"--trainer {one} is for optimizers such as galore_adamw; name one with --trainer "
                "optim=..., or leave it out"
            )
        if name == "use_liger_kernel" and given[name]:
            check_installed(f"--trainer {one}", ("liger_kernel",), ", or leave it out")
        if name == "optim" and _OWN_STEP.fullmatch(value):
            raise UserError(
                f"--trainer {one}: {value} steps in a way of its own, which the steps of recover "
                "do not follow; name another optim"
            )
        if name == "optim" and _OF_BITSANDBYTES.fullmatch(value):
            check_installed(f"--trainer {one}", ("bitsandbytes",), ", or name another optim")
    return given


def _of_type(kind: Any, value: Any, text: str) -> Any:
    """Return ``value``, or the ``text`` that it was read from, as of a type; or ValidationError."""
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    names = str in (kind, *get_args(kind)) and "dict" not in str(kind)
    return adapter.validate_python(text if names and isinstance(value, (int, float)) else value)


def training_arguments(
    settings: TrainingSettings, total: int, unused: str, work: Path, *, on_cpu: bool
) -> TrainingArguments:
    """Return the Trainer's arguments for a run of ``total`` steps; UserError if it takes one not.

    ``unused`` is an empty folder, since checkpoints are written by the trainer's own methods;
    TensorBoard writes to ``runs`` and the name of ``work``, where it runs.
    """
    output = unused if settings.report_to == "none" else str(Path("runs") / work.name)
    values = {
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_broadcast_buffers": False,  # they do not change
        "warmup_steps": min(settings.warmup_steps, total // 10),  # of a schedule that is named
        **trainer_arguments(settings),
        **_set_here(settings, total, output, on_cpu),
    }
    try:
        args = TrainingArguments(**values)
    except (ImportError, TypeError, ValueError) as error:
        raise _refused(settings, error) from error
    args._n_gpu = min(args.n_gpu, 1)  # one model, one device
    if not args.fp16:  # which only --trainer asks for; what a launcher says elsewhere is not asked
        args.mixed_precision = "bf16" if args.bf16 else "no"
    return args


def _refused(settings: TrainingSettings, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    return UserError(f"--trainer {' '.join(settings.trainer)}: {said}; correct it")


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
