"""Hand-written language models, one small body for each pattern of code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, SIZE, VOCABULARY = 12, 3, 4, 20


class Net(nn.Module):
    """Embedding, residual bodies, output: what a body does is what a test is about."""

    def __init__(self, *bodies: nn.Module, hidden: int = HIDDEN, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.bodies = nn.ModuleList(bodies)
        self.out = nn.Linear(hidden, VOCABULARY, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in self.bodies:
            x = x + body(x)
        return self.out(x)


class Body(nn.Module):
    """Two linear layers with a function of tensors between them."""

    def __init__(
        self,
        between: Callable[[torch.Tensor], torch.Tensor],
        width: int = 8,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, width)
        self.down = nn.Linear(width if inner is None else inner, HIDDEN)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden: int = HIDDEN, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width)
        self.up = nn.Linear(hidden, width)
        self.down = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Concat(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(HIDDEN, 5)
        self.b = nn.Linear(HIDDEN, 7)
        self.down = nn.Linear(12, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.cat([self.a(x), self.b(x)], dim=-1))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    """Attention of (batch, heads, sequence, size) with a fixed scale, without a mask."""
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1) @ v


class Attention(nn.Module):
    """Attention in one of several layouts of its projections.

    Args:
        layout: ``separate``, ``fused`` (q, k and v one after the other), ``per_head`` (one after
            the other inside each head), ``literal`` (sizes written in the code), ``scaled`` (the
            scale is computed from the size in the forward pass).
        kv_heads: fewer than ``HEADS`` share keys and values; only for ``separate``.
    """

    def __init__(self, layout: str = "separate", heads: int = HEADS, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.layout, self.heads, self.kv_heads, self.size = layout, heads, kv_heads, SIZE
        self.repeats = heads // kv_heads
        width = heads * SIZE
        if layout in ("fused", "per_head"):
            self.qkv = nn.Linear(HIDDEN, 3 * width)
        else:
            self.q = nn.Linear(HIDDEN, width)
            self.k = nn.Linear(HIDDEN, kv_heads * SIZE)
            self.v = nn.Linear(HIDDEN, kv_heads * SIZE)
        self.o = nn.Linear(width, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, sequence = x.shape[:2]
        scale = 0.5
        if self.layout == "fused":
            parts = self.qkv(x).split(self.heads * self.size, dim=-1)
            q, k, v = (p.view(batch, sequence, self.heads, self.size) for p in parts)
        elif self.layout == "per_head":
            fused = self.qkv(x).view(batch, sequence, self.heads, 3 * self.size)
            q, k, v = fused.chunk(3, dim=-1)
        elif self.layout == "literal":
            q, k, v = (p(x).view(batch, sequence, 3, 4) for p in (self.q, self.k, self.v))
        else:
            q = self.q(x).view(batch, sequence, self.heads, self.size)
            k, v = (p(x).view(batch, sequence, self.kv_heads, self.size) for p in (self.k, self.v))
        if self.layout == "scaled":
            scale = 1 / math.sqrt(self.size)
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        if self.repeats > 1:
            k, v = (self.shared(p) for p in (k, v))
        out = attend(q, k, v, scale).transpose(1, 2)
        return self.o(out.reshape(batch, sequence, -1))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, sequence, size = x.shape
        x = x[:, :, None].expand(batch, heads, self.repeats, sequence, size)
        return x.reshape(batch, heads * self.repeats, sequence, size)


# A model in the style of nanoGPT: a plain module with a settings object and nothing of a library.


@dataclass
class Settings:
    vocab_size: int = 40
    block_size: int = 32
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 32
    head_size: int = 8


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Settings, *, literal: bool) -> None:
        super().__init__()
        self.literal = literal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd, self.head_size = config.n_head, config.n_embd, config.head_size
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        if self.literal:
            # As in nanoGPT: one number for the residual stream and for all heads together.
            q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
            q, k, v = (
                p.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for p in (q, k, v)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:, :, :T, :T])
            return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (p.view(B, T, self.n_head, self.head_size).transpose(1, 2) for p in (q, k, v))
        scores = (q @ k.transpose(-2, -1)).masked_fill(~self.mask[:, :, :T, :T], -1e9)
        y = torch.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, config: Settings, *, literal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, literal=literal)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, *, literal: bool = False) -> None:
        super().__init__()
        config = Settings()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(NanoBlock(config, literal=literal) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))
