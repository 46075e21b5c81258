"""The arguments of transformers' Trainer: what settings decide, and what ``--trainer`` gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llm_pruner.errors import UserError
from llm_pruner.settings.options import near
from llm_pruner.settings.recover import TrainingSettings

_OWN = {
    "learning_rate": "--learning-rate",
    "num_train_epochs": "--epochs",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device",
    "output_dir": "--out",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--batch-size",
}
"""Arguments that have an option of their own."""


def check_names(settings: TrainingSettings) -> None:
    """Raise UserError for a name in ``--trainer`` that the Trainer does not know."""
    known = [field.name for field in fields(TrainingArguments)]
    for name, value in settings.trainer.items():
        if name in _OWN:
            raise UserError(f"--trainer {name}={value}: use {_OWN[name]}")
        if name not in known:
            raise UserError(
                f"--trainer {name}={value}: TrainingArguments has no {name}; {near(name, known)}"
                "its page in transformers' documentation lists all"
            )


def training_arguments(
    settings: TrainingSettings,
    *,
    total: int = 1,
    unused: str = "",
    work: Path = Path("recover"),
    on_cpu: bool = True,
) -> TrainingArguments:
    """Return the Trainer's arguments for a run of ``total`` steps.

    Args:
        unused: an empty folder, as the output of a run that reports to nobody; else that is
            ``runs`` and the name of ``work``.

    Raises:
        UserError: TrainingArguments refuses a value.
    """
    check_names(settings)
    reports = settings.trainer.get("report_to", "none") not in ("none", [])
    values: dict[str, Any] = {
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_broadcast_buffers": False,  # they do not change
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **settings.trainer,
        "output_dir": str(Path("runs") / work.name) if reports else unused,
        "per_device_train_batch_size": 1,  # a batch is a whole step
        "gradient_accumulation_steps": 1,
        "max_steps": total,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # with it the loss of such a step is 0
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": on_cpu,
        "bf16": bool(settings.bf16),
        "seed": settings.seed,
        "data_seed": settings.seed,
    }
    with said_in_one_line(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing has a newer name
        if values["warmup_steps"] >= 1:  # less is a share of the run
            values["warmup_steps"] = min(values["warmup_steps"], total // 10)
        args = TrainingArguments(**values)
    args._n_gpu = min(args.n_gpu, 1)  # one model, one device
    if not args.fp16:  # the precision of a launcher's configuration does not count
        args.mixed_precision = "bf16" if args.bf16 else "no"
    return args


@contextmanager
def said_in_one_line(settings: TrainingSettings) -> Iterator[None]:
    """Turn what the Trainer says to its arguments into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        given = " ".join(f"{name}={value}" for name, value in settings.trainer.items())
        raise UserError(f"--trainer {given}: {said}; correct it") from error
