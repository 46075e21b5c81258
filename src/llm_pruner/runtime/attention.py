"""Causal attention on a CPU, sample by sample and up to the diagonal.

transformers keeps packed samples apart by a mask over whole rows, and PyTorch's kernel computes all
that the mask then discards. Here a few queries at a time are multiplied with the keys that one of
them sees: training is 1.2 times as fast (benchmarks/results/recovery_kernels.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_TILE = 64
"""Queries at a time on a CPU: their scores fit in its cache."""

_OTHERWISE = ("position_bias", "softcap", "s_aux", "output_attentions")
"""Arguments with which attention is more than a softmax of scaled products."""

Attention = Callable[..., tuple[torch.Tensor, Any]]


@contextmanager
def by_sample() -> Iterator[None]:
    """Have models that use PyTorch's attention through transformers compute it by sample.

    The result is the same but for rounding. Holds for all models of this process until the block
    ends; one that has an attention of its own, or another than ``sdpa``, is not touched.
    """
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", partial(_attend, plain, _Samples()))
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", plain)


class Block(NamedTuple):
    """Tokens from start to end of some rows, which see each other and no others."""

    rows: slice
    start: int
    end: int

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Return the part of states, (rows, heads, length, features)."""
        return states[self.rows, :, self.start : self.end]


class Tile(NamedTuple):
    """Some queries of all rows, and the keys from the first that one of them sees to the last.

    ``unseen``: True where a query does not see a key, (rows, queries, keys); None where each sees
    all up to its own place.
    """

    queries: slice
    keys: slice
    unseen: torch.Tensor | None = None


def tiles_of(blocks: list[Block], rows: int, length: int) -> list[Tile]:
    """Return the tiles of rows that consist of blocks."""
    first = torch.zeros(rows, length, dtype=torch.long, device="cpu")
    for block in blocks:
        first[block.rows, block.start : block.end] = block.start
    whole, places = not bool(first.any()), torch.arange(length, device="cpu")
    tiles = []
    for start in range(0, length, _TILE):
        queries = slice(start, min(start + _TILE, length))
        keys = slice(int(first[:, start].min()), queries.stop)
        before, own = first[:, queries, None], places[queries, None]
        unseen = None if whole else (places[keys] < before) | (places[keys] > own)
        tiles.append(Tile(queries, keys, unseen))
    return tiles


class _Samples:
    """The blocks and tiles of the last mask, which is the same tensor in all layers."""

    def __init__(self) -> None:
        self._mask: Callable[[], torch.Tensor | None] = lambda: None
        self._state = (0, 0, 0)
        self._found: tuple[list[Block], list[Tile]] | None = None

    def __call__(
        self, mask: torch.Tensor | None, rows: int, length: int
    ) -> tuple[list[Block], list[Tile]] | None:
        if mask is None:
            whole = [Block(slice(0, rows), 0, length)]
            return whole, tiles_of(whole, rows, length)
        state = (mask._version, rows, length)
        if self._mask() is not mask or self._state != state:
            self._mask, self._state = ref(mask), state
            blocks = blocks_of(mask, rows)
            self._found = None if blocks is None else (blocks, tiles_of(blocks, rows, length))
        return self._found


@torch.no_grad()
def blocks_of(mask: torch.Tensor, rows: int) -> list[Block] | None:
    """Return the blocks that a mask consists of, row by row; None if it is another kind of mask.

    Args:
        mask: True where a query (second to last dimension) sees a key, (1 or rows, 1, n, n).
        rows: of the batch.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    length = mask.shape[-1]
    if mask.shape[-2] != length or mask.shape[0] not in (1, rows):
        return None
    seen = mask[:, 0]
    # A token that does not see the one before it is the first of its sample.
    first = ~seen.diagonal(-1, 1, 2)
    sample = F.pad(first.cumsum(1), (1, 0))
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if not bool((seen == ((sample[:, :, None] == sample[:, None]) & causal)).all()):
        return None
    blocks = []
    for number, row in enumerate(first.tolist()):
        starts = [0, *(place + 1 for place, is_first in enumerate(row) if is_first), length]
        where = slice(0, rows) if len(first) == 1 else slice(number, number + 1)
        blocks += [Block(where, a, b) for a, b in pairwise(starts)]
    return blocks


def _attend(
    plain: Attention,
    samples: _Samples,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, Any]:
    """Return what ``plain`` does, (rows, length, heads, features)."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    rows, heads, length, _ = query.shape
    known = (
        query.is_cpu
        and key.shape[0] == rows
        and key.shape[:3] == value.shape[:3]
        and key.shape[2] == length > 1
        and heads % key.shape[1] == 0
        and dropout == 0
        and not isinstance(scaling, torch.Tensor)
        and all(others.get(name) is None or others[name] is False for name in _OTHERWISE)
        and (attention_mask is not None or causal is True)
    )
    found = samples(attention_mask, rows, length) if known else None
    if found is None:
        settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
        return plain(module, query, key, value, attention_mask, **settings)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _tiled(query, key, value, scale, *found).transpose(1, 2).contiguous(), None


def _tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    blocks: list[Block],
    tiles: list[Tile],
) -> torch.Tensor:
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    # Heads that share keys and values are queries of one product.
    grouped = query.reshape(rows * groups, heads // groups, length, -1)
    keys, values = (one.reshape(rows * groups, length, -1) for one in (key, value))
    # Rows of these are those of the batch, each as often as it has groups.
    own = [
        Block(slice(one.rows.start * groups, one.rows.stop * groups), one.start, one.end)
        for one in blocks
    ]
    return _Tiled.apply(grouped, keys, values, scale, own, tiles).reshape(rows, heads, length, -1)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Any:
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=shared
    )


@cache
def _has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX), which PyTorch's own kernel for
    attention makes use of; without, that kernel multiplies in float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


class _Tiled(torch.autograd.Function):
    """Scores S = scale Q K^T and shares P = softmax(S) a tile at a time, and again backward.

    O = P V; dV = P^T dO, dS = P * (dP - rowsum(dP * P)) with dP = dO V^T, dQ = scale dS K,
    dK = scale dS^T Q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        blocks: list[Block],
        tiles: list[Tile],
    ) -> torch.Tensor:
        """Take queries (n, g, length, d) and keys and values (n, length, d), row after row."""
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.tiles = scale, tiles
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        alike = query.shape[-1] == value.shape[-1]  # else PyTorch's kernel is another, slower one
        if alike and query.dtype == torch.bfloat16 and _has_tiles():
            for block in blocks:
                keys, values = block.of(key[:, None]), block.of(value[:, None])
                block.of(output).copy_(_flash(block.of(query), keys, values, scale))
            return output
        for tile in tiles:
            at = tile.queries
            shares = _shares(query[:, :, at], key[:, tile.keys], scale, tile.unseen)
            found = torch.bmm(shares, value[:, tile.keys])
            output[:, :, at] = found.unflatten(1, (query.shape[1], -1))
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        query, key, value = ctx.saved_tensors
        scale, of_output = ctx.scale, upstream[0]
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for tile in ctx.tiles:
            at, keys, values = tile.queries, key[:, tile.keys], value[:, tile.keys]
            queries, rises = query[:, :, at].flatten(1, 2), of_output[:, :, at].flatten(1, 2)
            shares = _shares(query[:, :, at], keys, scale, tile.unseen)
            of_shares = torch.bmm(rises, values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_query[:, :, at] = _times(of_scores, keys, scale).unflatten(1, (query.shape[1], -1))
            of_key[:, tile.keys] += _times(of_scores.transpose(1, 2), queries, scale)
            of_value[:, tile.keys] += torch.bmm(shares.transpose(1, 2), rises)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _shares(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, unseen: torch.Tensor | None
) -> torch.Tensor:
    """Return how much of each value a query takes, (n, g * queries, keys), of the last places."""
    count = queries.shape[2]
    scores = _times(queries.flatten(1, 2), keys.transpose(1, 2), scale)
    if unseen is None:
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(later, -torch.inf)
    else:
        rows = scores.view(len(unseen), -1, count, keys.shape[1])
        rows.masked_fill_(unseen[:, None], -torch.inf)
    return torch.softmax(scores, -1)


def _times(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Multiply (n, rows, k) by (n, k, columns) and a number, in one pass."""
    ignored = left.new_empty(()).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(ignored, left, right, beta=0, alpha=scale)
