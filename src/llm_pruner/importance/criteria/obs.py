"""Error of the consumer's output that is left when the others make up for a unit.

With C the mean outer product of the consumer's inputs, removing the features B of a unit and
refitting the rest costs tr(W_B [C^-1]_BB^-1 W_B^T) in mean squared output (Optimal Brain Surgeon;
Frantar and Alistarh, arXiv 2208.11580, for blocks). A ridge keeps C invertible.
"""

from __future__ import annotations

import math

import torch

from llm_pruner.importance.observation import Measure, Reading, over_readings
from llm_pruner.types import FloatArray

RIDGE = 0.1
"""Share of the mean diagonal of C that is added to the diagonal."""


def _cost(reading: Reading) -> FloatArray:
    assert reading.gram is not None
    gram = reading.gram.to(torch.float64, copy=True)
    inverse = regular_inverse(gram.div_(max(reading.tokens, 1)), RIDGE)
    index = torch.from_numpy(reading.consumer.index).to(inverse.device)
    weight = reading.weight.double()
    if index.shape[1] == 1:
        energy = weight.square().sum(0)[index[:, 0]]
        cost = energy / inverse.diagonal()[index[:, 0]]
    else:
        blocks = inverse[index[:, :, None], index[:, None, :]]
        columns = weight[:, index].permute(1, 2, 0)  # (units, k, out_features)
        cost = (columns * torch.linalg.solve_ex(blocks, columns).result).sum((1, 2))
    return cost.cpu().numpy()


def regular_inverse(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the inverse of a positive semidefinite matrix plus a share of its mean diagonal.

    The matrix, which may be one of many GB, holds that sum afterwards. The inverse is NaN where the
    matrix is no such one, as that of activations that are not finite.
    """
    damping = ridge * matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.full_like(matrix, math.nan) if failed else torch.cholesky_inverse(factor)


MEASURE = Measure(frozenset({"moments", "gram"}), over_readings(_cost))
