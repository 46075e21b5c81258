"""What ``recover`` can be asked for."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from llm_pruner.errors import check_installed
from llm_pruner.settings.common import LOADING, OUTPUT, Pairs, Sources, WriterSettings, pairs
from llm_pruner.settings.options import Settings, option, presets_in
from llm_pruner.settings.registry import METHODS
from llm_pruner.settings.words import Seed

_S = TypeVar("_S", bound="TrainingSettings")

_DATA, _TRAINING, _TEACHER, _LORA = "Data", "Training", "Teacher", "Adapters"
_data, _training, _teacher, _adapter, _output = (
    partial(option, panel=panel) for panel in (_DATA, _TRAINING, _TEACHER, _LORA, OUTPUT)
)

QUANTIZERS = {"none": (), "int8": ("torchao",), "nf4": ("bitsandbytes",)}
"""Type of weights that are not trained -> package that multiplies by them."""

_TRAINERS = ("warmup_steps", "weight_decay", "max_grad_norm", "report_to", "max_steps")
"""Arguments of the Trainer that once had an option."""


class TrainingSettings(Settings):
    """How a model is trained."""

    presets: ClassVar = presets_in("presets/recover")
    default_preset: ClassVar = "quick"
    gone: ClassVar = {
        **Settings.gone,
        **{name: f"write --trainer {name}={{value}}" for name in _TRAINERS},
        "schedule": "write --trainer lr_scheduler_type={value}",
        "save_every": "write --trainer save_steps={value}",
        "bf16": "write --trainer bf16=true",
        "no_bf16": "write --trainer bf16=false",
        "gradient_checkpointing": "write --trainer gradient_checkpointing=true",
    }

    preset: str | None = _training(
        None,
        "quick: minutes on a CPU; paper: LLM-Pruner's two epochs in batches of 64; or a YAML file. "
        "Other options win over it.",
        "NAME",
    )
    method: str = _training(
        "lora",
        "lora: adapters beside the linear layers; full: all weights; blocks: all but the "
        "embeddings.",
        "NAME",
        known=METHODS,
    )
    learning_rate: float = _training(
        1e-3,
        "At its peak.",
        "RATE",
        shown="1e-3 for quick, 1e-4 for paper, less for weights",
        gt=0,
    )
    batch_size: int = _training(4, "Samples in a step.", "N", shown="4; 64 for paper", ge=1)
    seq_len: int = _training(
        512,
        "Longest sample, and length of a packed row, in tokens.",
        shown="512; 256 for paper",
        hidden=True,
        ge=2,
    )
    quantize: Literal["none", "int8", "nf4"] = _training(
        "none",
        "Hold the weights that are not trained in int8 (torchao) or nf4 (bitsandbytes, QLoRA).",
        "TYPE",
    )
    micro_tokens: int | None = _training(None, "Tokens in one forward pass.", hidden=True)
    packing: bool = _training(
        True, "Several samples in a row, where the model keeps them apart.", hidden=True
    )
    kernels: tuple[Literal["attention", "loss"], ...] = _training(
        ("attention", "loss"), "Parts of training with faster arithmetic.", hidden=True
    )
    trainer: Pairs = _training(
        {},
        "Any argument of transformers' TrainingArguments, such as max_steps=500, bf16=true or "
        "report_to=wandb; may be given several times.",
        "NAME=VALUE",
        shown="warmup_steps=10 lr_scheduler_type=cosine",
    )
    seed: Seed = _training(0, "Of the data's order and the adapters.", "N")
    epochs: float = _training(1, "Passes over the data.", "X", shown="1; 2 for paper", gt=0)
    max_minutes: float | None = _training(
        None, "Fit training, with its scores, into this time.", "X", gt=0
    )
    evaluations: int = _training(10, "Number of scores of held-out examples.", hidden=True, ge=1)
    patience: int = _training(3, "Stop after so many scores without gain.", hidden=True, ge=1)
    lora_r: int = _adapter(8, "Rank.", hidden=True, ge=1)
    lora_alpha: float = _adapter(16.0, "Scale times rank.", hidden=True, gt=0)
    lora_dropout: float = _adapter(
        0.0, "Of what they read.", hidden=True, shown="0; 0.05 for paper", ge=0, lt=1
    )

    def uses(self, kernel: str) -> bool:
        """Whether a part of training has its faster arithmetic."""
        return kernel in self.kernels

    def __init__(self, **values: Any) -> None:
        given = values.get("trainer")
        if given is not None:
            said = self.beside(self.of_preset(values.get("preset")), values)["trainer"]
            with suppress(TypeError, ValueError):  # the field says what is wrong
                values["trainer"] = {**said, **pairs(given)}
        super().__init__(**values)

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a preset with the learning rate of the chosen method.

        What a file does not say of the rates or of the Trainer's arguments, the default preset
        does.
        """
        usual = cls.of_preset(None)
        preset = {**preset, "trainer": {**usual["trainer"], **preset.get("trainer", {})}}
        rates = preset.get("learning_rate", {})
        if not isinstance(rates, dict):
            return preset
        rates = {**usual["learning_rate"], **rates}
        method = str(given.get("method", preset.get("method", "lora")))
        rest = {name: value for name, value in preset.items() if name != "learning_rate"}
        return {**rest, "learning_rate": rates[method]} if method in rates else rest

    @property
    def bf16(self) -> bool | None:
        """Whether to compute in bfloat16; None: where the processor is faster at it."""
        value = self.trainer.get("bf16")
        return None if value is None else bool(value)

    @property
    def max_steps(self) -> int | None:
        """Most steps of a run."""
        return int(self.trainer.get("max_steps") or 0) or None

    def with_trainer(self: _S, **values: Any) -> _S:
        """Return the same settings with these arguments of the Trainer."""
        return self.but(trainer={**self.trainer, **values})

    def check(self) -> None:
        """Raise UserError if a package is missing that a setting needs."""
        kind = self.quantize
        check_installed(f"--quantize {kind}", QUANTIZERS[kind], ", or leave --quantize out")


class DistillationSettings(Settings):
    """How a teacher is learned from."""

    distill_weight: float = _teacher(
        0.9,
        "Of the teacher in the loss; the text has the rest. 0: it only writes for self.",
        hidden=True,
        ge=0,
        le=1,
    )
    temperature: float = _teacher(1.0, "Of the teacher.", hidden=True, gt=0)
    teacher_top_k: int = _teacher(64, "Likeliest tokens that are kept.", hidden=True, ge=1)


class DataSettings(Settings):
    """Text to train on."""

    data: Sources = _data(
        ...,
        "self (the teacher writes), pruned (MODEL writes, the teacher judges), a hub dataset, or a "
        ".txt, .jsonl, .json or .parquet file of instructions, chats or text; may be given several "
        "times.",
        "SRC",
    )
    samples: int | None = _data(
        None,
        "Use at most this many examples of each source.",
        "N",
        shown="all; 512 of self and pruned; 10,000 of datasets without an end, such as c4",
        ge=2,
    )
    self_samples: int | None = option(
        None, "The same of the source self alone, for other stages of a run.", hidden=True, ge=2
    )
    held_out: int | None = _data(
        None,
        "Examples of each source to judge by.",
        hidden=True,
        shown="one in 20, at most 256",
        ge=1,
    )
    template: Literal["auto", "chat", "alpaca"] = _data(
        "auto",
        "How instructions are written: chat (the tokenizer's template), alpaca, or auto.",
        hidden=True,
    )
    mask_prompt: bool = _data(False, "Learn only what the assistant says.")
    split: str | None = _data(None, "Split of a hub dataset.", hidden=True)
    text_field: str | None = _data(None, "Field that holds a plain text.", hidden=True)
    kept: Path | None = option(
        None, "Folder that keeps the text of self, for other stages of a run.", hidden=True
    )


class RecoverSettings(WriterSettings, DataSettings, TrainingSettings, DistillationSettings):
    """All that ``recover`` can be asked for."""

    gone: ClassVar = {
        **WriterSettings.gone,
        **TrainingSettings.gone,
        "restart": "write --overwrite",
    }
    panels: ClassVar = (_DATA, _TRAINING, _TEACHER, _LORA, OUTPUT, LOADING)

    dtype: str = option(
        "auto",
        "Of the saved weights: auto (as stored; trained in float32, or beside adapters in that "
        "type where it is faster or float32 does not fit), float32, bfloat16, float16.",
        "TYPE",
        panel=LOADING,
    )
    resume: bool = _output(False, "Go on with an interrupted run from its last checkpoint.")
    keep_adapter: bool = _output(
        False, "Save the adapter too, in --out/adapter; it belongs to MODEL.", hidden=True
    )
    perplexity: Sources = _output(
        (), "Measure perplexity on this text before and after; may be given several times.", "SRC"
    )
    perplexity_seq_len: int | None = _output(
        None, "Tokens in a window of it.", hidden=True, shown="2048 or the model's maximum", ge=2
    )
    control: str | None = _output(
        None, "Train this dense model in the same way, and show the damage beside it.", "MODEL"
    )
    teacher: str | None = _teacher(None, "The dense model to learn from.", "MODEL")
    teacher_cache: Path | None = _teacher(
        None, "Folder that keeps what the teacher wrote and said, for other runs.", hidden=True
    )

    @property
    def distils(self) -> bool:
        """Whether a teacher is learned from, and not only asked to write."""
        return self.teacher is not None and self.distill_weight > 0
