"""Least squares around the weights that are there, with the ridge chosen on held-out tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llm_pruner.models.consumers import add_gram_

RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Ridges that are tried, as shares of each input's mean square."""

_FLOOR = 1e-4
"""Least mean square of an input for the ridge, as a share of the mean over all inputs."""


@dataclass
class Moments:
    """Weighted sums over tokens of inputs x and targets t.

    Attributes:
        gram: sum of x x^T, shape (in_features, in_features), float32 or wider.
        cross: sum of t x^T, shape (out_features, in_features).
        energy: sum of |t|^2.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0
    tokens: int = field(default=0)

    @classmethod
    def zeros(cls, weight: torch.Tensor) -> Moments:
        """Return sums over no token for a weight, in at least float32, on its device."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        outputs, inputs = weight.shape
        return cls(
            torch.zeros(inputs, inputs, dtype=dtype, device=weight.device),
            torch.zeros(outputs, inputs, dtype=dtype, device=weight.device),
        )

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: shape (tokens, in_features).
            targets: shape (tokens, out_features).
            weights: shape (tokens,), of each token's squared error.
        """
        root = weights.to(self.gram.dtype).sqrt()[:, None]
        x, t = inputs.to(self.gram.dtype) * root, targets.to(self.gram.dtype) * root
        add_gram_(self.gram, x)
        self.cross.addmm_(t.T, x)
        self.energy += float(t.double().square().sum())
        self.tokens += len(x)

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both."""
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.tokens + other.tokens,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Return the squared error of ``weight`` over the squared norm of the targets."""
        W = weight.double()
        value = (W @ self.gram.double() * W).sum() - 2 * (W * self.cross.double()).sum()
        return max(0.0, float(value) + self.energy) / max(self.energy, 1e-30)


def refitted(
    weight: torch.Tensor, moments: Moments, ridge: float, gap: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight that fits the targets best while it stays near what it was.

    W' = argmin sum_t |W' x - t|^2 + ridge * sum_i C_ii |W'_i - W_i|^2
       = W + (X - W C) (C + ridge * diag(C))^-1, with C the Gram matrix and X the cross moments.

    An infinite ridge leaves W; a ridge towards zero would shrink the layer's output, which costs
    far more than the fit gains. Each input is held by its own mean square, since the inputs of one
    layer differ by orders of magnitude: a ridge that is the same for all holds the small ones and
    lets the large ones follow the noise of the sample.

    Args:
        weight: shape (out_features, in_features).
        moments: of the same features.
        ridge: positive.
        gap: X - W C if it is known.

    Returns:
        float64, shape (out_features, in_features).
    """
    W, C = weight.double(), moments.gram.double()
    energy = C.diagonal()
    least = (_FLOOR * energy.mean()).clamp_min(torch.finfo(C.dtype).tiny)
    A = C + torch.diag(ridge * energy.clamp_min(least))
    gap = _gap(W, moments) if gap is None else gap
    step: torch.Tensor = torch.cholesky_solve(gap.T, torch.linalg.cholesky(A)).T
    return W + step


def _gap(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    return moments.cross.double() - weight.double() @ moments.gram.double()


def best_refit(
    weight: torch.Tensor, fit: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES
) -> tuple[torch.Tensor, float | None, float, float]:
    """Return (weight, ridge, error before, error after), errors on the held-out tokens.

    The ridge that does best on the held-out tokens then fits all tokens. Where no ridge lowers the
    held-out error the weight is returned as it was, with ridge None. The errors are those of the
    fit that had not seen the held-out tokens.
    """
    before = held_out.error(weight)
    after, best = before, None
    if fit.tokens:
        gap = _gap(weight, fit)
        for ridge in ridges:
            error = held_out.error(refitted(weight, fit, ridge, gap))
            if error < after:
                after, best = error, ridge
    if best is None:
        return weight, None, before, before
    return refitted(weight, fit + held_out, best), best, before, after
