"""Give back what the removed inputs added on average, as a bias of what reads them.

For a consumer y = W x + b that loses the inputs r,

    b' = b + W_r E[x_r],

with the mean over calibration tokens of the dense model's inputs (An et al., "Fluctuation-based
Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983, bias compensation). One
forward pass of the dense model and no matrix to solve; the squared error that is left is the
variance of W_r x_r instead of its mean square. A consumer without a bias gets one, so that a plain
config can no longer say the sizes of a Llama.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_pruner.compensation.pairs import Pair, Refitted, pairs_of
from llm_pruner.models.consumers import weight_of
from llm_pruner.models.undisturbed import undisturbed
from llm_pruner.runtime.progress import track
from llm_pruner.types import Discovery, Removal

_TOKENS = 2048


def add_means_(
    model: nn.Module,
    dense: nn.Module,
    discovery: Discovery,
    removal: Removal,
    input_ids: torch.Tensor,
) -> list[Refitted]:
    """Set the biases of the consumers of a pruned model in place.

    Args:
        model: the pruned model.
        dense: the model before the removal; left as it was.
        discovery: of the dense model.
        removal: all that was removed, in its numbering.
        input_ids: calibration tokens, shape (samples, seq_len).

    Returns:
        The consumers that lost inputs, with the error of their output on the same tokens. One that
        saw no token (an expert that nothing was sent to) is as it was.
    """
    pairs = [p for p in pairs_of(model, dense, discovery, removal).values() if len(p.lost)]
    sums = [_Sums(pair) for pair in pairs]
    ids = input_ids.detach().to(next(dense.parameters()).device, torch.long)
    with undisturbed(dense), torch.no_grad(), _watched(sums):
        for part in track(ids.split(max(1, _TOKENS // ids.shape[1])), "means of what was removed"):
            dense(part)
    return [one.set_() for one in sums]


@dataclass
class _Sums:
    """Sums over tokens of what one consumer of the dense model reads and gives.

    Attributes:
        pair: the consumer.
        total: of the lost inputs, shape (lost,), float64; a number before any token.
        square: of the squared norm of what they add to the output.
        energy: of the squared norm of the output without its bias.
        tokens: rows seen.
    """

    pair: Pair
    total: torch.Tensor | float = 0.0
    square: float = 0.0
    energy: float = 0.0
    tokens: int = 0

    def see(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Take the tokens of one call of the dense module."""
        lost = torch.from_numpy(self.pair.lost).to(output.device)
        out = self.pair.out.to(output.device)
        weight = weight_of(module)[:, lost][out]
        inputs = args[0].flatten(0, -2)[:, lost]
        added = inputs.to(weight.dtype) @ weight.T
        whole = output.flatten(0, -2)[:, out].double()
        if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            whole = whole - bias.detach()[out].double()
        self.total = self.total + inputs.double().sum(0)
        self.square += float(added.double().square().sum())
        self.energy += float(whole.square().sum())
        self.tokens += len(added)

    def set_(self) -> Refitted:
        """Give the pruned module its bias."""
        pair = self.pair
        if not isinstance(self.total, torch.Tensor) or not self.tokens:
            return Refitted(pair.name, None, 0.0, 0.0)
        lost, out = (one.to(self.total.device) for one in (torch.from_numpy(pair.lost), pair.out))
        mean = weight_of(pair.dense)[:, lost][out].double() @ (self.total / self.tokens)
        old = getattr(pair.dense, "bias", None)
        weight = pair.module.get_parameter("weight")
        base = old.detach()[out].double() if old is not None else 0.0
        pair.module.bias = nn.Parameter(
            (mean + base).to(weight.device, weight.dtype), requires_grad=weight.requires_grad
        )
        energy = max(self.energy, 1e-30)
        left = max(0.0, self.square - self.tokens * float(mean.square().sum()))
        return Refitted(pair.name, None, self.square / energy, left / energy, biased=True)


@contextmanager
def _watched(sums: list[_Sums]) -> Iterator[None]:
    handles = [one.pair.dense.register_forward_hook(one.see) for one in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
