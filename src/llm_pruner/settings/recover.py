"""What ``recover`` can be asked for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from llm_pruner.errors import UserError
from llm_pruner.settings.common import (
    DTYPE,
    LOADING,
    OUTPUT,
    ModelSettings,
    Names,
    OutputSettings,
    Sources,
)
from llm_pruner.settings.limits import MOST, MOST_MINUTES, check_number, check_seed
from llm_pruner.settings.options import Settings, option, presets_in
from llm_pruner.settings.registry import METHODS

_DATA, _TRAINING, _BUDGET = "Data", "Training", "Budget"
_TEACHER, _LORA = "Teacher", "Adapters"

_TRACKERS = {
    "none": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")},
}
"""What the Trainer reports to -> packages of which it needs one."""

_QUANTIZERS = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Type of weights that are not trained -> package that multiplies by them."""

KERNELS = ("attention", "loss")
"""Parts of training that have a faster arithmetic, each with a switch of its own."""


class TrainingSettings(Settings):
    """How a model is trained."""

    presets: ClassVar = presets_in("presets/recover")
    default_preset: ClassVar = "quick"

    preset: str | None = option(
        None,
        "quick: minutes on a CPU; paper: LLM-Pruner's two epochs in batches of 64; or a YAML file. "
        "Options given beside it win.",
        "NAME",
        panel=_TRAINING,
    )
    method: str = option(
        "lora",
        f"{' or '.join(METHODS)}: all weights, or adapters beside the linear layers.",
        "NAME",
        panel=_TRAINING,
        known=METHODS,
    )
    learning_rate: float = option(
        1e-3,
        "At its peak.",
        "RATE",
        panel=_TRAINING,
        shown="1e-3 for quick, 1e-4 for paper, less for full",
    )
    warmup_steps: int = option(
        10,
        "Steps to reach it, at most a tenth of the run.",
        "N",
        panel=_TRAINING,
        shown="10; 100 for paper",
    )
    schedule: Literal["linear", "cosine"] = option(
        "cosine",
        "How it falls to zero: linear or cosine.",
        "NAME",
        panel=_TRAINING,
        shown="cosine; linear for paper",
    )
    batch_size: int = option(4, "Samples in a step.", "N", panel=_TRAINING, shown="4; 64 for paper")
    seq_len: int = option(
        512,
        "Longest sample, and length of a packed row, in tokens.",
        "N",
        panel=_TRAINING,
        shown="512; 256 for paper",
    )
    weight_decay: float = option(0.0, "Of AdamW.", "X", panel=_TRAINING)
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm.", "X", panel=_TRAINING, hidden=True
    )
    bf16: bool | None = option(
        None,
        "Compute in bfloat16; weights keep their type.",
        panel=_TRAINING,
        shown="where the processor is faster at it",
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them.", panel=_TRAINING
    )
    quantize: Literal["none", "int8", "nf4"] = option(
        "none",
        "Hold the weights that are not trained in int8 (torchao) or nf4 (bitsandbytes, QLoRA). "
        "What was learned is merged into the weights as they came.",
        "TYPE",
        panel=_TRAINING,
    )
    micro_tokens: int | None = option(
        None,
        "Tokens in one forward pass.",
        "N",
        hidden=True,
    )
    packing: bool = option(
        True, "Several samples in a row, where the model keeps them apart.", hidden=True
    )
    kernels: Names = option(
        KERNELS, f"Faster arithmetic: {', '.join(KERNELS)}.", "NAME", hidden=True
    )
    report_to: str = option(
        "none",
        f"{', '.join(_TRACKERS)}.",
        "NAME",
        panel=_TRAINING,
        known=tuple(_TRACKERS),
    )
    trainer: Sources = option(
        (),
        "Any other argument of transformers' TrainingArguments, such as optim=adamw_8bit or "
        "lr_scheduler_type=constant. May be given several times.",
        "NAME=VALUE",
        panel=_TRAINING,
    )
    seed: int = option(0, "Of the data's order and the adapters.", "N", panel=_TRAINING)
    epochs: float = option(1, "Passes over the data.", "X", panel=_BUDGET, shown="1; 2 for paper")
    max_steps: int | None = option(None, "At most this many.", "N", panel=_BUDGET)
    max_minutes: float | None = option(
        None,
        "End training, evaluated, within this time; the run is planned to fit.",
        "X",
        panel=_BUDGET,
    )
    evaluations: int = option(
        10, "Times the held-out examples are scored on the way.", "N", panel=_BUDGET
    )
    patience: int = option(3, "Stop when so many scores brought no gain.", "N", panel=_BUDGET)
    save_every: int | None = option(
        None, "Steps between checkpoints.", "N", panel=_BUDGET, shown="at each score"
    )
    lora_r: int = option(8, "Rank.", "N", panel=_LORA)
    lora_alpha: float = option(16.0, "Scale times rank.", "X", panel=_LORA)
    lora_dropout: float = option(
        0.0, "Of what they read.", "SHARE", panel=_LORA, shown="0; 0.05 for paper"
    )

    def uses(self, kernel: str) -> bool:
        """Whether a part of training has its faster arithmetic."""
        return kernel in self.kernels

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a preset with the learning rate of the method that is trained with."""
        rates = preset.get("learning_rate")
        if not isinstance(rates, dict):
            return preset
        method = str(given.get("method", preset.get("method", "lora")))
        return {**preset, "learning_rate": rates.get(method, rates["lora"])}

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            UserError: says which, and what to give.
        """
        whole: tuple[tuple[str, float | None, float, float], ...] = (
            ("batch-size", self.batch_size, 1, 2**20),
            ("seq-len", self.seq_len, 2, 2**24),
            ("lora-r", self.lora_r, 1, 2**16),
            ("max-steps", self.max_steps, 1, MOST),
            ("evaluations", self.evaluations, 1, MOST),
            ("patience", self.patience, 1, MOST),
            ("save-every", self.save_every, 1, MOST),
            ("warmup-steps", self.warmup_steps, 0, MOST),
        )
        for name, number, minimum, maximum in whole:
            if number is not None and number < minimum:
                raise UserError(f"--{name} {number} is too small; use {minimum:g} or more")
            check_number(f"--{name}", number, minimum, maximum)
        positive: tuple[tuple[str, float | None, float], ...] = (
            ("learning-rate", self.learning_rate, 1000),
            ("epochs", self.epochs, MOST),
            ("max-minutes", self.max_minutes, MOST_MINUTES),
            ("lora-alpha", self.lora_alpha, MOST),
        )
        for name, number, maximum in positive:
            if number is not None and not 0 < number < float("inf"):
                raise UserError(f"--{name} {number} trains nothing; use a number above 0")
            check_number(f"--{name}", number, 0, maximum)
        check_number("--weight-decay", self.weight_decay, 0, 10)
        check_seed(self.seed)
        for name in self.kernels:
            if name not in (*KERNELS, "none"):
                raise UserError(
                    f"--kernels {name} is unknown; use some of {', '.join(KERNELS)}, or none"
                )
        for one in self.trainer:
            if "=" not in one:
                raise UserError(f"--trainer {one} has no value; write it as NAME=VALUE")
        needed = _QUANTIZERS.get(self.quantize)
        if needed is not None and self.method != "lora":
            raise UserError(
                f"--quantize {self.quantize} holds the weights that are not trained, and method "
                f"{self.method} trains all of them; use --method lora"
            )
        if needed is not None and not find_spec(needed):
            raise UserError(
                f"--quantize {self.quantize} needs the package {needed}, which is not installed; "
                f"run 'pip install {needed}', or leave --quantize out"
            )
        packages = _TRACKERS.get(self.report_to, ())
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(
                f"--report-to {self.report_to} needs the package {packages[0]}, which is not "
                f"installed; run 'pip install {packages[0]}', or leave --report-to out"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"--lora-dropout {self.lora_dropout} is outside [0, 1); use such as 0.05"
            )


class DistillationSettings(Settings):
    """How a teacher is learned from."""

    distill_weight: float = option(
        0.9,
        "Of the teacher in the loss; the text has the rest. 0: it only writes for self.",
        "SHARE",
        panel=_TEACHER,
    )
    temperature: float = option(1.0, "Of the teacher.", "T", panel=_TEACHER)
    teacher_top_k: int = option(64, "Likeliest tokens that are kept.", "N", panel=_TEACHER)

    def check_teacher(self) -> None:
        """Refuse values that cannot be.

        Raises:
            UserError: says which, and what to give.
        """
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} is no temperature; use such as 2")
        if not 0 <= self.distill_weight <= 1:
            raise UserError(
                f"--distill-weight {self.distill_weight} is outside [0, 1]; use such as 0.9"
            )
        if self.teacher_top_k < 1:
            raise UserError(f"--teacher-top-k {self.teacher_top_k} keeps nothing; use 1 or more")


class DataSettings(Settings):
    """Text to train on."""

    data: Sources = option(
        ...,
        "self (the teacher writes), a hub dataset, or a .txt, .jsonl, .json or .parquet file of "
        "instructions, chats or text. May be given several times.",
        "SRC",
        panel=_DATA,
        reads=True,
    )
    samples: int | None = option(
        None,
        "Use at most this many examples of each source.",
        "N",
        panel=_DATA,
        shown="all; 512 of self",
    )
    held_out: int | None = option(
        None,
        "Examples of each source to judge by.",
        "N",
        panel=_DATA,
        shown="one in 20, at most 256",
    )
    template: Literal["auto", "chat", "alpaca"] = option(
        "auto",
        "How instructions are written: chat (the tokenizer's template), alpaca, or auto.",
        "NAME",
        panel=_DATA,
    )
    mask_prompt: bool = option(False, "Learn only what the assistant says.", panel=_DATA)
    split: str | None = option(None, "Split of a hub dataset.", "NAME", panel=_DATA)
    text_field: str | None = option(None, "Field that holds a plain text.", "NAME", panel=_DATA)
    kept: Path | None = option(
        None, "Folder that keeps the text of self, for other stages of a run.", hidden=True
    )


class RecoverSettings(
    ModelSettings, OutputSettings, DataSettings, TrainingSettings, DistillationSettings
):
    """All that ``recover`` can be asked for."""

    panels: ClassVar = (_DATA, _TRAINING, _BUDGET, _TEACHER, _LORA, OUTPUT, LOADING)

    dtype: str = option("auto", DTYPE, "TYPE", panel=LOADING)
    resume: bool = option(
        False,
        "Go on with a run that was interrupted, from its last checkpoint.",
        panel=OUTPUT,
    )
    restart: bool = option(False, "Throw an interrupted run away.", panel=OUTPUT)
    keep_adapter: bool = option(
        False, "Save the adapter too, in --out/adapter; it belongs to MODEL.", panel=OUTPUT
    )
    perplexity: Sources = option(
        (),
        "Measure perplexity on this corpus before and after. May be given several times.",
        "SRC",
        panel=OUTPUT,
        reads=True,
    )
    perplexity_seq_len: int | None = option(
        None,
        "Tokens in a window of it.",
        "N",
        panel=OUTPUT,
        shown="2048 or the model's maximum",
    )
    teacher: str | None = option(
        None, "The dense model to learn from.", "MODEL", panel=_TEACHER, reads=True
    )
    teacher_cache: Path | None = option(
        None,
        "Keep what it wrote and said there, for other runs.",
        "DIR",
        panel=_TEACHER,
        shown="only for this run",
        reads=True,
    )

    @property
    def distils(self) -> bool:
        """Whether a teacher is learned from, and not only asked to write."""
        return self.teacher is not None and self.distill_weight > 0
