"""The forward pass that keeps hidden states at the borders and starts the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from llm_pruner.importance.gradients import batches, loss_cotangent, pull_back
from llm_pruner.models.blockwise import Borders, Call, Chain, hidden_of, output_of, with_output


class Tap(Protocol):
    """Sees inputs of modules during a forward pass and takes their gradients afterwards."""

    def taken(self) -> list[tuple[str, torch.Tensor]]:
        """Return what was seen since the last call: (module, input), with a gradient each."""

    def give(
        self,
        part: slice,
        tapped: Sequence[tuple[str, torch.Tensor]],
        gradients: Sequence[torch.Tensor | None],
        factor: float,
    ) -> None:
        """Take the gradients of ``tapped``; the true ones are ``factor`` times them."""


TOKENS = 2048
"""Tokens that go through a block together, where samples need not be told apart."""

_LOGIT_BYTES = 2**27
"""Bytes of logits held at a time; their gradient takes as much again."""


def parts_of(
    chain: Chain, input_ids: torch.Tensor, together: bool
) -> tuple[list[slice], list[slice]]:
    """Return the samples that go through a block at a time, and through the head as well.

    Args:
        together: whether samples need not be told apart.
    """
    samples, length = input_ids.shape
    logits = _LOGIT_BYTES // (length * chain.vocabulary * 4)
    return (
        batches(samples, max(1, TOKENS // length) if together else 1),
        batches(samples, max(1, min(TOKENS // length, logits))),
    )


def hidden_form(chain: Chain, input_ids: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape, without samples, and type of the hidden state of one full sample."""
    with torch.no_grad():
        entry = chain.entry(input_ids[:1])
    return tuple(entry.shape[1:]), entry.dtype


def forward(
    chain: Chain,
    input_ids: torch.Tensor,
    part: slice,
    borders: Borders,
    slopes: Borders,
    wanted: range,
    tap: Tap | None = None,
) -> None:
    """Store the hidden states of a few samples and the gradient at the last border.

    Inputs that ``tap`` has seen above the last block get their gradient as well.
    """
    last = len(chain.blocks) - 1
    leaves: list[torch.Tensor] = []

    def handler(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if at in wanted:
            borders.write(at, part, hidden_of(args, kwargs))
        with torch.no_grad():
            output = original(*args, **kwargs)
        if at < last:
            return output
        if last + 1 in wanted:
            borders.write(last + 1, part, output_of(output))
        leaves.append(output_of(output).detach().requires_grad_())
        return with_output(output, leaves[0])

    logits = chain.run(input_ids[part], handler)
    cotangent = loss_cotangent(logits, input_ids[part], part.start)
    tapped = [] if tap is None else tap.taken()
    inputs = [*leaves, *(tensor for _, tensor in tapped)]
    (slope, *above), factor = pull_back([logits], inputs, [cotangent], part)
    store_slope(slopes, part, slope, factor)
    if tap is not None:
        tap.give(part, tapped, above, factor)


def store_slope(slopes: Borders, part: slice, slope: torch.Tensor | None, factor: float) -> None:
    """Store the gradient at a border, in float32 or wider."""
    if slope is None:
        raise AssertionError("a border without a gradient passed the probe")
    wide = slope.to(torch.promote_types(slope.dtype, torch.float32))
    slopes.write(0, part, wide if factor == 1.0 else wide * factor)
