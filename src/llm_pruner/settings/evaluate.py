"""What ``evaluate`` and ``bench`` can be asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from llm_pruner.errors import UserError
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.settings.common import (
    LOADING,
    TASKS,
    MemorySettings,
    ModelSettings,
    Names,
    Room,
    Sources,
    TaskSettings,
    room_for_weights,
)
from llm_pruner.settings.limits import MOST, must, within
from llm_pruner.settings.options import Settings, option, option_name, written

SKILLS = ("humaneval", "gsm8k")
ANSWER_TOKENS = 256
"""Tokens of a long answer."""
_skill = partial(option, panel="Skills and long answers")


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
        None,
        "Tokens in a window.",
        "N",
        shown="2048 or the model's maximum; 128 for paper",
        hidden=True,
    )
    max_tokens: Annotated[int, within(2, MOST)] | None = option(
        None,
        "Read only this many tokens.",
        "N",
        hidden=True,
    )
    batch_size: Annotated[_AtOnce, written(_sequences, "auto")] = option(
        "auto",
        "Sequences at once, or auto: as many as keep the logits small.",
        "N",
        hidden=True,
    )
    split: str | None = option(None, "Split of a hub dataset.", "NAME", hidden=True)
    text_field: str | None = option(None, "Field that holds the text.", "NAME", hidden=True)

    @property
    def sequences(self) -> int | None:
        """Sequences at once; None: as many as keep the logits small."""
        return None if self.batch_size == "auto" else self.batch_size


_KNOWN = must(
    lambda skills: bool(skills) and set(skills) <= set(SKILLS),
    "{option} has an empty or unknown name; use one or several of " + ", ".join(SKILLS),
)


class SkillSettings(Settings):
    """What a user asks a model to do, rather than to predict."""

    skills: Annotated[Names, _KNOWN] | None = _skill(
        None,
        "humaneval: share of problems whose program passes its tests; gsm8k: share of sums whose "
        "last number is right. Comma-separated.",
        "NAMES",
    )
    skills_data: Path | None = _skill(
        None,
        "Folder with human_eval.jsonl and gsm8k.jsonl.",
        "DIR",
        shown="the datasets on the hub",
        reads=True,
        hidden=True,
    )
    run_code: bool = _skill(
        False,
        "Run the programs that the model writes, each for itself, without network, and with limits "
        "of time, memory and files. humaneval needs it.",
    )
    health: bool = _skill(
        False,
        f"Let it write {ANSWER_TOKENS} tokens after each of 40 prompts, and say how many answers "
        "loop and how many never end.",
    )
    health_prompts: Path | None = _skill(
        None,
        "Other prompts: a .txt file with one a line, or .jsonl.",
        "FILE",
        reads=True,
        hidden=True,
    )

    def check_skills(self) -> None:
        """Raise UserError for what does not go together."""
        code = "humaneval" in (self.skills or ())
        if code and not self.run_code:
            raise UserError(
                "humaneval runs programs that the model writes; add --run-code if they may run "
                "here, with limits and without a network, or leave humaneval out"
            )
        for given, holds, words in (
            ("run_code", code, "programs; add --skills humaneval"),
            ("skills_data", self.skills, "skills; add --skills NAMES"),
            ("health_prompts", self.health, "long answers; add --health"),
        ):
            if getattr(self, given) and not holds:
                raise UserError(f"{option_name(given)} is about {words} or leave it out")


class EvaluateSettings(
    MemorySettings, ModelSettings, PerplexitySettings, TaskSettings, SkillSettings
):
    """All that ``evaluate`` can be asked for."""

    memory: Room = room_for_weights(
        shown="four fifths of what is free, for both models", hidden=True
    )

    perplexity: Sources = option(
        (),
        "Corpus: wikitext2, ptb, c4, another hub dataset, a local file, or 'demo' for the text "
        "that the package ships. May be given several times.",
        "SRC",
        reads=True,
    )
    against: str | None = option(
        None,
        "Compare with this model, the dense one: KL divergence and how many likeliest tokens "
        "changed on each text, accuracy above chance kept, skills and health.",
        "MODEL",
        reads=True,
    )
    cache: bool = option(
        True,
        "Use known results of tasks and known answers of this model, and keep new ones.",
        panel=TASKS,
        hidden=True,
    )
    speed: bool = option(False, "Measure tokens per second.")
    prompt: Sources = option(
        (), "Show what the model writes after this text. May be given several times.", "TEXT"
    )
    new_tokens: Annotated[int, within(1, 2**20)] = option(
        40,
        "Tokens that it writes after a prompt.",
        "N",
        hidden=True,
    )
    chat: bool = option(
        True,
        "Ask the prompt in the tokenizer's chat template, if it has one, or continue it.",
        hidden=True,
    )
    report: Path | None = option(
        None,
        "Add the results to the report in this folder, which prune wrote; MODEL is this folder, or "
        "the dense model that it was made of.",
        "DIR",
    )

    def room(self, device: str, models: int = 1) -> int:
        """Return the bytes that the weights of one of so many models may take on a device."""
        if not isinstance(self.memory, str):
            return self.memory
        return free_bytes(device) * 4 // (5 * models)

    def check(self) -> None:
        """Raise UserError where nothing would be measured, or an option would do nothing."""
        compared = self.perplexity or self.tasks is not None or self.skills or self.health
        if not (compared or self.speed or self.prompt):
            raise UserError(
                "nothing to measure; give --perplexity SRC, --tasks NAMES, --skills NAMES, "
                "--health, --speed or --prompt TEXT"
            )
        if self.against is not None and not compared:
            raise UserError(
                f"--against {self.against} has nothing to compare; add --perplexity SRC, --tasks "
                "NAMES, --skills NAMES or --health, or leave it out"
            )
        windows = ("protocol", "seq_len", "max_tokens", "split")
        for names, holds, words in (
            (windows, self.perplexity, "perplexity; add --perplexity SRC"),
            (
                ("text_field",),
                self.perplexity or self.health_prompts,
                "perplexity; add --perplexity SRC",
            ),
            (("new_tokens", "chat"), self.prompt, "prompts; add --prompt TEXT"),
            (("batch_size",), compared, "what is measured on text; add --perplexity SRC"),
            (
                ("cache",),
                self.tasks is not None or self.skills or self.health,
                "tasks and answers; add --tasks NAMES, --skills NAMES or --health",
            ),
        ):
            for name in filter(self.given.__contains__, () if holds else names):
                raise UserError(f"{option_name(name)} is about {words} or leave it out")
        self.check_tasks(limited=bool(self.skills or self.health))
        self.check_skills()


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--batch-size {text} is no list of numbers; use such as 1,8") from None
    return tuple(dict.fromkeys(sizes))


_Count = Annotated[int, within(1, 2**20, "{name}")]
_Sizes = Annotated[tuple[_Count, ...], must(bool, "no batch size given; name one, such as 1")]


class BenchSettings(ModelSettings):
    """All that ``bench`` can be asked for."""

    dtype: str = option(
        "float32",
        str(ModelSettings.model_fields["dtype"].description),
        "TYPE",
        panel=LOADING,
        shown="float32",
    )
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
