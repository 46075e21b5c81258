"""What ``prune`` can be asked for. Fields that a preset does not name have the defaults here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

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
from llm_pruner.settings.limits import MOST_MINUTES, Seed, must, within
from llm_pruner.settings.options import Settings, option, option_name, presets_in, written
from llm_pruner.settings.registry import COMPENSATIONS, CRITERIA
from llm_pruner.settings.words import parse_count, parse_layer_ranges, parse_split

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


_Ranges = Annotated[
    dict[str, tuple[int, int]],
    written(parse_layer_ranges),
    must(
        lambda of: all(0 <= first <= last for first, last in of.values()),
        "{option} {value} holds a range that begins below 0 or runs backwards; write such as "
        "heads=4-26",
    ),
]

PURPOSES = {"blocks": 32, "gguf": 256, "gptq": 128, "marlin": 64}
"""What is to run the model -> the multiple that it wants."""


def _multiple(text: str) -> int | str:
    if re.fullmatch(r"auto|tp[1-9]\d{0,3}", text) or text in PURPOSES:
        return text
    try:
        return int(text)
    except ValueError:
        names = ", ".join(("auto", *PURPOSES))
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
    gone: ClassVar = {"recipe": "write --preset {value}"}

    preset: str | None = _how(
        None,
        "Settings that go together: paper, fast, balanced, best, or a YAML file; options given "
        "beside it win.",
        "NAME",
        reads=True,
    )
    structures: Names = _where(
        ("heads", "ffn"),
        "What to remove: heads, query_heads, ffn, hidden, head_dim, experts, layers.",
        "LIST",
    )
    scope: Literal["local", "global"] = _where(
        "local",
        "local: the same share of each group; global: one ranking by importance per removed "
        "parameter.",
        "NAME",
        hidden=True,
    )
    split: Annotated[
        Literal["auto", "equal"] | dict[str, float], written(parse_split, "auto", "equal")
    ] = _where(
        "auto",
        "Of the removed parameters by structure, such as heads=0.1,ffn=0.9; auto: found by trial "
        "removals where the criterion reads text; equal: the same share of each structure.",
        "SHARES",
        hidden=True,
    )
    spread: float | None = _where(
        None,
        "With --scope global, let no layer lose more than this times the average share.",
        "FACTOR",
        hidden=True,
    )
    layer_trials: bool | None = _where(
        None,
        "With --scope global, find by trials what each layer loses: each goes alone without a few "
        "shares of its units, and the damage is measured.",
        shown="in the preset best",
        hidden=True,
    )
    uniform: bool = _where(
        False,
        "Keep the same number of units in all layers, so that the result usually loads without "
        "this package.",
    )
    protect_first: int | Literal["auto"] = _where(
        "auto",
        "Layers to keep whole at the start; auto: a quarter, at most 4.",
        "N",
        hidden=True,
    )
    protect_last: int | Literal["auto"] = _where(
        "auto",
        "Layers to keep whole at the end; auto: a fifth, at most 3.",
        "N",
        hidden=True,
    )
    layers: _Ranges | None = _where(
        None,
        "Layers to prune by structure, such as heads=4-26,ffn=2-28; replaces the protection.",
        "RANGES",
    )
    round_to: Annotated[int | str, written(_multiple)] = _where(
        1,
        "Keep a multiple of this many channels; auto: the smallest that this machine multiplies at "
        "full speed; blocks: 32 where that is a small step; gguf, gptq, marlin: as these want it; "
        "tp4: heads and channels that 4 devices share.",
        "N",
    )
    criterion: str = _importance("taylor", f"{', '.join(CRITERIA)}.", "NAME", known=CRITERIA)
    order: str = _importance("first", "Of taylor: first, second or mixed.", "NAME")
    reduction: str = _importance("element", "Of taylor: element or vector.", "NAME", hidden=True)
    aggregate: str = _importance(
        "sum",
        "Over the members of a group: sum, prod, max or last.",
        "NAME",
        hidden=True,
    )
    steps: Annotated[int, within(1, 1000, "{name}")] = _importance(
        1,
        "Prune in steps, estimating anew before each.",
        "N",
        hidden=True,
    )
    compensation: str = _importance(
        "none",
        "least-squares: refit what reads the removed units, on the calibration text; or none.",
        "NAME",
        known=COMPENSATIONS,
    )
    refit_text: Annotated[float, within(1, 100)] = _importance(
        1.0,
        "Refit on so many times as much text as importance is estimated on: further samples of the "
        "same files and datasets, as far as they go.",
        "TIMES",
        shown="1; 3 for balanced and best",
        hidden=True,
    )
    repair_minutes: Annotated[float, within(0, MOST_MINUTES)] = _importance(
        0.0,
        "Minutes of training, by what the dense model says of the calibration text.",
        "X",
        shown="0, none; 8 for best",
    )

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what of a preset (or the defaults) holds beside what was given."""
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
        wanted = left.get("score_samples")
        if wanted is not None and given.get("samples") is not None:
            with suppress(TypeError, ValueError, OverflowError):  # no number, which is refused
                left["score_samples"] = min(wanted, int(given["samples"]))  # of fewer samples: all
        return left


class ChoiceSettings(MethodSettings):
    """All that decides which units go, but how many."""

    seed: Seed = _plan(0, "Of calibration text and random choice.", "N")


class PlanSettings(ChoiceSettings, AmountSettings):
    """All that decides which units a plan removes."""

    unit_ratio: float | None = _how_much(
        None, "Share of units to remove in each chosen layer, as in the paper.", "SHARE"
    )
    kv_cache: float | None = _how_much(
        None,
        "Share of the key-value cache per token to remove, by pruning heads (or what --structures "
        "says).",
        "SHARE",
    )


class PruneSettings(MemorySettings, WriterSettings, PlanSettings):
    """All that ``prune`` can be asked for."""

    panels: ClassVar = (HOW_MUCH, HOW, WHERE, IMPORTANCE, CALIBRATION, PLAN, OUTPUT, LOADING)

    memory: Room = room_for_weights(shown="a tenth of what is free, on a GPU two fifths")
    plan: Path | None = _plan(None, "Replay this plan instead of making one.", "FILE", reads=True)
    dry_run: bool = _plan(False, "Write the plan to --out and stop.")
    estimate: bool = _plan(
        False, "Say what the run will take, seconds and peak memory by stage, and stop."
    )
    verify: bool = _output(
        True,
        "Compare with the masked twin, and the saved folder with the model in memory.",
        hidden=True,
    )
    out: Path = _output(..., "Folder to write; with --dry-run the plan file.", "DIR", short="-o")

    @classmethod
    def replaced(cls, given: Mapping[str, Any], filed: Mapping[str, Any]) -> Collection[str]:
        """Return what makes way: beside a plan that was given, all that a plan says."""
        found = {*super().replaced(given, filed)}
        if given.get("plan") is not None:
            said = {**filed, **given}
            after = said.get("compensation", "none") != "none" or said.get("repair_minutes")
            found |= cls._said_by_plans(refits=bool(after))
        return found

    @staticmethod
    def _said_by_plans(*, refits: bool) -> set[str]:
        """Return the fields that a plan decides about; the text is also that of a refit."""
        text = CalibrationSettings.model_fields.keys() | {"seed"}
        said = set(PlanSettings.model_fields) - {"seed"}
        return said - {"compensation", "refit_text", "repair_minutes"} - (text if refits else set())

    def written(self) -> dict[str, Any]:
        """Return plain values of which the same settings come; a plan has no preset but a given."""
        said = super().written()
        if self.plan is not None and "preset" not in self.given:
            del said["preset"]
        return said

    def check(self) -> None:
        """Raise UserError for what says different things, or leaves nothing to judge by."""
        if self.repair_minutes and self.samples < 2:
            raise UserError(
                f"--repair-minutes {self.repair_minutes:g} is judged by a sample that it is not "
                f"trained on, and there is {self.samples}; use --samples 2 or more"
            )
        if "refit_text" in self.given and self.compensation == "none" and self.refit_text > 1:
            raise UserError(
                f"--refit-text {self.refit_text:g} is for a refit, and there is none; use "
                "--compensation least-squares, or leave it out"
            )
        asked = [name for name in AMOUNTS if getattr(self, name) is not None]
        if self.plan is not None:
            refits = self.compensation != "none" or bool(self.repair_minutes)
            spoken = self._said_by_plans(refits=refits) & self.given
            given = [option_name(name) for name in type(self).model_fields if name in spoken]
            if given:
                raise UserError(f"--plan already says what to remove; drop {', '.join(given)}")
            return
        if not asked:
            names = ", ".join(option_name(name) for name in AMOUNTS)
            raise UserError(f"no target given; use one of {names}, or --plan")
        if len(asked) > 1:
            both = " and ".join(option_name(name) for name in asked)
            raise UserError(f"{both} say different things; give one of them")
        for name, criteria in READ_BY.items():
            if name in self.given and self.criterion not in criteria:
                raise UserError(
                    f"{option_name(name)} {getattr(self, name)} is for --criterion "
                    f"{' or '.join(criteria)}, and does nothing with {self.criterion}; use "
                    f"--criterion {criteria[0]}, or leave it out"
                )
        levels = {
            "--uniform": self.uniform,
            "--unit-ratio": self.unit_ratio is not None,
            "--scope local": self.scope == "local",
        }
        if "spread" in self.given and (other := next(filter(levels.get, levels), None)):
            raise UserError(
                f"--spread {self.spread:g} is for parameters that --scope global shares out, and "
                f"does nothing with {other}; change that, or leave it out"
            )
