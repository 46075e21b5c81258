"""What a criterion that looks at activations is: a name, what it needs, and a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_pruner.importance.observation import Observation
from llm_pruner.types import FloatArray


@dataclass(frozen=True)
class Measure:
    """A criterion on one group's observation.

    Attributes:
        needs: what must be observed, of ``observation.NEEDS``.
        where_linear: what is observed besides, of groups that a linear module reads.
        formula: observation -> importance per unit, shape (units,); higher means keep.
        kinds: the kinds of groups it can score; None for all.
    """

    needs: frozenset[str]
    formula: Callable[[Observation], FloatArray]
    kinds: frozenset[str] | None = None
    where_linear: frozenset[str] = frozenset()
