"""How importance is estimated, and the criteria that look at activations: one file each.

A file ``my_rule.py`` that says ``MEASURE = Measure(...)`` is the criterion ``my-rule``: the help,
``llm-pruner prune --criterion``, the table in the docs and the benchmarks know it then.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llm_pruner.errors import UserError
from llm_pruner.importance.observation import Measure
from llm_pruner.settings.options import near
from llm_pruner.settings.registry import CRITERIA, entry, names_in

_FOLDER = "importance/criteria"

MEASURES: dict[str, Measure] = {name: entry(_FOLDER, name).MEASURE for name in names_in(_FOLDER)}

_CHOICES: dict[str, tuple[str, ...]] = {
    "name": CRITERIA,
    "order": ("first", "second", "mixed"),
    "reduction": ("element", "vector"),
    "aggregate": ("sum", "prod", "max", "last"),
}


@dataclass(frozen=True)
class Criterion:
    """How importance is estimated.

    With w a weight, g the gradient of the calibration loss, F the mean over samples of the squared
    per-sample gradient, and k running over a unit's slice of one member (arXiv 2305.11627,
    equations 3 to 5):

    ========  ======================  ==========================
    order     reduction ``element``   reduction ``vector``
    ========  ======================  ==========================
    first     sum |g w|               |sum g w|
    second    sum F w^2 / 2           sum F w^2 / 2
    mixed     sum |g w - F w^2 / 2|   |sum (g w - F w^2 / 2)|
    ========  ======================  ==========================

    The loss is the mean over tokens and samples. Equation 5 sums F over the samples because its
    loss is a sum; with a mean the matching curvature is the mean of the squares, so that g w and
    F w^2 / 2 are terms of one expansion whatever the number of samples.

    Attributes:
        name: ``random``, ``l1`` (sum of magnitudes), ``l2`` (Euclidean norm), ``taylor``, or one of
            ``criteria.MEASURES``, which look at activations and know no order, reduction or
            aggregate.
        order: for taylor, which terms of the expansion.
        reduction: for taylor, whether the magnitude is taken of each element or of each slice.
        aggregate: how the members of a group are joined (section 3.2): ``sum``; ``prod``, returned
            as the geometric mean over the members; ``max``; or ``last``, the member that executes
            last. The geometric mean ranks the units of a group exactly as the product does, cannot
            overflow, and is on one scale for groups with different numbers of members.

    Raises:
        UserError: a value is unknown; names the known ones.
    """

    name: str = "taylor"
    order: str = "first"
    reduction: str = "element"
    aggregate: str = "sum"

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            value = getattr(self, field)
            if value not in known:
                label = "criterion" if field == "name" else field
                raise UserError(
                    f"unknown {label} {value!r}: {near(str(value), known)}choose one of "
                    f"{', '.join(known)}"
                )

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.name == "taylor" or self.name in MEASURES

    @property
    def scores_layers(self) -> bool:
        """Whether whole layers have a score: inputs of linear modules say nothing about them."""
        return self.name not in MEASURES or not MEASURES[self.name].reads_inputs

    def require_scores_of(self, kinds: Collection[str]) -> None:
        """Raise UserError if units of one of these kinds have no score."""
        if "layers" in kinds and not self.scores_layers:
            known = [name for name in CRITERIA if Criterion(name).scores_layers]
            raise UserError(
                f"criterion {self.name!r} reads the inputs of linear modules, which say nothing of "
                f"whole layers; use {', '.join(known)}, or leave layers out of the structures"
            )
