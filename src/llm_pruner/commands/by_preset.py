"""What a recipe says, as the arguments of ``prune_checkpoint``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion
from llm_pruner.planning import Selection
from llm_pruner.planning.target import Profile, Scope
from llm_pruner.search.layer_allocation import DEFAULT_TRIALS, AllocationSearch
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.settings.presets import Recipe

STRUCTURES = ("heads", "ffn")
SEARCH = "search"
"""The ``allocate`` that moves units between layers by trial; others are profiles."""


def allocation_search(
    allocate: str | None, trials: int | None = None, minutes: float | None = None
) -> AllocationSearch | None:
    """Return the search that an ``allocate`` asks for.

    Raises:
        UserError: trials or minutes are given and no search.
    """
    if allocate == SEARCH:
        return AllocationSearch(DEFAULT_TRIALS if trials is None else trials, minutes)
    if trials is not None or minutes is not None:
        raise UserError("search trials and minutes are for --allocate search; drop them or say so")
    return None


def profile_of(allocate: str | None) -> Profile:
    """Return how an ``allocate`` lays shares over the layers.

    Raises:
        UserError: it is unknown.
    """
    known = (*get_args(Profile), SEARCH)
    if allocate is not None and allocate not in known:
        close = difflib.get_close_matches(allocate, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown --allocate {allocate!r}; {hint}known are {', '.join(known)}")
    return "even" if allocate in (None, SEARCH) else cast("Profile", allocate)


def calibration_of(recipe: Recipe, **changes: Any) -> CalibrationSettings:
    """Return the calibration text of a recipe; values in ``changes`` that are not None win."""
    known = {
        "source": recipe.calibration,
        "samples": recipe.samples,
        "score_samples": recipe.score_samples,
        "seq_len": recipe.seq_len,
        **{name: value for name, value in changes.items() if value is not None},
    }
    found = CalibrationSettings(**{name: one for name, one in known.items() if one is not None})
    if found.score_samples is not None and "score_samples" not in changes:
        # Of fewer samples than the recipe's: all.
        found = replace(found, score_samples=min(found.score_samples, found.samples))
    return found


def prune_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return arguments of ``prune_checkpoint``, those about text apart."""
    split = recipe.split if isinstance(recipe.split, Mapping) else None
    selection = Selection(
        structures=recipe.structures or STRUCTURES,
        scope=cast("Scope", recipe.scope or "local"),
        protect_first=recipe.protect_first or 0,
        protect_last=recipe.protect_last or 0,
        round_to=recipe.round_to if isinstance(recipe.round_to, int) else 1,
        split=None if split is None else dict(split),
        spread=recipe.spread,
        profile=profile_of(recipe.allocate),
    )
    criterion = {
        "name": recipe.criterion,
        "order": recipe.order,
        "reduction": recipe.reduction,
        "aggregate": recipe.aggregate,
    }
    return {
        "selection": selection,
        "protect_by_default": (recipe.protect_first is None, recipe.protect_last is None),
        "round_by_speed": recipe.round_to == "auto",
        "criterion": Criterion(**{k: v for k, v in criterion.items() if v is not None}),
        "steps": recipe.steps or 1,
        "compensation": recipe.compensation or "none",
        "search": allocation_search(recipe.allocate, recipe.search_trials, recipe.search_minutes),
        "find_best_split": None if recipe.split is None else recipe.split == "auto",
    }
