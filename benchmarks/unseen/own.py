"""Small modules that put patterns together on which pruning has failed before."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unseen.spec import VOCABULARY, add

DIM, HEADS, WIDTH, DEPTH = 32, 4, 48, 4


class Attention(nn.Module):
    """Causal attention with as many key-value heads as told; a mask may stand in for the causal."""

    def __init__(self, heads: int = HEADS, groups: int = HEADS, size: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q = nn.Linear(DIM, heads * size)
        self.k = nn.Linear(DIM, groups * size)
        self.v = nn.Linear(DIM, groups * size)
        self.o = nn.Linear(heads * size, DIM)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.groups, self.size).transpose(1, 2)
        v = self.v(x).view(b, t, self.groups, self.size).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.groups, dim=1)
        v = v.repeat_interleave(self.heads // self.groups, dim=1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3
        )
        return self.scaled(self.o(y.transpose(1, 2).reshape(b, t, -1)))

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, width), nn.Linear(width, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.a(x)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module | None = None, ffn: nn.Module | None = None) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = attention or Attention()
        self.ffn = ffn or FeedForward()

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        x = x + self.attention(self.n1(x), *args)
        return x + self.ffn(self.n2(x))


class Net(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, block: Any = Block, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# --------------------------------------------------------------------- six of a few lines each


class WindowByPlace(Net):
    """Every second layer sees 16 tokens; which one, the loop says."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        i = torch.arange(ids.shape[1])
        full = i[:, None] >= i
        window = full & (i[:, None] - i < 16)
        for number, layer in enumerate(self.layers):
            x = layer(x, window if number % 2 else full)
        return self.head(self.norm(x))


class GrowingAlibi(Attention):
    """A table of ALiBi for 32 tokens, made anew for longer input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alibi", self.table(32))

    def table(self, t: int) -> torch.Tensor:
        slopes = torch.tensor([2 ** (-8 * (h + 1) / self.heads) for h in range(self.heads)])
        i = torch.arange(t)
        return -slopes[:, None, None] * (i[:, None] - i).abs()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        del mask
        t = x.shape[1]
        if t > self.alibi.shape[-1]:
            self.alibi = self.table(t).to(x.dtype)
        causal = torch.full((t, t), -1e9).triu(1)
        return super().forward(x, (self.alibi[:, :t, :t] + causal).to(x.dtype))


class FloatOnTheLeft(Attention):
    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y * (1.0 / self.heads)


class Einops(Attention):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        from einops import rearrange

        del mask
        q, k, v = (
            rearrange(f(x), "b n (h d) -> b h n d", h=self.heads) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        return self.o(rearrange(y, "b h n d -> b n (h d)"))


class TransposedConvolution(FeedForward):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ConvTranspose1d(WIDTH, WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.c(F.gelu(self.a(x)).mT)[..., : x.shape[1]].mT))


class BareTable(nn.Module):
    """A bare parameter as the token embedding, outputs in a dict, None among the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(VOCABULARY, DIM))
        self.layers = nn.ModuleList([Block(), None, Block(), Block()])

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table[ids]
        for layer in self.layers:
            x = x if layer is None else layer(x)
        return {"logits": x @ self.table.T}


# ------------------------------------------------------------------------------- of their kin


class LogOfHeads(Attention):
    """Sizes as numbers in ways that are seldom: a logarithm, int(), a shift, min()."""

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y * math.log(1 + self.heads) + 0.1 * int(self.heads) + min(self.heads, 6) / 8


class TableOfWidths(FeedForward):
    """A list is indexed by a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = [1 / (1 + n) for n in range(200)][self.a.out_features]
        return self.b(F.gelu(self.a(x))) * scale


class BranchOnWidth(FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h = F.gelu(h) if h.shape[-1] > 40 else F.relu(h)
        return self.b(h)


class NumelScale(FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.a(x))) * (100.0 / self.a.weight.numel())


class EmbeddingScale(Net):
    """As in Gemma, with the scale read from the table."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * self.embedding.embedding_dim**0.5
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ScaleByPlace(Net):
    """A learned number for each layer, kept outside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DEPTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer, gain in zip(self.layers, self.gain, strict=False):
            x = layer(x * gain)
        return self.head(self.norm(x))


class SharedKeys(nn.Module):
    """Every second layer takes keys and values of the one before, in a nested tuple."""

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.own = number % 2 == 0
            self.norm = nn.LayerNorm(DIM)
            self.q, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
            if self.own:
                self.kv = nn.Linear(DIM, 2 * DIM)
            self.ffn = FeedForward()

        def forward(self, x: torch.Tensor, shared: Any) -> Any:
            b, t, _ = x.shape
            y = self.norm(x)
            if self.own:
                k, v = self.kv(y).view(b, t, 2 * HEADS, 8).transpose(1, 2).chunk(2, dim=1)
                shared = ((k, v),)
            ((k, v),) = shared
            q = self.q(y).view(b, t, HEADS, 8).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
            return x + self.ffn(x), shared

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(self.Layer(n) for n in range(DEPTH))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, shared = self.embedding(ids), None
        for layer in self.layers:
            x, shared = layer(x, shared)
        return self.head(x)


class DepthwiseGroups(FeedForward):
    """A convolution in as many groups as channels, then one in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.d = nn.Conv1d(WIDTH, WIDTH, 1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.pad(self.a(x).mT, (2, 0))
        return self.b(F.gelu(self.d(self.c(h))).mT)


class GatedUnit(FeedForward):
    """F.glu over a fused pair."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.glu(self.a(x), dim=-1))


class Normed(nn.Module):
    """PyTorch's own attention and weight normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, WIDTH))
        self.b = nn.Linear(WIDTH, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        y = self.n1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.b(F.silu(self.a(self.n2(x))))


class Mixture(nn.Module):
    """Six experts in one tensor, two for each token, weights from a softmax over all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 6, bias=False)
        self.up = nn.Parameter(torch.zeros(6, DIM, WIDTH))
        self.down = nn.Parameter(torch.zeros(6, WIDTH, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        top, chosen = shares.topk(2, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        out = torch.einsum("btd,edf->btef", x, self.up)
        out = torch.einsum("btef,efd->bted", F.silu(out), self.down)
        picked = out.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * top[..., None]).sum(2)


class LoopedMixture(nn.Module):
    """Experts as modules in a loop; what no token chose is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.ModuleList(FeedForward() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = self.router(flat).sigmoid().topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                out[rows] += expert(flat[rows]) * shares[rows, places, None]
        return out.view_as(x)


class HandNorm(nn.Module):
    """A norm written by hand behind grouped attention and the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DIM))
        self.inner = Attention(groups=2)
        self.ffn = FeedForward()

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (1 + self.gain) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm(self.inner(x))
        return x + self.norm(self.ffn(x))


class UnevenLayers(Net):
    """Layers of different widths and numbers of heads, post-norm, tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(Attention(h, g), FeedForward(w))
            for h, g, w in ((4, 4, 48), (6, 2, 32), (2, 1, 64))
        )
        self.head.weight = self.embedding.weight


class LinearAttention(Attention):
    """Keys by softmax over tokens, queries by elu + 1, a running sum; no scores are formed."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        del mask
        b, t, _ = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = F.elu(q) + 1, k.exp()
        state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
        y = torch.einsum("bhtd,bhtde->bhte", q, state)
        y = y / torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2))[..., None]
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class SkipAcross(Net):
    """The first layer's output goes to the last layer as an argument."""

    class Layer(Block):
        def forward(self, x: torch.Tensor, early: Any = None) -> torch.Tensor:
            x = super().forward(x)
            return x if early is None else x + 0.5 * early

    def __init__(self) -> None:
        super().__init__(self.Layer)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, early = self.embedding(ids), None
        for number, layer in enumerate(self.layers):
            x = layer(x, early if number == DEPTH - 1 else None)
            early = x if early is None else early
        return self.head(self.norm(x))


class LongPath(FeedForward):
    """Another way for input of more than 64 tokens: in pieces, scaled by the width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= 64:
            return super().forward(x)
        h = torch.cat([F.gelu(self.a(part)) for part in x.split(64, dim=1)], dim=1)
        return self.b(h * (WIDTH / h.shape[-1]))


def attention(kind: type[Attention]) -> Any:
    return lambda: Net(lambda: Block(kind()))


def ffn(kind: type[nn.Module]) -> Any:
    return lambda: Net(lambda: Block(None, kind()))


add("window by place in the loop", "own", lambda: WindowByPlace())
add("ALiBi rebuilt beyond its length", "own", attention(GrowingAlibi))
add("float on the left of a size", "own", attention(FloatOnTheLeft))
add("einops rearrange", "own", attention(Einops))
add("transposed convolution in the FFN", "own", ffn(TransposedConvolution))
add("bare embedding, dict, None layer", "own", lambda: BareTable())
add("log, int and min of a size", "own", attention(LogOfHeads))
add("list indexed by a size", "own", ffn(TableOfWidths))
add("branch on a size", "own", ffn(BranchOnWidth))
add("numel as a scale", "own", ffn(NumelScale))
add("embedding_dim as a scale", "own", lambda: EmbeddingScale())
add("learned gain by place", "own", lambda: ScaleByPlace())
add("keys of the layer before, nested", "own", lambda: SharedKeys())
add("depthwise and grouped convolutions", "own", ffn(DepthwiseGroups))
add("F.glu", "own", ffn(GatedUnit))
add("MultiheadAttention and weight_norm", "own", lambda: Net(Normed))
add("experts in one tensor", "own", ffn(Mixture))
add("experts in a loop", "own", ffn(LoopedMixture))
add("norm by hand, GQA, post-norm", "own", lambda: Net(HandNorm))
add("uneven layers, tied", "own", lambda: UnevenLayers())
add("linear attention by running sums", "own", attention(LinearAttention))
add("skip from first layer to last", "own", lambda: SkipAcross())
add("another path for long input", "own", ffn(LongPath))
