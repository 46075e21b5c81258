"""What ``curve`` can be asked for."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator

from llm_pruner.settings.common import (
    CALIBRATION,
    LOADING,
    OUTPUT,
    FolderSettings,
    MemorySettings,
    SavedSettings,
)
from llm_pruner.settings.limits import MOST, must, within
from llm_pruner.settings.options import option, written
from llm_pruner.settings.prune import IMPORTANCE, PLAN, WHERE, ChoiceSettings, PruneSettings
from llm_pruner.settings.words import parse_damage, parse_shares

_POINTS, _MEASURE = "Points", "What to measure"
_points, _measure, _output = (partial(option, panel=of) for of in (_POINTS, _MEASURE, OUTPUT))

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of all parameters that are removed where none are named."""

_SHARES = must(
    lambda shares: bool(shares) and all(0 < share < 1 for share in shares),
    "{option} {value}: each is a share to remove, in (0, 1); give such as 0.1,0.2,0.3",
)

_ASCENDING = AfterValidator(lambda shares: tuple(sorted(set(shares))))
"""Each once, and from the largest model to the smallest, as an answer is read from them."""

_DAMAGE = AfterValidator(lambda text: parse_damage(text) and text)


class CurveSettings(MemorySettings, FolderSettings, SavedSettings, ChoiceSettings):
    """All that ``curve`` can be asked for: the dense model, and how it would be pruned."""

    hides: ClassVar = frozenset(
        {
            *("samples", "structures", "uniform", "layers", "round_to", "criterion", "order"),
            *("compensation", "repair_minutes", "dtype"),
        }
    )
    panels: ClassVar = (_POINTS, WHERE, IMPORTANCE, CALIBRATION, _MEASURE, PLAN, OUTPUT, LOADING)

    ratios: Annotated[tuple[float, ...], _SHARES, _ASCENDING, written(parse_shares)] = _points(
        RATIOS, "Shares of all parameters to remove, a point each.", "LIST"
    )
    max_damage: Annotated[str, BeforeValidator(str), _DAMAGE] | None = _points(
        None,
        "Find how small the model may be, with a plan for it: 1.2x for a perplexity of at most 1.2 "
        "times the dense model's, or 0.3 for a KL divergence from it of at most 0.3 nats a token.",
        "X",
    )
    preset: str | None = _points(
        None,
        "How to prune: paper, fast, balanced, best, or a YAML file; options given beside it win.",
        "NAME",
        reads=True,
    )
    text: str | None = _measure(
        None,
        "Measure on this text, as evaluate does on that of --perplexity; the pruned models must "
        "not have seen it.",
        "SRC",
        shown="what is left of the calibration source",
        reads=True,
    )
    measured_tokens: Annotated[int, within(2, MOST)] = _measure(
        8192,
        "Measure on this many tokens of it, in whole windows, of which there are two at least.",
        "N",
        hidden=True,
    )
    restart: bool = _output(
        False,
        "Throw an interrupted run away, which the same command would go on with.",
        hidden=True,
    )

    def pruning(self, ratio: float) -> PruneSettings:
        """Return how a point is pruned: as ``prune`` does with the same options."""
        said = self.model_dump(mode="json", include=set(ChoiceSettings.model_fields) & self.given)
        said |= {"preset": self.preset, "memory": self.memory, "verify": False}
        said |= self.loading().written()
        return PruneSettings(**said, ratio=ratio, out=self.out)
