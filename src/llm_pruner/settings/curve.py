"""What ``curve`` can be asked for."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from llm_pruner.settings.common import (
    CALIBRATION,
    LOADING,
    OUTPUT,
    FolderSettings,
    MemorySettings,
    SavedSettings,
    by_comma,
)
from llm_pruner.settings.options import option
from llm_pruner.settings.prune import PLAN, ChoiceSettings, PruneSettings
from llm_pruner.settings.words import parse_damage

_POINTS, _MEASURE = "Points", "What to measure"
_points, _measure, _output = (partial(option, panel=of) for of in (_POINTS, _MEASURE, OUTPUT))

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of all parameters that are removed where none are named."""

_ASCENDING = AfterValidator(lambda shares: tuple(sorted(set(shares))))
_Damage = Annotated[
    str, BeforeValidator(str), AfterValidator(lambda text: parse_damage(text) and text)
]


class CurveSettings(MemorySettings, FolderSettings, SavedSettings, ChoiceSettings):
    """All that ``curve`` can be asked for: the dense model, and how it would be pruned."""

    panels: ClassVar = (_POINTS, CALIBRATION, _MEASURE, PLAN, OUTPUT, LOADING)
    hides: ClassVar = frozenset(
        {
            *("samples", "structures", "uniform", "layers", "round_to", "criterion", "order"),
            *("compensation", "repair_minutes", "dtype"),
        }
    )

    ratios: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        _ASCENDING,
        by_comma,
    ] = _points(RATIOS, "Shares of all parameters to remove, a point for each.", "LIST")
    max_damage: _Damage | None = _points(
        None,
        "Find the smallest model within this damage: 1.2x for 1.2 times the dense model's "
        "perplexity, or 0.3 for a KL divergence of 0.3 nats per token.",
        "X",
    )
    preset: str | None = _points(
        None, "How to prune: paper, fast, balanced, best, or a YAML file.", "NAME"
    )
    text: str | None = _measure(
        None,
        "Text to measure on, which the models are not fitted to.",
        "SRC",
        shown="the rest of the calibration text",
    )
    measured_tokens: int = _measure(
        8192, "Measure on so many tokens, in two windows at least.", hidden=True, ge=2
    )
    restart: bool = _output(False, "Throw an interrupted run away.", hidden=True)

    def pruning(self, ratio: float) -> PruneSettings:
        """Return how a point is pruned: as ``prune`` does with the same options."""
        said = self.model_dump(mode="json", include=set(ChoiceSettings.model_fields) & self.given)
        said |= {"preset": self.preset, "memory": self.memory, "verify": False}
        said |= self.loading().written()
        return PruneSettings(**said, ratio=ratio, out=self.out)
