"""Least squares around the weights that are there, with the ridge chosen on held-out tokens.

    W' = argmin sum_t |W' x_t - z_t|^2 + ridge * sum_i C_ii |W'_i - W_i|^2,  C = sum_t x_t x_t^T

over tokens t with inputs x and targets z. An infinite ridge leaves W; a ridge towards zero would
shrink the layer's output, which costs far more than the fit gains. Each input is held by its own
mean square, since the inputs of one layer differ by orders of magnitude: a ridge that is the same
for all holds the small ones and lets the large ones follow the noise of the sample.

With D the diagonal of C, S = D^-1/2 C D^-1/2, X the matrix of inputs by token and R = Z - X W^T
what is left to explain, two forms of the solution are equal, and the smaller system is solved:

    W' = W + (R^T X D^-1/2) (S + ridge I)^-1 D^-1/2               `Sums`, in_features unknowns
    W' = W + R^T (X D^-1 X^T + ridge I)^-1 X D^-1                 `Rows`, as many as tokens

Both systems have a diagonal near one, so float32 is enough, with factors that may be rounded to
bfloat16 in the products that make them. What is left to explain is a small difference of large
numbers, and its product is not rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import torch

from llm_pruner.models.consumers import add_gram_, complete_gram_
from llm_pruner.runtime.precision import fast_products

RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Ridges that are tried, as shares of each input's mean square."""

OUTPUTS = 256
"""Output features at most that choose the ridge."""

Outputs: TypeAlias = torch.Tensor | slice
"""Numbers of output features."""

_FLOOR = 1e-4
"""Least mean square of an input for the ridge, as a share of the mean over all inputs."""


class Equations(ABC):
    """Weighted tokens that a weight is fitted to."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Begin without tokens, in at least float32.

        Args:
            weight: as the cut left it, shape (out_features, in_features).
        """
        self.weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: shape (tokens, in_features).
            targets: shape (tokens, out_features).
            weights: shape (tokens,), of each token's squared error.
        """
        dtype = self.weight.dtype
        root = weights.to(dtype).sqrt()[:, None]
        with fast_products():
            self._add(inputs.to(dtype) * root, targets.to(dtype) * root)

    @abstractmethod
    def _add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens that are weighted already."""

    @abstractmethod
    def system(self) -> System:
        """Return what is to be solved for all tokens so far."""


class Rows(Equations):
    """The tokens themselves."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self._inputs: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []

    @property
    def inputs(self) -> torch.Tensor:
        """Weighted inputs, shape (tokens, in_features)."""
        return torch.cat(self._inputs)

    @property
    def targets(self) -> torch.Tensor:
        """Weighted targets, shape (tokens, out_features)."""
        return torch.cat(self._targets)

    def _add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self._inputs.append(inputs)
        self._targets.append(targets)

    def include(self, other: Rows) -> None:
        """Add the tokens of another one."""
        self._inputs += other._inputs
        self._targets += other._targets

    def error(self, weight: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
        """Return the squared error of a weight over the squared norm of the targets.

        Args:
            weight: shape (out_features, in_features), or the rows of some outputs.
            outputs: their numbers.
        """
        targets = self.targets if outputs is None else self.targets[:, outputs]
        with fast_products():
            left = targets - self.inputs @ weight.to(targets.dtype).T
        return float(
            left.double().square().sum() / targets.double().square().sum().clamp_min(1e-30)
        )

    def slope(self, weight: torch.Tensor, change: torch.Tensor, outputs: torch.Tensor) -> float:
        """Return in which direction `error` goes as some rows of the weight change: its sign."""
        x = self.inputs
        with fast_products():
            left = self.targets[:, outputs] - x @ weight.T
            return -float((left * (x @ change.T)).sum(dtype=torch.float64))

    def system(self) -> System:
        """Return a system with as many unknowns as tokens."""
        x, targets = self.inputs, self.targets
        scale = _scale(x.square().sum(0))

        def left(outputs: Outputs) -> torch.Tensor:
            return (targets[:, outputs] - x @ self.weight[outputs].T).T

        with fast_products():
            z = x * scale
            return System(z @ z.T, left, z * scale)


class Sums(Equations):
    """Sums over tokens.

    Attributes:
        gram: sum of x x^T, shape (in_features, in_features); complete in a `system`.
        cross: sum of z x^T, shape (out_features, in_features).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.gram = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        self.cross = torch.zeros_like(self.weight)

    def _add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        add_gram_(self.gram, inputs)
        self.cross.addmm_(targets.T, inputs)

    def include(self, other: Rows) -> None:
        """Add the tokens of another one."""
        with fast_products():
            self._add(other.inputs, other.targets)

    def system(self) -> System:
        """Return a system with as many unknowns as input features."""
        gram = complete_gram_(self.gram)
        scale = _scale(gram.diagonal())

        def gap(outputs: Outputs) -> torch.Tensor:
            return (self.cross[outputs] - self.weight[outputs] @ gram) * scale

        return System((gram * scale).mul_(scale[:, None]), gap, scale)


@dataclass
class System:
    """What `ridge` is added to the diagonal of, and what it is solved for.

    Attributes:
        matrix: symmetric, shape (unknowns, unknowns).
        right: gives the rows of some output features, shape (outputs, unknowns).
        back: from a solution to a change of the weight: a matrix (unknowns, in_features) that it is
            multiplied with, or a factor of each input (in_features,).
    """

    matrix: torch.Tensor
    right: Callable[[Outputs], torch.Tensor]
    back: torch.Tensor

    def steps(
        self, ridge: float, outputs: Outputs = slice(None), slope: bool = False
    ) -> list[torch.Tensor]:
        """Return the change of the weight, (outputs, in_features), in a list; none if it has none.

        Args:
            ridge: positive.
            outputs: output features that are wanted; all by default.
            slope: give its derivative by the ridge as well.
        """
        diagonal = self.matrix.diagonal()
        before = diagonal.clone()
        diagonal.add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        diagonal.copy_(before)
        if failed:
            return []
        with torch.autocast("cpu", enabled=False):
            right = self.right(outputs).T  # a difference: its product is not rounded
        solved = [torch.cholesky_solve(right, factor)]
        if slope:
            solved.append(-torch.cholesky_solve(solved[0], factor))
        with fast_products():
            by_input = self.back.ndim == 1
            return [one.T * self.back if by_input else one.T @ self.back for one in solved]


def _scale(energy: torch.Tensor) -> torch.Tensor:
    """Return D^-1/2."""
    least = (_FLOOR * energy.mean()).clamp_min(torch.finfo(energy.dtype).tiny)
    return energy.clamp_min(least).rsqrt()


def equations(weight: torch.Tensor, tokens: int) -> Rows | Sums:
    """Return the form that is smaller for a weight and so many tokens."""
    return Rows(weight) if tokens <= weight.shape[1] else Sums(weight)


@dataclass
class Choice:
    """A weight, and what it was chosen by.

    Attributes:
        ridge: None if the weight is as it was.
        before, after: errors on held-out tokens, of at most ``OUTPUTS`` output features; of a fit
            that had not seen these tokens.
    """

    weight: torch.Tensor
    ridge: float | None
    before: float
    after: float


def best_refit(
    fit: Rows | Sums,
    held_out: Rows,
    ridges: Sequence[float] = RIDGES,
    start: float | None = None,
) -> Choice:
    """Return the weight refitted with the ridge that does best on the held-out tokens.

    It then fits all tokens; ``fit`` has them afterwards. Where no ridge lowers the held-out error
    the weight stays. The search goes from one ridge to the next, to the side where the error falls,
    for as long as it does.

    Args:
        start: the ridge that is tried first, by default the middle one.
    """
    ridge, before, after = _chosen(fit, held_out, sorted(ridges), start)
    if ridge is None:
        return Choice(fit.weight, None, before, before)
    fit.include(held_out)
    steps = fit.system().steps(ridge)
    if not steps:
        return Choice(fit.weight, None, before, before)
    return Choice(fit.weight + steps[0], ridge, before, after)


def _chosen(
    fit: Rows | Sums, held_out: Rows, order: Sequence[float], start: float | None
) -> tuple[float | None, float, float]:
    """Return the ridge, None where none lowers the held-out error, and that without it and with."""
    weight = fit.weight
    count = len(weight)
    some = torch.arange(0, count, -(-count // OUTPUTS), device=weight.device)
    before = held_out.error(weight[some], some)
    system = fit.system()

    def tried(place: int, slope: bool = False) -> tuple[float, float]:
        """Return the error with a ridge, and where asked for in which direction it grows."""
        if not 0 <= place < len(order):
            return inf, 0.0
        steps = system.steps(order[place], some, slope)
        if not steps:
            return inf, -1.0  # a larger ridge may do
        error = held_out.error(weight[some] + steps[0], some)
        return error, held_out.slope(weight[some] + steps[0], steps[1], some) if slope else 0.0

    place = order.index(start) if start in order else len(order) // 2
    error, slope = tried(place, slope=True)
    side = -1 if slope > 0 else 1
    while (next_error := tried(place + side)[0]) < error:
        place, error = place + side, next_error
    return (order[place] if error < before else None), before, error
