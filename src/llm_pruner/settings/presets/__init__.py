"""Recipes: files that say everything about a way of pruning, by name or by path."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llm_pruner.errors import UserError

NAMES = ("paper", "balanced", "best", "fast")


class Recipe(BaseModel):
    """Settings of ``prune`` by the names of its options; what is None keeps its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: tuple[str, ...] | None = None
    scope: str | None = None
    spread: float | None = None
    allocate: Literal["even", "log", "owl", "search"] | None = None
    search_trials: int | None = None
    search_minutes: float | None = None
    split: Literal["auto", "equal"] | dict[str, float] | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    round_to: int | Literal["auto"] | None = None
    criterion: str | None = None
    order: str | None = None
    reduction: str | None = None
    aggregate: str | None = None
    steps: int | None = None
    calibration: str | None = None
    samples: int | None = None
    score_samples: int | None = None
    seq_len: int | None = None
    compensation: str | None = None


def recipe_file(name: str) -> Path | None:
    """Return the file that a recipe is read from; None if the package ships it."""
    return None if name in NAMES else Path(name).expanduser()


def read_recipe(name: str) -> Recipe:
    """Return a recipe of the package by its name, or one in a YAML file by its path.

    Raises:
        UserError: no such recipe or file, not YAML, or settings that are unknown or of the wrong
            type; all of them are named.
    """
    if name in NAMES:
        text = (
            files("llm_pruner.settings.presets")
            .joinpath(f"{name}.yaml")
            .read_text(encoding="utf-8")
        )
    else:
        text = _read_file(name)
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"recipe {name} is not YAML{where}; correct it there") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {name} holds no settings; write lines such as 'criterion: fisher'")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc'][:1])}: {item['msg'].lower()}"
            for item in error.errors()
        ]
        raise UserError(
            f"recipe {name}: {'; '.join(dict.fromkeys(problems))}; known settings are "
            f"{', '.join(Recipe.model_fields)}"
        ) from error


def _read_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no recipe {name!r}; {hint}known are {', '.join(NAMES)}, or give a YAML file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name} cannot be read as UTF-8 text; give a YAML file") from error
