"""Least squares around the weights that are there, with the ridge chosen on held-out tokens.

    W' = argmin sum_t |W' x_t - z_t|^2 + ridge * sum_i C_ii |W'_i - W_i|^2,  C = sum_t x_t x_t^T

over tokens t with inputs x and targets z. An infinite ridge leaves W. Each input is held by its own
mean square, since the inputs of one layer differ by orders of magnitude.

With D the diagonal of C, S = D^-1/2 C D^-1/2, X the matrix of inputs by token and R = Z - X W^T
what is left to explain, two forms of the solution are equal, and the smaller system is solved:

    W' = W + (R^T X D^-1/2) (S + ridge I)^-1 D^-1/2               `Sums`, in_features unknowns
    W' = W + R^T (X D^-1 X^T + ridge I)^-1 X D^-1                 `Rows`, as many as tokens

Both systems have a diagonal near one, so float32 is enough, and some products may be rounded to
bfloat16. R is computed for each token: the difference Z^T X - W X^T X would leave what was rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import copysign, exp, inf, log
from typing import TypeAlias

import torch

from llm_pruner.models.linear_modules import add_gram_, add_product_, complete_gram_
from llm_pruner.runtime.precision import fast_products, rounded

RIDGES = (0.1, 3.0)
"""Least and largest ridge that is tried, as shares of each input's mean square."""

OUTPUTS = 256
"""Output features at most that choose the ridge."""

Outputs: TypeAlias = torch.Tensor | slice
"""Numbers of output features."""

_TRIES = 6
_STRIDE = log(3)
"""How far the logarithm of the ridge goes at once."""
_NEAR = log(2)
"""How far it goes where the parabola through a try puts the least error, without another try."""

_FLOOR = 1e-4
"""Least mean square of an input for the ridge, as a share of the mean over all inputs."""


class Equations(ABC):
    """Weighted tokens that a weight is fitted to."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add inputs (tokens, in_features), targets (tokens, out_features), weights (tokens,)."""
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
        self._inputs += other._inputs
        self._targets += other._targets

    def error(self, weight: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
        """Return the squared error of a weight, or rows of ``outputs``, over that of targets."""
        targets = self.targets if outputs is None else self.targets[:, outputs]
        with fast_products():
            left = targets - self.inputs @ weight.to(targets.dtype).T
        return float(
            left.double().square().sum() / targets.double().square().sum().clamp_min(1e-30)
        )

    def turns(
        self, weight: torch.Tensor, changes: Sequence[torch.Tensor], outputs: torch.Tensor
    ) -> tuple[float, float]:
        """Return the first and second derivative of `error` for some rows of the weight."""
        x, targets = self.inputs, self.targets[:, outputs]
        with fast_products():
            left = (targets - x @ weight.T).double()
            first, second = ((x @ change.T).double() for change in changes)
        norm = targets.double().square().sum().clamp_min(1e-30)
        bend = first.square().sum() - (left * second).sum()
        return float(-2 * (left * first).sum() / norm), float(2 * bend / norm)

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
        cross: sum of (z - W x) x^T, shape (out_features, in_features).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.gram = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        self.cross = torch.zeros_like(self.weight)
        short = rounded(self.weight)
        exact = torch.equal(short.to(self.weight.dtype), self.weight)
        self._factor = short if exact else self.weight

    def _add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        x = rounded(inputs)
        left = rounded(targets - x.to(self._factor.dtype) @ self._factor.T)
        add_gram_(self.gram, x)
        add_product_(self.cross, left.T, x)

    def include(self, other: Rows) -> None:
        with fast_products():
            self._add(other.inputs, other.targets)

    def system(self) -> System:
        """Return a system with as many unknowns as input features."""
        gram = complete_gram_(self.gram)
        scale = _scale(gram.diagonal())
        matrix = (gram * scale).mul_(scale[:, None])
        return System(matrix, lambda outputs: self.cross[outputs] * scale, scale)


@dataclass
class System:
    """A linear system, to whose diagonal the ridge is added.

    Attributes:
        right: gives the right-hand sides of some output features, shape (outputs, unknowns).
    """

    matrix: torch.Tensor
    right: Callable[[Outputs], torch.Tensor]
    back: torch.Tensor

    def steps(
        self, ridge: float, outputs: Outputs = slice(None), derivatives: int = 0
    ) -> list[torch.Tensor]:
        """Return the change of the weight, (outputs, in_features), and so many ``derivatives`` by
        the ridge; nothing if the system cannot be solved.
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
        for order in range(1, derivatives + 1):
            solved.append(-order * torch.cholesky_solve(solved[-1], factor))
        with fast_products():
            by_input = self.back.ndim == 1
            return [one.T * self.back if by_input else one.T @ self.back for one in solved]


def _scale(energy: torch.Tensor) -> torch.Tensor:
    least = (_FLOOR * energy.mean()).clamp_min(torch.finfo(energy.dtype).tiny)
    return energy.clamp_min(least).rsqrt()


def equations(weight: torch.Tensor, tokens: int) -> Rows | Sums:
    """Return the form that is smaller for a weight and so many tokens."""
    return Rows(weight) if tokens <= weight.shape[1] else Sums(weight)


@dataclass
class Choice:
    """A weight; its ridge, None if it is as it was; and errors on held-out tokens that the fit had
    not seen, of at most ``OUTPUTS`` output features.
    """

    weight: torch.Tensor
    ridge: float | None
    before: float
    after: float


def best_refit(
    fit: Rows | Sums,
    held_out: Rows,
    ridges: tuple[float, float] = RIDGES,
    start: float | None = None,
) -> Choice:
    """Return the weight refitted with the ridge that does best on the held-out tokens.

    It is fitted to all tokens then. Where no ridge lowers the held-out error the weight stays. The
    search is Newton's, in the logarithm of the ridge.
    """
    ridge, before, after = _chosen(fit, held_out, ridges, start)
    if ridge is None:
        return Choice(fit.weight, None, before, before)
    fit.include(held_out)
    steps = fit.system().steps(ridge)
    if not steps:
        return Choice(fit.weight, None, before, before)
    return Choice(fit.weight + steps[0], ridge, before, after)


def _chosen(
    fit: Rows | Sums, held_out: Rows, ridges: tuple[float, float], start: float | None
) -> tuple[float | None, float, float]:
    """Return the ridge, None where none helps, and the held-out errors without it and with it."""
    weight = fit.weight
    count = len(weight)
    some = torch.arange(0, count, -(-count // OUTPUTS), device=weight.device)
    before = held_out.error(weight[some], some)
    system = fit.system()
    least, most = map(log, ridges)
    place = min(max((least + most) / 2 if start is None else log(start), least), most)
    chosen, after = None, before
    for _ in range(_TRIES):
        if steps := system.steps(exp(place), some, derivatives=2):
            tried = weight[some] + steps[0]
            error = held_out.error(tried, some)
            slope, bend = (exp(place) * one for one in held_out.turns(tried, steps[1:], some))
            bend = exp(place) * bend + slope  # both by the logarithm now
            wished = -slope / bend if bend > 0 else -copysign(inf, slope)
        else:
            error, wished = inf, inf  # a larger ridge may do
        step = min(max(place + min(max(wished, -_STRIDE), _STRIDE), least), most) - place
        if error < after:
            chosen, after = exp(place + step) if abs(step) < _NEAR else exp(place), error
        elif chosen is not None:
            break  # it was less far from there
        if abs(step) < (0.05 if chosen is None else _NEAR):
            break
        place += step
    return chosen, before, after
