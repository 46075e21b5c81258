"""What ``prune`` can be asked for. Fields that a preset does not name have the defaults here."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import NonNegativeInt

from llm_pruner.errors import UserError
from llm_pruner.settings.common import (
    CALIBRATION,
    LOADING,
    OUTPUT,
    CalibrationSettings,
    MemorySettings,
    Names,
    Room,
    WriterSettings,
    room_for_weights,
)
from llm_pruner.settings.options import Settings, option, option_name, presets_in, written
from llm_pruner.settings.registry import COMPENSATIONS, CRITERIA
from llm_pruner.settings.words import Seed, parse_count, parse_layer_ranges, parse_split

HOW_MUCH, HOW, WHERE = "How much (one of these)", "How", "Where from"
IMPORTANCE, PLAN = "Importance", "Plan"
"""Headings in the help."""

_how_much, _how, _where, _importance, _plan, _output = (
    partial(option, panel=of) for of in (HOW_MUCH, HOW, WHERE, IMPORTANCE, PLAN, OUTPUT)
)

AMOUNTS = ("ratio", "params", "unit_ratio", "kv_cache")
"""Fields of which one says how much is removed."""

READ_BY = {"order": ("taylor",), "reduction": ("taylor",), "aggregate": ("taylor", "l1", "l2")}
"""Fields -> criteria that they are about."""

PURPOSES = {"blocks": 32, "gguf": 256, "gptq": 128, "marlin": 64}
"""What is to run the model -> the multiple that it wants."""


def _multiple(text: str) -> int | str:
    if re.fullmatch(r"tp[1-9]\d{0,3}", text) or text in PURPOSES:
        return text
    try:
        return int(text)
    except ValueError:
        names = ", ".join(PURPOSES)
        raise UserError(
            f"--round-to {text} is no number; use such as 32, or {names}, or tp4"
        ) from None


class AmountSettings(Settings):
    """How much is removed: exactly one of the fields is given."""

    one_of: ClassVar = frozenset({*AMOUNTS, "plan"})

    ratio: float | None = _how_much(
        None, "Share of all parameters to remove, such as 0.2.", "SHARE"
    )
    params: Annotated[int, written(parse_count)] | None = _how_much(
        None, "Parameters to keep, such as 5.4B or 107.6M.", "COUNT"
    )


class MethodSettings(CalibrationSettings):
    """How it is chosen what is removed: what a preset says."""

    presets: ClassVar = presets_in("presets")
    default_preset: ClassVar = "balanced"

    preset: str | None = _how(
        None, "paper, fast, balanced, best, or a YAML file; other options win over it.", "NAME"
    )
    structures: Names = _where(
        ("heads", "ffn"), "heads, query_heads, ffn, hidden, head_dim, experts, layers.", "LIST"
    )
    scope: Literal["local", "global"] = _where(
        "local",
        "local: the same share of each group; global: one ranking by importance per removed "
        "parameter.",
        hidden=True,
    )
    split: Annotated[
        Literal["auto", "equal"] | dict[str, float], written(parse_split, "auto", "equal")
    ] = _where(
        "auto",
        "Shares of the removed parameters, such as heads=0.1,ffn=0.9; auto: found by trial "
        "removals where the criterion reads text; equal: the same share of each structure.",
        hidden=True,
    )
    spread: float | None = _where(
        None,
        "With scope global: no layer loses more than this times the average share.",
        hidden=True,
        ge=1,
    )
    layer_trials: bool | None = _where(
        None,
        "With scope global: find by trial removals how much each layer loses.",
        hidden=True,
        shown="in the preset best",
    )
    uniform: bool = _where(
        False, "Keep equal sizes in all layers, so that most programs load the result."
    )
    protect_first: int | Literal["auto"] = _where(
        "auto", "Layers to keep whole at the start; auto: a quarter, at most 4.", hidden=True
    )
    protect_last: int | Literal["auto"] = _where(
        "auto", "Layers to keep whole at the end; auto: a fifth, at most 3.", hidden=True
    )
    layers: (
        Annotated[dict[str, tuple[NonNegativeInt, NonNegativeInt]], written(parse_layer_ranges)]
        | None
    ) = _where(None, "Layers to prune, such as heads=4-26,ffn=2-28.", "RANGES")
    round_to: Annotated[int | str, written(_multiple)] = _where(
        1,
        "Keep a multiple of this many channels: a number; blocks: 32; gguf, gptq, "
        "marlin: what these need; tp4: for 4 devices.",
        "N",
    )
    criterion: str = _importance("taylor", f"{', '.join(CRITERIA)}.", "NAME", known=CRITERIA)
    order: str = _importance("first", "Of taylor: first, second or mixed.", "NAME")
    reduction: str = _importance("element", "Of taylor: element or vector.", hidden=True)
    aggregate: str = _importance(
        "sum", "Over the members of a group: sum, prod, max or last.", hidden=True
    )
    steps: int = _importance(
        1, "Prune in steps, estimating anew before each.", hidden=True, ge=1, le=1000
    )
    compensation: str = _importance(
        "none",
        "least-squares: refit the layers that read what is removed; or none.",
        "NAME",
        known=COMPENSATIONS,
    )
    refit_text: float = _importance(
        1.0,
        "Refit on so many times as much text as importance is estimated on.",
        hidden=True,
        ge=1,
        le=100,
        shown="1; 3 for balanced and best",
    )
    repair_minutes: float = _importance(
        0.0, "Then train so long, with the dense model as teacher.", "X", ge=0, shown="0; best: 8"
    )

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what of a preset holds beside what was given."""
        left = dict(preset)
        if given.get("layers") is not None:
            # Their ranges replace the protection; other structures keep what the model suggests.
            left |= {"protect_first": "auto", "protect_last": "auto"}
        if given.get("plan") is not None:
            left |= {"compensation": "none", "repair_minutes": 0.0}
        if given.get("uniform"):
            left |= {"scope": "local", "spread": None, "protect_first": 0, "protect_last": 0}
        if any(given.get(name) is not None for name in AMOUNTS):
            left = {name: value for name, value in left.items() if name not in AMOUNTS}
        if given.get("kv_cache") is not None:
            said = preset.get("split") == "equal" and preset.get("scope") == "global"
            left |= {"structures": ("heads",), "split": "equal" if said else "auto"}
        if given.get("unit_ratio") is not None:
            left |= {"scope": "local", "spread": None, "split": "equal"}
        if left.get("score_samples") is not None and given.get("samples") is not None:
            with suppress(TypeError, ValueError):  # no number, which is refused
                left["score_samples"] = min(left["score_samples"], int(given["samples"]))
        return left


class ChoiceSettings(MethodSettings):
    """All that decides which units go, but how many."""

    seed: Seed = _plan(0, "Of calibration text and random choice.", "N")


class PlanSettings(ChoiceSettings, AmountSettings):
    """All that decides which units a plan removes."""

    unit_ratio: float | None = _how_much(
        None, "Share of units to remove in each layer, as in the paper.", "SHARE"
    )
    kv_cache: float | None = _how_much(
        None, "Share of the key-value cache to remove, by pruning heads.", "SHARE"
    )


class PruneSettings(MemorySettings, WriterSettings, PlanSettings):
    """All that ``prune`` can be asked for."""

    panels: ClassVar = (HOW_MUCH, HOW, WHERE, IMPORTANCE, CALIBRATION, PLAN, OUTPUT, LOADING)

    memory: Room = room_for_weights(shown="a tenth of what is free; two fifths on a GPU")
    plan: Path | None = _plan(None, "Carry out this plan instead of making one.", "FILE")
    dry_run: bool = _plan(False, "Write the plan to --out and stop.")
    estimate: bool = _plan(False, "Print the expected time and memory of each stage, and stop.")
    verify: bool = _output(
        True,
        "Compare the result with the masked dense model, and the saved folder with the model in "
        "memory.",
        hidden=True,
    )
    out: Path = _output(..., "Folder to write; with --dry-run the plan file.", "DIR", short="-o")

    def check(self) -> None:
        """Raise UserError unless exactly one option says what is removed."""
        asked = [option_name(name) for name in AMOUNTS if getattr(self, name) is not None]
        asked += ["--plan"] * (self.plan is not None)
        if not asked:
            names = ", ".join(map(option_name, AMOUNTS))
            raise UserError(f"no target given; use one of {names}, or --plan")
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} say different things; give one of them")
