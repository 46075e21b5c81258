"""What ``evaluate`` and ``bench`` can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from llm_pruner.errors import UserError
from llm_pruner.settings.common import TASKS, ModelSettings, Sources, TaskSettings
from llm_pruner.settings.limits import MOST, must, within
from llm_pruner.settings.options import Settings, option, written


def _sequences(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size {text} is no number of sequences; use 1 or more, or auto")
    return int(text)


_AtOnce = Annotated[int, within(1, 2**20)] | Literal["auto"]


class PerplexitySettings(Settings):
    """How perplexity is measured; see ``evaluation.perplexity``."""

    protocol: Literal["standard", "paper"] = option(
        "standard", "standard: long windows; paper: windows of 128, as LLM-Pruner does.", "NAME"
    )
    seq_len: Annotated[int, within(2, 2**24)] | None = option(
        None, "Tokens in a window.", "N", shown="2048 or the model's maximum; 128 for paper"
    )
    max_tokens: Annotated[int, within(2, MOST)] | None = option(
        None, "Read only this many tokens.", "N"
    )
    batch_size: Annotated[_AtOnce, written(_sequences, "auto")] = option(
        "auto", "Sequences at once, or auto: as fits the memory.", "N"
    )
    split: str | None = option(None, "Split of a hub dataset.", "NAME")
    text_field: str | None = option(None, "Field that holds the text.", "NAME")

    @property
    def sequences(self) -> int | None:
        """Sequences at once; None: as fits the memory."""
        return None if self.batch_size == "auto" else self.batch_size


class EvaluateSettings(ModelSettings, PerplexitySettings, TaskSettings):
    """All that ``evaluate`` can be asked for."""

    perplexity: Sources = option(
        (),
        "Corpus: wikitext2, ptb, c4, another hub dataset, a local file, or 'demo' for the text "
        "that the package ships. May be given several times.",
        "SRC",
        reads=True,
    )
    against: str | None = option(
        None,
        "Say beside each perplexity how far the predictions are from those of this model, the "
        "dense one: KL divergence, and how many likeliest tokens changed.",
        "MODEL",
        reads=True,
    )
    cache: bool = option(
        True, "Use known results of tasks for this model, and keep new ones.", panel=TASKS
    )
    speed: bool = option(False, "Measure tokens per second.")
    prompt: Sources = option(
        (), "Show what the model writes after this text. May be given several times.", "TEXT"
    )
    new_tokens: Annotated[int, within(1, 2**20)] = option(
        40, "Tokens that it writes after a prompt.", "N"
    )
    chat: bool = option(
        True, "Ask the prompt in the tokenizer's chat template, if it has one, or continue it."
    )
    report: Path | None = option(
        None,
        "Add the results to the report in this folder, which prune wrote; MODEL is this folder, or "
        "the dense model that it was made of.",
        "DIR",
    )

    def check(self) -> None:
        """Raise UserError where nothing would be measured."""
        if not (self.perplexity or self.tasks is not None or self.speed or self.prompt):
            raise UserError(
                "nothing to measure; give --perplexity SRC, --tasks NAMES, --speed or --prompt TEXT"
            )
        if self.against is not None and not self.perplexity:
            raise UserError(
                f"--against {self.against} is about text; add --perplexity SRC or leave it out"
            )
        self.check_tasks()


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--batch-size {text} is no list of numbers; use such as 1,8") from None
    return tuple(dict.fromkeys(sizes))


_Count = Annotated[
    int,
    must(lambda count: count >= 1, "{name}={value} measures nothing; use at least 1"),
    within(1, 2**20, "{name}"),
]
_Sizes = Annotated[tuple[_Count, ...], must(bool, "no batch size given; name one, such as 1")]


class BenchSettings(ModelSettings):
    """All that ``bench`` can be asked for."""

    against: str | None = option(
        None,
        "Compare with this model, such as the dense one: both are timed in turns.",
        "MODEL",
        reads=True,
    )
    prompt_tokens: _Count = option(256, "Tokens of each prompt.", "N")
    new_tokens: _Count = option(32, "Tokens decoded after it.", "N")
    batch_size: Annotated[_Sizes, written(_sizes)] = option(
        (1, 8), "Prompts at once, such as 1 or 1,8.", "LIST"
    )
    repeats: _Count = option(5, "Rounds; medians and ranges are over them.", "N")
    compile: bool = option(
        False, "Time the models as torch.compile makes them. Compiling takes minutes."
    )
    counts_only: bool = option(
        False, "Parameters, MACs and cache alone; needs a config but no weights."
    )


_Layer = Annotated[
    int, must(lambda layer: layer >= 0, "{option} {value} is no layer; layers count from 0")
]


class InspectSettings(ModelSettings):
    """All that ``inspect`` can be asked for."""

    layer: _Layer | None = option(None, "Layer to show.", "N", shown="the middle one")
