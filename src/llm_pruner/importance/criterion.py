"""What is measured on each weight, and how a group's members are joined."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields

from llm_pruner.errors import UserError
from llm_pruner.importance.criteria import MEASURES

CHOICES: dict[str, tuple[str, ...]] = {
    "name": ("random", "l1", "l2", "taylor", *MEASURES),
    "order": ("first", "second", "mixed"),
    "reduction": ("element", "vector"),
    "aggregate": ("sum", "prod", "max", "last"),
}
_LABELS = {"name": "criterion"}


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
        for field in fields(self):
            value, known = getattr(self, field.name), CHOICES[field.name]
            if value in known:
                continue
            label = _LABELS.get(field.name, field.name)
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown {label} {value!r}: choose one of {', '.join(known)}{hint}")

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.name == "taylor" or self.name in MEASURES
