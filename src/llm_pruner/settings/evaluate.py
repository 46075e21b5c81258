"""What ``evaluate``, ``bench`` and ``inspect`` can be asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import PositiveInt

from llm_pruner.errors import UserError
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.settings.common import (
    LOADING,
    TASKS,
    MemorySettings,
    ModelSettings,
    Room,
    Sources,
    TaskSettings,
    by_comma,
    room_for_weights,
)
from llm_pruner.settings.options import Settings, option

ANSWER_TOKENS = 256
"""Tokens of a long answer."""
_MEASURE, _SKILLS = "What to measure", "Skills and long answers"
_hidden = partial(option, hidden=True)
_measure, _skill = partial(option, panel=_MEASURE), partial(option, panel=_SKILLS)


class PerplexitySettings(Settings):
    """How perplexity is measured; see ``evaluation.perplexity``."""

    protocol: Literal["standard", "paper"] = _measure(
        "standard", "standard: long windows; paper: windows of 128 tokens, as LLM-Pruner.", "NAME"
    )
    seq_len: int | None = _hidden(
        None, "Tokens in a window.", ge=2, shown="2048 or the model's maximum; 128 for paper"
    )
    max_tokens: int | None = _hidden(None, "Read only this many tokens.", ge=2)
    batch_size: PositiveInt | Literal["auto"] = _hidden(
        "auto", "Sequences at once; auto: as many as keep the logits small."
    )
    split: str | None = _hidden(None, "Split of a hub dataset.")
    text_field: str | None = _hidden(None, "Field that holds the text.")

    @property
    def sequences(self) -> int | None:
        """Sequences at once; None: as many as keep the logits small."""
        return None if self.batch_size == "auto" else self.batch_size


class SkillSettings(Settings):
    """What a user asks a model to do, rather than to predict."""

    skills: Annotated[tuple[Literal["humaneval", "gsm8k"], ...], by_comma] | None = _skill(
        None,
        "humaneval (programs that pass their tests) or gsm8k (sums whose last number is right); "
        "comma-separated.",
        "NAMES",
    )
    skills_data: Path | None = _skill(
        None,
        "Folder with human_eval.jsonl and gsm8k.jsonl.",
        hidden=True,
        shown="the datasets on the hub",
    )
    run_code: bool = _skill(
        False, "Run the programs that the model writes, in a sandbox; humaneval needs it."
    )
    health: bool = _skill(
        False,
        f"Let it write {ANSWER_TOKENS} tokens after each of 40 prompts: how many answers loop or "
        "never end.",
    )
    health_prompts: Path | None = _skill(
        None, "Other prompts: a .txt file with one per line, or .jsonl.", hidden=True
    )


class EvaluateSettings(
    MemorySettings, ModelSettings, PerplexitySettings, TaskSettings, SkillSettings
):
    """All that ``evaluate`` can be asked for."""

    panels: ClassVar = (_MEASURE, TASKS, _SKILLS, LOADING)

    memory: Room = room_for_weights(
        shown="four fifths of what is free, for both models", hidden=True
    )

    perplexity: Sources = _measure(
        (),
        "wikitext2, ptb, c4, another hub dataset, a file, or demo (in the package); may be given "
        "several times.",
        "SRC",
    )
    against: str | None = _measure(
        None, "Compare with this model, the dense one, in all that is measured.", "MODEL"
    )
    cache: bool = option(
        True, "Use known results of this model, and keep new ones.", panel=TASKS, hidden=True
    )
    speed: bool = _measure(False, "Measure tokens per second.")
    prompt: Sources = _measure(
        (), "Show what the model writes after this text; may be given several times.", "TEXT"
    )
    new_tokens: int = _hidden(40, "Tokens that it writes after a prompt.", ge=1)
    chat: bool = _hidden(True, "Ask the prompt in the chat template, if there is one.")
    report: Path | None = _measure(
        None, "Add the results to the report in this folder, which prune wrote.", "DIR"
    )

    def room(self, device: str, models: int = 1) -> int:
        """Return the bytes that the weights of one of so many models may take on a device."""
        if not isinstance(self.memory, str):
            return self.memory
        return free_bytes(device) * 4 // (5 * models)

    def check(self) -> None:
        """Raise UserError where nothing would be measured, or programs may not run."""
        compared = self.perplexity or self.tasks is not None or self.skills or self.health
        if not (compared or self.speed or self.prompt):
            raise UserError(
                "nothing to measure; give --perplexity SRC, --tasks NAMES, --skills NAMES, "
                "--health, --speed or --prompt TEXT"
            )
        if "humaneval" in (self.skills or ()) and not self.run_code:
            raise UserError(
                "humaneval runs programs that the model writes; add --run-code if they may run "
                "here, with limits and without a network, or leave humaneval out"
            )


class BenchSettings(ModelSettings):
    """All that ``bench`` can be asked for."""

    against: str | None = option(
        None, "Compare with this model, such as the dense one: both are timed in turns.", "MODEL"
    )
    prompt_tokens: int = option(256, "Tokens of each prompt.", "N", ge=1)
    new_tokens: int = option(32, "Tokens decoded after it.", "N", ge=1)
    batch_size: Annotated[tuple[PositiveInt, ...], by_comma] = option(
        (1, 8), "Prompts at once, such as 1 or 1,8.", "LIST"
    )
    repeats: int = option(5, "Rounds; medians and ranges are over them.", "N", ge=1)
    counts_only: bool = option(
        False, "Parameters, MACs and cache alone; needs a config but no weights."
    )


class InspectSettings(ModelSettings):
    """All that ``inspect`` can be asked for."""

    layer: int | None = option(None, "Layer to show.", "N", ge=0, shown="the middle one")
