"""What ``prune`` can be asked for. Fields that a preset does not name have the defaults here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from llm_pruner.errors import UserError
from llm_pruner.settings.common import (
    CALIBRATION,
    DTYPE,
    LOADING,
    OUTPUT,
    CalibrationSettings,
    ModelSettings,
    Names,
    OutputSettings,
)
from llm_pruner.settings.options import Settings, option, option_name, presets_in
from llm_pruner.settings.registry import COMPENSATIONS, CRITERIA
from llm_pruner.settings.words import parse_bytes, parse_count, parse_layer_ranges, parse_split

HOW_MUCH, _WHERE = "How much (one of these)", "Where from"
_IMPORTANCE, _PLAN = "Importance", "Plan"

AMOUNTS = ("ratio", "params", "unit_ratio", "kv_cache")
"""Fields of which one says how much is removed."""


def _written(parse: Any, *words: str) -> BeforeValidator:
    """Return a validator that reads what was written with ``parse``, other than ``words``."""
    return BeforeValidator(lambda v: parse(v) if isinstance(v, str) and v not in words else v)


def _multiple(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--round-to {text} is no number; use such as 32, or auto") from None


class AmountSettings(Settings):
    """How much is removed: exactly one of the fields is given."""

    ratio: float | None = option(
        None, "Share of all parameters to remove, such as 0.2.", "SHARE", panel=HOW_MUCH
    )
    params: Annotated[int, _written(parse_count)] | None = option(
        None, "Parameters to keep, such as 5.4B or 107.6M.", "COUNT", panel=HOW_MUCH
    )


class MethodSettings(CalibrationSettings):
    """How it is chosen what is removed: what a preset says."""

    presets: ClassVar = presets_in("presets")
    default_preset: ClassVar = "best"

    preset: str | None = option(
        None,
        "Settings that go together: paper, fast, balanced, best, or a YAML file; options given "
        "beside it win.",
        "NAME",
        panel=HOW_MUCH,
        was="--recipe",
        reads=True,
    )
    structures: Names = option(
        ("heads", "ffn"),
        "What to remove: heads, query_heads, ffn, hidden, head_dim, experts, layers.",
        "LIST",
        panel=_WHERE,
    )
    scope: Literal["local", "global"] = option(
        "local",
        "local: the same share of each group; global: one ranking by importance per removed "
        "parameter.",
        "NAME",
        panel=_WHERE,
    )
    split: Annotated[
        Literal["auto", "equal"] | dict[str, float], _written(parse_split, "auto", "equal")
    ] = option(
        "auto",
        "Of the removed parameters by structure, such as heads=0.1,ffn=0.9; auto: found by trial "
        "removals where the criterion reads text; equal: the same share of each structure.",
        "SHARES",
        panel=_WHERE,
    )
    spread: float | None = option(
        None,
        "With --scope global, let no layer lose more than this times the average share.",
        "FACTOR",
        panel=_WHERE,
    )
    uniform: bool = option(
        False,
        "Keep the same number of units in all layers, so that the result usually loads without "
        "this package.",
        panel=_WHERE,
    )
    protect_first: int | Literal["auto"] = option(
        "auto",
        "Layers to keep whole at the start; auto: a quarter, at most 4.",
        "N",
        panel=_WHERE,
    )
    protect_last: int | Literal["auto"] = option(
        "auto", "Layers to keep whole at the end; auto: a fifth, at most 3.", "N", panel=_WHERE
    )
    layers: Annotated[dict[str, tuple[int, int]], _written(parse_layer_ranges)] | None = option(
        None,
        "Layers to prune by structure, such as heads=4-26,ffn=2-28; replaces the protection.",
        "RANGES",
        panel=_WHERE,
    )
    round_to: Annotated[int | Literal["auto"], _written(_multiple, "auto")] = option(
        1,
        "Keep a multiple of this many channels; auto: the smallest that this machine multiplies at "
        "full speed.",
        "N",
        panel=_WHERE,
    )
    criterion: str = option(
        "taylor", f"{', '.join(CRITERIA)}.", "NAME", panel=_IMPORTANCE, known=CRITERIA
    )
    order: str = option("first", "Of taylor: first, second or mixed.", "NAME", panel=_IMPORTANCE)
    reduction: str = option("element", "Of taylor: element or vector.", "NAME", panel=_IMPORTANCE)
    aggregate: str = option(
        "sum", "Over the members of a group: sum, prod, max or last.", "NAME", panel=_IMPORTANCE
    )
    steps: int = option(1, "Prune in steps, estimating anew before each.", "N", panel=_IMPORTANCE)
    compensation: str = option(
        "none",
        "least-squares: refit what reads the removed units, on the calibration text; or none.",
        "NAME",
        panel=_IMPORTANCE,
        known=COMPENSATIONS,
    )

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what of a preset (or the defaults) holds beside what was given."""
        left = dict(preset)
        if given.get("layers") is not None:
            # Their ranges replace the protection; other structures keep what the model suggests.
            left |= {"protect_first": "auto", "protect_last": "auto"}
        if given.get("plan") is not None:
            left["compensation"] = "none"
        if given.get("uniform"):
            left |= {"scope": "local", "spread": None, "protect_first": 0, "protect_last": 0}
        if given.get("kv_cache") is not None:
            left |= {"structures": ("heads",), "split": "equal"}
        if given.get("unit_ratio") is not None:
            left |= {"scope": "local", "spread": None, "split": "equal"}
        wanted = left.get("score_samples")
        if wanted is not None and given.get("samples") is not None:
            left["score_samples"] = min(wanted, int(given["samples"]))  # of fewer samples: all
        return left


class PlanSettings(MethodSettings, AmountSettings):
    """All that decides which units a plan removes."""

    unit_ratio: float | None = option(
        None,
        "Share of units to remove in each chosen layer, as in the paper.",
        "SHARE",
        panel=HOW_MUCH,
    )
    kv_cache: float | None = option(
        None,
        "Share of the key-value cache per token to remove, by pruning heads (or what --structures "
        "says).",
        "SHARE",
        panel=HOW_MUCH,
    )
    seed: int = option(0, "Of calibration text and random choice.", "N", panel=_PLAN)


class PruneSettings(ModelSettings, OutputSettings, PlanSettings):
    """All that ``prune`` can be asked for."""

    panels: ClassVar = (HOW_MUCH, _WHERE, _IMPORTANCE, CALIBRATION, _PLAN, OUTPUT, LOADING)

    plan: Path | None = option(
        None, "Replay this plan instead of making one.", "FILE", panel=_PLAN, reads=True
    )
    dry_run: bool = option(False, "Write the plan to --out and stop.", panel=_PLAN)
    verify: bool = option(
        True,
        "Compare with the masked twin, and the saved folder with the model in memory.",
        panel=OUTPUT,
    )
    out: Path = option(
        ...,
        "Folder to write; with --dry-run the plan file.",
        "DIR",
        panel=OUTPUT,
        short="-o",
    )
    dtype: str = option("auto", DTYPE, "TYPE", panel=LOADING)
    memory: Annotated[int | str, _written(parse_bytes, "auto")] = option(
        "auto",
        "Room for the weights, such as 8GB; where they need more, they are read block by block.",
        "SIZE",
        panel=LOADING,
        shown="four fifths of what is free",
    )

    def check(self) -> None:
        """Refuse amounts and a plan that say different things.

        Raises:
            UserError: says what must change.
        """
        asked = [name for name in AMOUNTS if getattr(self, name) is not None]
        if self.plan is not None:
            text = CalibrationSettings.model_fields.keys() | {"seed"}
            spoken = set(PlanSettings.model_fields) - {"seed"}
            spoken -= {"compensation"} | (text if self.compensation != "none" else set())
            given = [option_name(name) for name in type(self).model_fields if name in spoken]
            given = [name for name in given if name[2:].replace("-", "_") in self.given]
            if given:
                raise UserError(f"--plan already says what to remove; drop {', '.join(given)}")
            return
        if not asked:
            names = ", ".join(option_name(name) for name in AMOUNTS)
            raise UserError(f"no target given; use one of {names}, or --plan")
        if len(asked) > 1:
            both = " and ".join(option_name(name) for name in asked)
            raise UserError(f"{both} say different things; give one of them")
