"""A criterion that looks at activations, and what it sees of a group: gates, consumers' inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llm_pruner.errors import UserError
from llm_pruner.models.linear_modules import Consumer
from llm_pruner.types import FloatArray, Group


@dataclass
class Reading:
    """What one consumer read over all calibration tokens.

    Attributes:
        consumer: the linear module and the positions of its input that each unit owns.
        weight: shape (out_features, in_features), float32.
        tokens: number of tokens seen; a consumer inside an expert sees fewer than others.
        total: sum of the inputs, shape (in_features,), float64.
        square: sum of their squares, shape (in_features,), float64.
        gram: sum of the outer products of the inputs, shape (in_features, in_features), float32;
            None unless asked for.
    """

    consumer: Consumer
    weight: torch.Tensor
    tokens: int
    total: FloatArray
    square: FloatArray
    gram: torch.Tensor | None = None

    @cached_property
    def weight_norms(self) -> FloatArray:
        """Squared norm of the weight's column for each input feature, shape (in_features,)."""
        return self.weight.double().square().sum(0).cpu().numpy()

    @property
    def mean_square(self) -> FloatArray:
        """Mean over tokens of the squared input, shape (in_features,)."""
        return self.square / max(self.tokens, 1)

    @property
    def variance(self) -> FloatArray:
        """Variance over tokens of the input, shape (in_features,)."""
        mean = self.total / max(self.tokens, 1)
        return np.maximum(self.mean_square - mean**2, 0.0)

    def by_unit(self, features: FloatArray) -> FloatArray:
        """Sum a value per input feature over the features of each unit, shape (units,)."""
        return features[self.consumer.index].sum(1)


@dataclass
class Observation:
    """What was seen of one group; parts that the criterion did not ask for are None or empty.

    Attributes:
        group: the group.
        gates: shape (samples, segments, units): the derivative of the sample's loss (mean over its
            tokens) by a gate of 1 on the unit in a segment of 128 tokens, which is the sum over
            these of activation times gradient. Where the tokens cannot be told apart (inside
            experts) the first segment has it all.
        readings: one for each linear consumer; empty where others read the group, too.
        token_squares: shape (units,): sum over tokens, and over linear consumers, of the squared
            derivative by a gate on the unit at one token; None where others read the group, too.
    """

    group: Group
    gates: FloatArray | None = None
    readings: tuple[Reading, ...] = ()
    token_squares: FloatArray | None = None


OBSERVED = ("gates", "tokens", "moments", "gram")
"""What a criterion may ask for."""


@dataclass(frozen=True)
class Measure:
    """A criterion on one group's observation.

    Attributes:
        needs: what must be observed, of ``gates``, ``tokens``, ``moments`` and ``gram``.
        where_linear: what is observed besides, of groups that linear modules alone read.
        formula: observation -> importance per unit, shape (units,); higher means keep.

    """

    needs: frozenset[str]
    formula: Callable[[Observation], FloatArray]
    where_linear: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if strange := {*self.needs, *self.where_linear} - {*OBSERVED}:
            raise UserError(f"a criterion needs {strange}; known are {', '.join(OBSERVED)}")

    def values(self, seen: Observation) -> FloatArray:
        """Return the importance of a group's units, shape (units,), by the formula.

        Raises:
            UserError: it gives another shape.
        """
        values = np.asarray(self.formula(seen), dtype=np.float64)
        if values.shape != (seen.group.size,):
            raise UserError(
                f"the formula of the criterion gives an array of shape {values.shape} for "
                f"{seen.group.name}, which has {seen.group.size} units"
            )
        return values

    @property
    def reads_inputs(self) -> bool:
        """Whether nothing can be said without the inputs of linear modules."""
        return bool(self.needs & {"moments", "gram"})


def over_readings(value: Callable[[Reading], FloatArray]) -> Callable[[Observation], FloatArray]:
    """Return the formula that sums a value for each unit, shape (units,), over the consumers."""
    return lambda seen: np.sum([value(reading) for reading in seen.readings], axis=0)
