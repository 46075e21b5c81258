"""Which positions the tokens of a row have, and which of them see which.

    left padding | context ... [gMASK] | <sop> answer ...

Everything follows from where ``<sop>`` and the mask token stand; see ``Layout``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch are read; int64 tensors of shape (batch,) unless said otherwise.

    Attributes:
        padding: number of padding tokens on the left.
        context: number of tokens before the first ``<sop>``, without padding. They see each other
            both ways, and every later token sees them all.
        mask_position: position of the first [gMASK], or of the first [MASK] if there is none;
            counted from 0 without padding.
        fills_in: bool; the row has [MASK] and no [gMASK], so that its answer fills a gap in the
            context. One-dimensional positions differ in this case alone.
    """

    padding: torch.Tensor
    context: torch.Tensor
    mask_position: torch.Tensor
    fills_in: torch.Tensor


def read_layout(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    bos_token_id: int | None,
    mask_token_id: int,
    gmask_token_id: int,
) -> Layout:
    """Find context and mask token of each row.

    A row without ``<sop>`` is plain text: the model has no form for it, and it is read as an answer
    to an empty context (``context`` and ``mask_position`` are 0), which is causal and has the
    positions that the model writes text with. A row with ``<sop>`` and no mask token is read as if
    the last token of its context were one.

    Args:
        tokens: ids, shape (batch, sequence); or embeddings, (batch, sequence, ...): plain text.
        attention_mask: shape (batch, sequence), 0 at padding; none if None.
    """
    zero = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    padding = zero if attention_mask is None else _first(attention_mask != 0)
    if tokens.dim() > 2:
        return Layout(padding, zero, zero, zero.bool())
    starts = tokens == (-1 if bos_token_id is None else bos_token_id)
    gmasks, masks = tokens == gmask_token_id, tokens == mask_token_id
    has_start, has_gmask, has_mask = (hit.any(dim=1) for hit in (starts, gmasks, masks))
    context = torch.where(has_start, _first(starts) - padding, 0)
    mask_position = torch.where(
        has_gmask,
        _first(gmasks) - padding,
        torch.where(has_mask, _first(masks) - padding, (context - 1).clamp(min=0)),
    )
    mask_position = torch.where(has_start, mask_position, 0)
    return Layout(padding, context, mask_position, has_start & has_mask & ~has_gmask)


def positions(
    layout: Layout, start: int, length: int, *, two_dimensional: bool
) -> tuple[torch.Tensor, ...]:
    """Return the positions of tokens ``start`` to ``start + length``, padding counted.

    Two-dimensional: (position, block position), each of shape (batch, length). A token of the
    context has its place as position and 0 as block position; a token of the answer has the
    position of the mask token, and block positions count from 1 at ``<sop>``. One-dimensional: the
    place alone, but for answers that fill a gap.
    """
    place = torch.arange(start, start + length, device=layout.padding.device)
    place = (place[None] - layout.padding[:, None]).clamp(min=0)
    context, mask_position = layout.context[:, None], layout.mask_position[:, None]
    in_answer = place >= context
    if not two_dimensional:
        return (torch.where(in_answer & layout.fills_in[:, None], mask_position, place),)
    return (
        torch.where(in_answer, mask_position, place),
        torch.where(in_answer, place - context + 1, 0),
    )


def visible(
    layout: Layout, start: int, queries: int, keys: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return which keys each query sees, bool of shape (batch, 1, queries, keys).

    A query sees the context of its row, all tokens before it, and itself; nothing sees padding but
    padding itself, so that no row of the softmax is empty.

    Args:
        start: place of the first query, padding counted; that of the first key is 0.
        attention_mask: shape (batch, at most ``keys``), 0 at padding; also finds padding on the
            right.
    """
    key = torch.arange(keys, device=layout.padding.device)[None, None]
    query = torch.arange(start, start + queries, device=layout.padding.device)[None, :, None]
    padding, context = layout.padding[:, None, None], layout.context[:, None, None]
    seen = (key <= query) | (key < padding + context)
    seen = seen & (key >= padding)
    if attention_mask is not None:
        real = attention_mask.bool()
        # A cache of fixed size has places that are not filled yet; they come after every query.
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]), value=True)
        seen = seen & real[:, None]
    return (seen | (key == query))[:, None]


def _first(hits: torch.Tensor) -> torch.Tensor:
    """Return the place of the first True in each row, 0 where there is none."""
    return hits.long().argmax(dim=1)
