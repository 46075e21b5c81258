"""The arguments of the Trainer: what follows from the settings, and what ``--trainer`` gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from llm_pruner.errors import UserError
from llm_pruner.settings.limits import check_installed
from llm_pruner.settings.options import near
from llm_pruner.settings.recover import TrainingSettings


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
    given: dict[str, Any] = {}
    named = {one.partition("=")[0]: one.partition("=")[2] for one in settings.trainer}
    if "lr_scheduler_type" in named and "schedule" in settings.given:
        raise UserError(
            f"--schedule {settings.schedule} and --trainer lr_scheduler_type both name a schedule; "
            "give one of them"
        )
    for one in settings.trainer:
        name, _, text = one.partition("=")
        said = _said_of_name(name, named, settings) or _said_of_schedule(name, text, settings)
        if said is None:
            given[name] = _value(one, name, text)
            said = _said_of_value(name, text, given[name], named)
        if said is not None:
            raise UserError(f"--trainer {one}{said}")
    return given


def _said_of_name(name: str, named: Collection[str], settings: TrainingSettings) -> str | None:
    """Return why recover does not take an argument of this name; None if it does."""
    known = [field.name for field in fields(TrainingArguments)]
    if name not in known:
        return (
            f": TrainingArguments has no {name}; {near(name, known)}look at its page in "
            "transformers' documentation"
        )
    if _UNREAD.fullmatch(name):
        return f": recover lays out its own steps, in which {name} does nothing; leave it out"
    if name in _set_here(settings) or (name == "warmup_steps" and "lr_scheduler_type" not in named):
        return f": recover sets {name} itself; use its own option"
    return None


def _said_of_schedule(name: str, text: str, settings: TrainingSettings) -> str | None:
    """Return why recover cannot follow a schedule; None if it can, or this is none."""
    if name != "lr_scheduler_type":
        return None
    if text in _BY_SCORES:
        return (
            " follows scores that the Trainer takes, and recover takes its own; name another, or "
            "use --schedule"
        )
    if settings.max_minutes and not _STEADY.fullmatch(text):
        return (
            " falls over a number of steps, which --max-minutes finds on the way; use --max-steps, "
            "or leave it out: --schedule follows the clock"
        )
    return None


def _value(one: str, name: str, text: str) -> Any:
    """Return what a text says, as of the type that an argument has; UserError if it is not."""
    kind = get_type_hints(TrainingArguments)[name]
    try:
        value = yaml.load(text, _Yaml)
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        words = str in (kind, *get_args(kind)) and "dict" not in str(kind)
        return adapter.validate_python(text if words and isinstance(value, int | float) else value)
    except yaml.YAMLError:
        raise UserError(
            f"--trainer {one}: {text} is no YAML; close what it opens, or quote it"
        ) from None
    except ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input should be ").split(",")[0]
        raise UserError(f"--trainer {one}: {text} is not {wanted}; give one") from None


def _said_of_value(name: str, text: str, value: Any, named: Mapping[str, str]) -> str | None:
    """Return why recover does not take a value; None if it does. UserError lacks a package."""
    if name == "lr_scheduler_kwargs" and "lr_scheduler_type" not in named:
        return (
            " is for a schedule of the Trainer; name that with --trainer lr_scheduler_type=..., or "
            "use --schedule"
        )
    if name == "neftune_noise_alpha" and not (value or 1) > 0:
        return ": noise is above 0; correct it, or leave it out"
    if name == "optim_target_modules" and not _OF_SOME_MODULES.fullmatch(named.get("optim", "")):
        return (
            " is for optimizers such as galore_adamw; name one with --trainer optim=..., or leave "
            "it out"
        )
    if name == "use_liger_kernel" and value:
        check_installed(f"--trainer {name}={text}", ("liger_kernel",), ", or leave it out")
    if name == "optim" and _OWN_STEP.fullmatch(text):
        return (
            f": {text} steps in a way of its own, which the steps of recover do not follow; name "
            "another optim"
        )
    if name == "optim" and _OF_BITSANDBYTES.fullmatch(text):
        check_installed(f"--trainer {name}={text}", ("bitsandbytes",), ", or name another optim")
    return None


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
        raise refused(settings, error) from error
    args._n_gpu = min(args.n_gpu, 1)  # one model, one device
    if not args.fp16:  # which only --trainer asks for; what a launcher says elsewhere is not asked
        args.mixed_precision = "bf16" if args.bf16 else "no"
    return args


def refused(settings: TrainingSettings, error: Exception) -> UserError:
    """Return what is said where the Trainer does not take what ``--trainer`` gives."""
    said = " ".join(str(error).split())
    return UserError(f"--trainer {' '.join(settings.trainer)}: {said}; correct it")
