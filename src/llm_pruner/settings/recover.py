"""What ``recover`` can be asked for."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator

from llm_pruner.settings.common import LOADING, OUTPUT, Pairs, Sources, WriterSettings, pairs
from llm_pruner.settings.limits import MOST, MOST_MINUTES, Seed, check_installed, must, within
from llm_pruner.settings.options import Settings, option, presets_in
from llm_pruner.settings.registry import METHODS

_S = TypeVar("_S", bound="TrainingSettings")

_DATA, _TRAINING, _BUDGET = "Data", "Training", "Budget"
_TEACHER, _LORA = "Teacher", "Adapters"
_data, _training, _budget, _teacher, _adapter, _output = (
    partial(option, panel=panel) for panel in (_DATA, _TRAINING, _BUDGET, _TEACHER, _LORA, OUTPUT)
)

QUANTIZERS = {"none": (), "int8": ("torchao",), "nf4": ("bitsandbytes",)}
"""Type of weights that are not trained -> package that multiplies by them."""

_TRAINERS = ("warmup_steps", "weight_decay", "max_grad_norm", "report_to", "max_steps")
"""Arguments of the Trainer that once had an option."""


def _at_least(least: int, words: str = "is too small; use {least} or more") -> AfterValidator:
    said = words.replace("{least}", str(least))
    return must(lambda number: number >= least, f"{{option}} {{value}} {said}")


_TRAINS = must(lambda x: 0 < x < inf, "{option} {value} trains nothing; use a number above 0")
_Count = Annotated[int, _at_least(1), within(1, MOST)]
ExampleCount = Annotated[
    int, _at_least(2, "leaves nothing to train on or to judge by; use 2 or more"), within(2, MOST)
]
_Judges = Annotated[int, _at_least(1, "leaves nothing to judge by; use at least 1")]
_Dropout = Annotated[
    float, must(lambda x: 0 <= x < 1, "{option} {value} is outside [0, 1); use such as 0.05")
]
_Weight = Annotated[
    float, must(lambda x: 0 <= x <= 1, "{option} {value} is outside [0, 1]; use such as 0.9")
]
_Temperature = Annotated[
    float, must(lambda x: 0 < x < inf, "{option} {value} is no temperature; use such as 2")
]


class TrainingSettings(Settings):
    """How a model is trained."""

    presets: ClassVar = presets_in("presets/recover")
    default_preset: ClassVar = "quick"
    gone: ClassVar = {
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
        "Options given beside it win.",
        "NAME",
    )
    method: str = _training(
        "lora",
        f"{', '.join(METHODS)}: all weights but the embeddings, all weights, or adapters beside "
        "the linear layers.",
        "NAME",
        known=METHODS,
    )
    learning_rate: Annotated[float, _TRAINS, within(0, 1000)] = _training(
        1e-3, "At its peak.", "RATE", shown="1e-3 for quick, 1e-4 for paper, less for weights"
    )
    batch_size: Annotated[int, _at_least(1), within(1, 2**20)] = _training(
        4, "Samples in a step.", "N", shown="4; 64 for paper"
    )
    seq_len: Annotated[int, _at_least(2), within(2, 2**24)] = _training(
        512,
        "Longest sample, and length of a packed row, in tokens.",
        "N",
        shown="512; 256 for paper",
        hidden=True,
    )
    quantize: Literal["none", "int8", "nf4"] = _training(
        "none",
        "Hold the weights that are not trained in int8 (torchao) or nf4 (bitsandbytes, QLoRA). "
        "What was learned is merged into the weights as they came.",
        "TYPE",
    )
    micro_tokens: int | None = option(None, "Tokens in one forward pass.", "N", hidden=True)
    packing: bool = option(
        True, "Several samples in a row, where the model keeps them apart.", hidden=True
    )
    kernels: tuple[Literal["attention", "loss"], ...] = option(
        ("attention", "loss"), "Parts of training with faster arithmetic.", "NAME", hidden=True
    )
    trainer: Pairs = _training(
        {},
        "Any argument of transformers' TrainingArguments, such as max_steps=500, bf16=true, "
        "weight_decay=0.01 or report_to=wandb. May be given several times.",
        "NAME=VALUE",
        shown="warmup_steps=10 lr_scheduler_type=cosine",
    )
    seed: Seed = _training(0, "Of the data's order and the adapters.", "N")
    epochs: Annotated[float, _TRAINS, within(0, MOST)] = _budget(
        1, "Passes over the data.", "X", shown="1; 2 for paper"
    )
    max_minutes: Annotated[float, _TRAINS, within(0, MOST_MINUTES)] | None = _budget(
        None, "End training, evaluated, within this time; the run is planned to fit.", "X"
    )
    evaluations: _Count = _budget(
        10, "Times the held-out examples are scored on the way.", "N", hidden=True
    )
    patience: _Count = _budget(3, "Stop when so many scores brought no gain.", "N", hidden=True)
    lora_r: Annotated[int, _at_least(1), within(1, 2**16)] = _adapter(8, "Rank.", "N", hidden=True)
    lora_alpha: Annotated[float, _TRAINS, within(0, MOST)] = _adapter(
        16.0,
        "Scale times rank.",
        "X",
        hidden=True,
    )
    lora_dropout: _Dropout = _adapter(
        0.0, "Of what they read.", "SHARE", shown="0; 0.05 for paper", hidden=True
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

    distill_weight: _Weight = _teacher(
        0.9,
        "Of the teacher in the loss; the text has the rest. 0: it only writes for self.",
        "SHARE",
        hidden=True,
    )
    temperature: _Temperature = _teacher(1.0, "Of the teacher.", "T", hidden=True)
    teacher_top_k: Annotated[int, _at_least(1, "keeps nothing; use 1 or more")] = _teacher(
        64,
        "Likeliest tokens that are kept.",
        "N",
        hidden=True,
    )


class DataSettings(Settings):
    """Text to train on."""

    data: Sources = _data(
        ...,
        "self (the teacher writes), pruned (MODEL writes, and the teacher judges it), a hub "
        "dataset, or a .txt, .jsonl, .json or .parquet file of instructions, chats or text. May be "
        "given several times.",
        "SRC",
        reads=True,
    )
    samples: ExampleCount | None = _data(
        None,
        "Use at most this many examples of each source.",
        "N",
        shown="all; 512 of self and pruned; 10,000 of datasets without an end, such as c4",
    )
    self_samples: ExampleCount | None = option(
        None, "The same of the source self alone, for other stages of a run.", "N", hidden=True
    )
    held_out: _Judges | None = _data(
        None,
        "Examples of each source to judge by.",
        "N",
        shown="one in 20, at most 256",
        hidden=True,
    )
    template: Literal["auto", "chat", "alpaca"] = _data(
        "auto",
        "How instructions are written: chat (the tokenizer's template), alpaca, or auto.",
        "NAME",
        hidden=True,
    )
    mask_prompt: bool = _data(False, "Learn only what the assistant says.")
    split: str | None = _data(None, "Split of a hub dataset.", "NAME", hidden=True)
    text_field: str | None = _data(None, "Field that holds a plain text.", "NAME", hidden=True)
    kept: Path | None = option(
        None, "Folder that keeps the text of self, for other stages of a run.", hidden=True
    )


class RecoverSettings(WriterSettings, DataSettings, TrainingSettings, DistillationSettings):
    """All that ``recover`` can be asked for."""

    hides: ClassVar = frozenset({"push_to_hub"})
    panels: ClassVar = (_DATA, _TRAINING, _BUDGET, _TEACHER, _LORA, OUTPUT, LOADING)

    dtype: str = option(
        "auto",
        "Of the saved weights: auto for what the checkpoint has, computed in float32, or beside "
        "adapters in that type where it is faster or float32 does not fit into memory; or "
        "float32, bfloat16 or float16, computed in it.",
        "TYPE",
        panel=LOADING,
    )
    resume: bool = _output(
        False, "Go on with a run that was interrupted, from its last checkpoint."
    )
    restart: bool = _output(False, "Throw an interrupted run away.", hidden=True)
    keep_adapter: bool = _output(
        False,
        "Save the adapter too, in --out/adapter; it belongs to MODEL.",
        hidden=True,
    )
    perplexity: Sources = _output(
        (),
        "Measure perplexity on this corpus before and after. May be given several times.",
        "SRC",
        reads=True,
    )
    perplexity_seq_len: Annotated[int, within(2, 2**24)] | None = _output(
        None,
        "Tokens in a window of it.",
        "N",
        shown="2048 or the model's maximum",
        hidden=True,
    )
    control: str | None = _output(
        None,
        "Train this model, the dense one, with the same text, steps and rate as well, and show "
        "what is left of the damage beside it.",
        "MODEL",
        reads=True,
    )
    teacher: str | None = _teacher(None, "The dense model to learn from.", "MODEL", reads=True)
    teacher_cache: Path | None = _teacher(
        None,
        "Keep what it wrote and said there, for other runs.",
        "DIR",
        shown="only for this run",
        reads=True,
        hidden=True,
    )

    @property
    def distils(self) -> bool:
        """Whether a teacher is learned from, and not only asked to write."""
        return self.teacher is not None and self.distill_weight > 0
