"""Patterns of models' code: what is found in each, and that a cut computes what its twin does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm_pruner.discovery import run as tracing
from llm_pruner.discovery.groups import discover
from llm_pruner.discovery.run import vocabulary_size
from llm_pruner.errors import DiscoveryError, InfeasibleError
from llm_pruner.models.forward import logits_of
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters, removed_positions
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.surgery.verify import prune_ as verified_prune_
from llm_pruner.tracing.scenes import staged
from llm_pruner.types import Discovery, Group, Removal
from nets import HEADS, HIDDEN, SIZE, VOCABULARY, Attention, Body, Gated, Net, attend
from removals import bound_to, pick

ATTENTION = {"hidden", "heads", "head_dim", "value_dim"}


def removals(discovery: Discovery) -> Iterator[Removal]:
    """Yield one removal for each group with what is bound to it, and one of all groups."""
    for group in discovery.groups:
        if group.frozen is None:
            picked = pick(discovery, (group.kind,), seed=1)
            removal = {name: picked[name] for name in bound_to(discovery, group) if name in picked}
            if removal:
                yield removal
    yield pick(discovery)


def zeroed(model: nn.Module, discovery: Discovery, removal: Removal) -> nn.Module:
    """Return a dense copy with zeros at the removed positions of every parameter."""
    dense = copy.deepcopy(model)
    parameters = dict(dense.named_parameters())
    for (name, dim), gone in removed_positions(discovery, removal).items():
        if name in parameters:
            parameters[name].data.index_fill_(dim, torch.from_numpy(gone), 0.0)
    return dense


def checked(model: nn.Module, *, dense: bool = True) -> Discovery:
    """Discover in float64, and compare what is left of each removal with the masked twin.

    Args:
        dense: compare with a zeroed dense copy as well, which knows nothing of the trace; only
            where no norm or softmax sees the removed positions.
    """
    model = model.double().eval()
    discovery = discover(model)
    for removal in removals(discovery):
        assert removal
        smaller = copy.deepcopy(model)
        cut_(smaller, discovery, removal)
        for length in (3, 30):
            generator = torch.Generator().manual_seed(length)
            tokens = torch.randint(VOCABULARY, (2, length), generator=generator)
            expected = twin_logits(model, discovery, removal, tokens)
            actual = pruned_logits(smaller, discovery, tokens)
            assert largest_difference(expected, actual) <= 1e-9, (list(removal), length)
            if dense and not any(discovery.group(name).modules for name in removal):
                with staged(model):
                    plain = [logits_of(zeroed(model, discovery, removal)(tokens))]
                assert largest_difference(plain, actual) <= 1e-9, (list(removal), length)
    original = pruned_logits(model, discovery, tokens)
    assert largest_difference(original, actual) > 1e-6
    return discovery


def of_kind(discovery: Discovery, kind: str) -> list[Group]:
    return [group for group in discovery.groups if group.kind == kind]


def free(discovery: Discovery) -> set[str]:
    return {group.kind for group in discovery.groups if group.frozen is None}


def why(discovery: Discovery, tensor: str, dim: int) -> str:
    """Return why a part of an axis is frozen."""
    trace = discovery.graph.trace
    return str(trace.atoms.reason(trace.tensors[f"bodies.0.{tensor}"][dim]))


@dataclass
class Case:
    """One pattern of code and what discovery finds in it.

    Attributes:
        make: makes the model.
        has: kinds of which a group is prunable.
        only: exactly these kinds are prunable.
        sizes: kind -> sizes of its groups.
        frozen: (tensor of the first body, axis, part of the reason).
        index: (kind, tensor, axis, positions of each unit) of the first group of that kind.
        dense: also compare with a zeroed dense model (see ``checked``).
    """

    make: Callable[[], nn.Module]
    has: set[str] = field(default_factory=set)
    only: set[str] | None = None
    sizes: dict[str, list[int]] = field(default_factory=dict)
    frozen: tuple[str, int, str] | None = None
    index: tuple[str, str, int, list[list[int]]] | None = None
    dense: bool = True


CASES: dict[str, Case] = {}


def case(name: str, make: Callable[[], nn.Module], **expected: Any) -> None:
    CASES[name] = Case(make, **expected)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_pattern(name: str) -> None:
    case = CASES[name]
    discovery = checked(case.make(), dense=case.dense)
    assert free(discovery) >= case.has
    assert case.only is None or free(discovery) == case.only
    for kind, sizes in case.sizes.items():
        assert [group.size for group in of_kind(discovery, kind)] == sizes
    if case.frozen is not None:
        tensor, dim, reason = case.frozen
        assert reason in why(discovery, tensor, dim)
    if case.index is not None:
        kind, tensor, dim, positions = case.index
        members = of_kind(discovery, kind)[0].members
        (found,) = [m for m in members if m.tensor.endswith(tensor) and m.dim == dim]
        assert found.index.tolist() == positions


# --------------------------------------------------------------------------------- elementwise


def halves(y: torch.Tensor) -> torch.Tensor:
    left, right = y.chunk(2, -1)
    return left[..., :3] * right


def even(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[-1] % 2 == 0, "gate and value"
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def in_two(x: torch.Tensor) -> torch.Tensor:
    gate, value = rearrange(x, "b t (two n) -> two b t n", two=2)
    return F.silu(gate) * value


def repeated(y: torch.Tensor) -> torch.Tensor:
    counts = torch.repeat_interleave(torch.tensor([1, 0, 2]))
    return torch.repeat_interleave(input=y, repeats=2, dim=-1) * counts.sum()


class Inferring(Net):
    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


class Masked(Body):
    """A mask over several axes."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.w = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("mask", torch.arange(32).view(4, 8) % 3 == 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).relu()
        return self.down(y / (self.w[self.mask].square().mean() + 1) + self.w.mean(0))


class Inserted(Body):
    """Axes are inserted and removed in place."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.gate = nn.Linear(8, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).relu()
        gate = self.gate(y).sigmoid()
        y.unsqueeze_(2).mul_(2.0).squeeze_(2)
        return self.down(y) * gate


class Strided(Body):
    """A slice whose step is a size."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.few, self.out = nn.Linear(HIDDEN, 2), nn.Linear(4, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few, y = self.few(x), self.up(x).relu()
        return self.down(y) + self.out(y[..., :: few.shape[-1]]) * few.sum(-1, keepdim=True)


class Remembered(nn.Module):
    """A parameter that is broadcast to an activation by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(16, HIDDEN)
        self.memory = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(x))
        memory, y = torch.broadcast_tensors(self.memory, y)
        return self.down(torch.cat([memory, y], -1))


def body(between: Callable[[torch.Tensor], torch.Tensor], *sizes: int) -> Callable[[], nn.Module]:
    return lambda: Net(Body(between, *sizes))


EIGHT = [[i] for i in range(8)]
case(
    "two statistics at once",
    body(lambda y: F.gelu(y) - torch.std_mean(y, 1, keepdim=True)[1]),
    sizes={"ffn": [8]},
)
case("an uneven chunk", body(halves, 7, 3), has={"hidden"})
case(
    "complex numbers of two real ones",
    body(lambda y: (torch.complex(y, y.sin()) * torch.polar(y.exp(), y)).real),
    has={"hidden"},
)
case("inference mode", lambda: Inferring(Gated()), has={"ffn"})
case(
    "gated linear units",
    lambda: Net(Body(F.glu, width=16, inner=8), Body(nn.GLU(), 12, 6)),
    sizes={"ffn": [8, 6]},
    index=("ffn", "up.weight", 0, [[i, i + 8] for i in range(8)]),
)
case(
    "an even size", body(even, 16, 8), index=("ffn", "up.weight", 0, [[i, i + 8] for i in range(8)])
)
case("einops", body(in_two, 16, 8), index=("ffn", "up.weight", 0, [[i, i + 8] for i in range(8)]))
case("repeat_interleave", body(repeated, 8, 16), only={"hidden", "other"}, dense=False)
case("a mask over several axes", lambda: Net(Masked()), dense=False)
case("axes inserted in place", lambda: Net(Inserted()), index=("ffn", "gate.weight", 1, EIGHT))
case("a size as a step", lambda: Net(Strided()), frozen=("few.weight", 0, "as a number"))
case("broadcast_tensors", lambda: Net(Remembered()), index=("ffn", "memory", 0, EIGHT))
for number, between in enumerate(
    (
        lambda y: y * (y[..., 1:].square().sum(-1, keepdim=True) + 1).rsqrt(),
        lambda y: y * (y[..., :-1].square().sum(-1, keepdim=True) + 1).rsqrt(),
        lambda y: y * y[..., -2, None],
        lambda y: y * torch.select(y, -1, -2)[..., None],
        lambda y: y * torch.trapezoid(y).unsqueeze(-1),
        lambda y: F.pad(y[..., : np.int64(4)], (0, 4)) + y,
        lambda y: F.pad(y[..., : torch.tensor(4)], (0, 4)) + y,
        lambda y: y * torch.cov(y.flatten(0, 1).T[:4]).diagonal().mean(),
    )
):
    case(f"positions that code names {number}", body(between), dense=False)


# --------------------------------------------------------------------------------- convolutions


class Mixer(nn.Module):
    """up, a convolution along the sequence, down."""

    def __init__(self, conv: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.conv = nn.Linear(HIDDEN, 8), nn.Linear(out, HIDDEN), conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.gelu(self.up(x)).transpose(1, 2))
        return self.down(F.gelu(y[..., : x.shape[1]].transpose(1, 2)))


case(
    "a transposed convolution",
    lambda: Net(Mixer(nn.ConvTranspose1d(8, 6, 3), 6)),
    sizes={"ffn": [8, 6]},
    index=("ffn", "conv.weight", 0, EIGHT),
)


@pytest.mark.parametrize(
    ("make", "out", "sizes"),
    [
        (lambda: nn.Conv1d(8, 6, 3, padding="same"), 6, {8, 6}),
        (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"), 6, {8, 6}),
        (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="replicate"), 6, {8, 6}),
        (lambda: nn.Conv1d(8, 8, 3, padding=2, groups=8), 8, {8}),
        (lambda: nn.Conv1d(8, 16, 3, padding=2, groups=8), 16, {8, 2}),
        (lambda: nn.Conv1d(8, 6, 3, padding=2, groups=2), 6, {2, 4, 3}),
        (lambda: nn.ConvTranspose1d(8, 16, 3, groups=8), 16, {8, 2}),
        (lambda: nn.ConvTranspose1d(8, 6, 3, groups=2), 6, {2, 4, 3}),
    ],
)
def test_groups_of_a_convolution(make: Callable[[], Any], out: int, sizes: set[int]) -> None:
    net = Net(Mixer(make(), out))
    discovery = checked(net)
    inner = [group for group in discovery.groups if group.kind != "hidden"]
    assert {group.size for group in inner} == sizes
    assert all(group.frozen is None for group in inner)
    cut_(net, discovery, pick(discovery))
    conv = net.bodies[0].conv
    first, second = conv.weight.shape[0], conv.weight.shape[1] * conv.groups
    transposed = isinstance(conv, nn.ConvTranspose1d)
    assert {conv.in_channels, conv.out_channels} == {first, second}
    assert conv.in_channels == (first if transposed else second)


# ------------------------------------------------------------------------------ computed weights


class Wrapped(Body):
    """A feed-forward network whose weights are computed by a wrapper."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(F.gelu)
        self.up, self.down = wrap(self.up), wrap(self.down)


def normed_in_a_hook() -> nn.Module:
    net = Net(Wrapped(nn.utils.weight_norm))
    with torch.no_grad():
        net(torch.zeros(1, 2, dtype=torch.long))  # so that it can be copied
    return net


case("weight norm", lambda: Net(Wrapped(weight_norm)), has={"ffn", "hidden"}, dense=False)
case("weight norm in a hook", normed_in_a_hook, has={"ffn", "hidden"}, dense=False)


def test_spectral_norm() -> None:
    discovery = discover(Net(Wrapped(spectral_norm)))
    assert free(discovery) == set()
    assert any("no rule for the operation" in axis.reason for axis in discovery.frozen)


@pytest.mark.slow
def test_adapters_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["gate", "up", "down"], use_dora=True)
    net = get_peft_model(Net(Gated(), Gated()), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert {"ffn", "hidden"} <= free(checked(net, dense=False))


# -------------------------------------------------------------------------- tokens and outputs


class Tabled(Net):
    """Token ids are looked up in one of several ways, and added to positions."""

    def __init__(self, way: str) -> None:
        super().__init__(Gated())
        head = {"types": nn.Embedding(2, HIDDEN), "places": nn.Embedding(64, HIDDEN)}
        parts = dict(self.named_children())
        for name in parts:
            delattr(self, name)
        for name, module in {**head, **parts}.items():
            setattr(self, name, module)
        self.way = way
        if way != "embedding":
            self.table = nn.Parameter(self.embed.weight.detach().clone())
            del self.embed
        self.second = nn.Embedding(VOCABULARY + 3, HIDDEN)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.way == "embedding":
            x = self.embed(tokens)
        elif self.way == "index":
            x = self.table[tokens]
        else:
            x = self.table.gather(0, tokens.reshape(-1, 1).expand(-1, self.table.shape[1]))
            x = x.view(*tokens.shape, -1)
        x = x + self.second(tokens + 3) + self.types(torch.zeros_like(tokens))
        x = x + self.places(torch.arange(tokens.shape[1])[None])
        for body in self.bodies:
            x = x + body(x)
        return self.out(x)


@pytest.mark.parametrize("way", ["embedding", "index", "gather"])
def test_tables_that_tokens_index(way: str) -> None:
    net = Tabled(way)
    assert vocabulary_size(net) == VOCABULARY
    discovery = checked(net)
    (hidden,) = of_kind(discovery, "hidden")
    assert hidden.size == HIDDEN
    table = "embed.weight" if way == "embedding" else "table"
    (frozen,) = [axis for axis in discovery.frozen if (axis.tensor, axis.dim) == (table, 0)]
    assert frozen.reason == "the vocabulary"


class Tagged(Net):
    """Returns classes beside the logits, and goes on with them."""

    def __init__(self) -> None:
        super().__init__(Gated())
        self.tag, self.back = nn.Linear(HIDDEN, 7), nn.Linear(7, HIDDEN)

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        classes = self.tag(x)
        x = x + self.back(classes.softmax(-1)) + self.bodies[0](x)
        return {"logits": self.out(x), "tags": classes, "tag": classes.argmax(-1)}


def test_classes_that_are_returned_are_frozen() -> None:
    discovery = discover(Tagged().eval())
    trace = discovery.graph.trace
    assert "returned" in str(trace.atoms.reason(trace.tensors["tag.weight"][0]))
    assert "ffn" in free(discovery)


# ------------------------------------------------------------------------------------- attention


class NormedTogether(Attention):
    """Values are normed over heads and channels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((HEADS, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.heads, self.size)
        q, k, v = (p(x).view(shape) for p in (self.q, self.k, self.v))
        q, k, v = (p.transpose(1, 2) for p in (q, k, self.norm(v)))
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class NumpySized(Attention):
    """The number of heads is one of numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.kv_heads = np.int64(HEADS)


class CachedGroups(nn.Module):
    """Keys and values go through a buffer, and are copied for each of their queries."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups = 4, 2
        self.q, self.o = nn.Linear(HIDDEN, 4 * SIZE), nn.Linear(4 * SIZE, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, 2 * SIZE), nn.Linear(HIDDEN, 2 * SIZE)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 300, 2, SIZE), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length = x.shape[:2]
        q = self.q(x).view(count, length, self.heads, SIZE).transpose(1, 2)
        copied = []
        for cache, layer in ((self.keys, self.k), (self.values, self.v)):
            cache[:count, :length] = layer(x).view(count, length, self.groups, SIZE)
            held = cache[:count, :length, :, None]
            held = held.expand(count, length, self.groups, self.heads // self.groups, SIZE)
            copied.append(held.reshape(count, length, self.heads, SIZE).transpose(1, 2))
        y = F.scaled_dot_product_attention(q, *copied, is_causal=True, scale=0.4)
        return self.o(y.transpose(1, 2).reshape(count, length, -1))


class MappedHeads(nn.Module):
    """Each head by itself, its weights along an axis that ``vmap`` maps over."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(HEADS, HIDDEN, SIZE)) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(x @ q, x @ k, x @ v)

        return self.o(torch.vmap(head, out_dims=2)(self.q, self.k, self.v).flatten(2))


class GroupNormed(nn.Module):
    """A norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.GroupNorm(HEADS, HEADS * SIZE)
        self.attention.o = nn.Identity()
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.attention(x).flatten(0, 1))
        return self.o(y.unflatten(0, x.shape[:2]))


class Wide(nn.Module):
    """Heads that are too wide for grouped queries to be left to a kernel of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.num_key_value_groups = 4, 2, 2
        self.q, self.o = nn.Linear(HIDDEN, 4 * 260), nn.Linear(4 * 260, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, 2 * 260), nn.Linear(HIDDEN, 2 * 260)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p, heads in layers)
        return self.o(sdpa_attention_forward(self, q, k, v, None, scaling=0.02)[0].flatten(2))


class Delta(Attention):
    """Attention by the delta rule: values are corrected by solving a system of equations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.q, self.k, self.v)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in layers)
        system = k @ k.mT * 0.1
        v = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        return self.o(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))


class Tiled(Attention):
    """Copies of keys and values as the outer axis, as einops' ``b (r kv) n d``."""

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, sequence, size = x.shape
        x = x[:, None].expand(batch, self.repeats, heads, sequence, size)
        return x.reshape(batch, self.repeats * heads, sequence, size)


class StateSpace(nn.Module):
    """Heads in groups that share their states, and a norm over each group (Mamba-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.group_size = 4, 2, 6
        self.up, self.states = nn.Linear(HIDDEN, 12), nn.Linear(HIDDEN, 10)
        self.down = nn.Linear(12, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).unflatten(-1, (self.heads, -1))
        states = self.states(x).unflatten(-1, (self.groups, -1)).square().sum(-1, keepdim=True)
        y = (y * states.repeat_interleave(self.heads // self.groups, dim=2)).flatten(2)
        groups = y.view(*y.shape[:2], y.shape[-1] // self.group_size, self.group_size)
        groups = groups * (groups.square().mean(-1, keepdim=True) + 0.1).rsqrt()
        return self.down(groups.flatten(2))


class Multihead(nn.Module):
    """Attention by ``nn.MultiheadAttention``, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.ffn = nn.MultiheadAttention(HIDDEN, 3, batch_first=True), Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.ffn(x + self.inner(x, x, x, attn_mask=mask, need_weights=False)[0])


class Transformer(Net):
    """The decoder of PyTorch over what another layer gave."""

    def __init__(self) -> None:
        super().__init__()
        options = {"batch_first": True, "norm_first": True, "dropout": 0.1}
        layers = (nn.TransformerDecoderLayer(HIDDEN, 3, 20, **options) for _ in range(2))
        self.bodies = nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = memory = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        for body in self.bodies:
            x = body(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_mask=mask)
        return self.out(x)


case("a norm over several axes", lambda: Net(NormedTogether()), only=ATTENTION, dense=False)
case("heads counted by numpy", lambda: Net(NumpySized()), frozen=("q.weight", 0, "written in the"))
case("copies of a cache", lambda: Net(CachedGroups()), has={"heads", "query_heads"}, dense=False)
case("vmap", lambda: Net(MappedHeads(), Gated()), has={"ffn"}, frozen=("q", 0, "torch.vmap"))
case("a norm of each head", lambda: Net(GroupNormed()), sizes={"heads": [HEADS]}, dense=False)
wide = ATTENTION | {"query_heads"}
case("a size that only picks a kernel", lambda: Net(Wide()), only=wide, dense=False)
case("a system of equations", lambda: Net(Delta()), only=ATTENTION)
tiled = lambda: Net(Tiled(heads=6, kv_heads=2))  # noqa: E731
case("copies as the outer axis", tiled, has={"heads", "head_dim"}, dense=False)
case(
    "attention of PyTorch",
    lambda: Net(Multihead()),
    only={"ffn"},
    frozen=("ffn.gate.weight", 1, "inside multi_head_attention_forward"),
    dense=False,
)
case("layers of PyTorch", Transformer, sizes={"ffn": [20, 20]}, dense=False)


def test_a_norm_over_the_heads_of_a_group() -> None:
    discovery = checked(Net(StateSpace()), dense=False)
    taken = {
        str(one.index.tolist())
        for group in discovery.groups
        for one in group.members
        if not group.frozen and one.tensor.endswith("up.weight") and one.dim == 0
    }
    # Whole groups, and the same channel of every head; single heads stay.
    whole = [[*range(6)], [*range(6, 12)]]
    channels = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert taken == {str(whole), str(channels)}
    assert "divide it differently" in why(discovery, "up.weight", 0)


# --------------------------------------------------------------------- experts and chosen positions


class Mixture(nn.Module):
    """Experts whose weights lie in one tensor, by einsum."""

    def __init__(self, *, batched: bool, top: int | None, one_hot: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.up = nn.Parameter(torch.zeros(4, HIDDEN, 6))
        self.down = nn.Parameter(torch.zeros(4, 6, HIDDEN))
        self.batched, self.top, self.one_hot = batched, top, one_hot

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = self.router(x).softmax(-1)
        if self.top is not None:
            values, chosen = probs.topk(self.top, dim=-1)
            if self.one_hot:
                probs = probs * F.one_hot(chosen, probs.shape[-1]).sum(-2)
            else:
                probs = torch.zeros_like(probs).scatter(-1, chosen, values)
        y = F.gelu(torch.einsum("bth,ehf->btef", x, self.up))
        if self.batched:
            y = torch.einsum("btef,efh->bteh", y, self.down)
            return torch.einsum("bte,bteh->bth", probs, y)
        return torch.einsum("btef,efh->bth", y * probs[..., None], self.down)


class Chosen(nn.Module):
    """Experts by the index of the router, changed by ``choose``(probabilities)."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.router, self.choose = nn.Linear(HIDDEN, 5, bias=False), choose
        self.w = nn.Parameter(torch.zeros(5, HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsd,bskdh->bsh", x, self.w[self.choose(self.router(x))])


def twice(scores: torch.Tensor) -> torch.Tensor:
    probs = scores.softmax(-1)
    first = probs.topk(1).indices
    return torch.cat((first, probs.scatter(-1, first, 0.0).topk(1).indices), dim=-1)


def in_order(write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    def choose(scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.topk(2).indices
        return write(chosen, torch.tensor([1, 0]).expand_as(chosen))

    return lambda: Net(Chosen(choose))


class Taken(nn.Module):
    """Gives the numbers of experts to an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 5)
        self.up, self.scale = nn.Parameter(torch.randn(5, HIDDEN)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).topk(2)
        scaled = weights * torch.take(self.scale, chosen)
        return (scaled[..., None] * self.up[chosen]).sum(2) * x


class Scattered(nn.Module):
    """Channels that are written to places of twice as many."""

    def __init__(self, count: int = HIDDEN) -> None:
        super().__init__()
        places = torch.randperm(2 * HIDDEN, generator=torch.Generator().manual_seed(0))
        self.register_buffer("places", places[:HIDDEN])
        self.count = count
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.new_zeros(*x.shape[:2], 2 * HIDDEN)
        places = self.places[: self.count].expand(*x.shape[:2], -1)
        return self.down(wide.scatter(-1, places, x))


class Streams(Net):
    """Hyper-connections: several copies of the hidden state, mixed anew around every layer."""

    def __init__(self) -> None:
        super().__init__(Gated(), Gated())
        self.count = 3
        self.mix = nn.ModuleList(nn.Linear(HIDDEN, 3) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)[:, :, None].repeat(1, 1, self.count, 1)
        for body, mix in zip(self.bodies, self.mix, strict=True):
            alpha = torch.tanh(mix(x.mean(2)))
            inside = (alpha.softmax(-1)[..., None, :] @ x).squeeze(2)
            x = x + torch.sigmoid(alpha)[..., None] * body(inside)[:, :, None]
        return self.out(x.sum(2))


experts = {"experts": [4], "ffn": [6]}
case("all experts", lambda: Net(Mixture(batched=True, top=None)), sizes=experts, dense=False)
case("top experts", lambda: Net(Mixture(batched=False, top=2)), sizes=experts, dense=False)
one_hot = lambda: Net(Mixture(batched=True, top=2, one_hot=True))  # noqa: E731
case("one-hot experts", one_hot, sizes=experts, dense=False)
case("experts one by one", lambda: Net(Chosen(twice)), sizes={"experts": [5]}, dense=False)
for number, write in enumerate(
    (
        lambda chosen, order: torch.zeros_like(chosen).scatter(-1, order, chosen),
        lambda chosen, order: chosen.scatter_(-1, order[..., :1], 2),
    )
):
    written = ("router.weight", 0, "written")
    case(f"positions written as values {number}", in_order(write), frozen=written, dense=False)
no_rule = ("gate.weight", 0, "no rule for the operation take")
case("positions without a rule", lambda: Net(Taken()), frozen=no_rule, dense=False)
case("written by position", lambda: Net(Scattered()), has={"hidden"})
case("streams", Streams, sizes={"ffn": [8, 8]}, dense=False)


def test_experts_keep_as_many_as_are_chosen() -> None:
    (experts,) = of_kind(discover(Net(Chosen(twice))), "experts")
    assert (experts.least, experts.frozen) == (2, None)
    assert "hidden" not in free(discover(Net(Scattered(HIDDEN - 2))))


# -------------------------------------------------------------------------------- compiled code


def size_as_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * x.shape[-1]


def in_heads(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.view(x.shape[0], x.shape[1], 2, 4).flatten(2))


def compiled(make: Callable[[], Any]) -> Callable[[], nn.Module]:
    def net() -> nn.Module:
        function = make()
        return Net(Body(lambda x: function(x)))

    return net


example = torch.zeros(2, 8, 8)
unknown = ("up.weight", 0, "compiled code, which cannot be followed")
number_ = ("up.weight", 0, "its size is used as a number")
case("a scripted number", compiled(lambda: torch.jit.script(size_as_a_number)), frozen=number_)
two = ("up.weight", 0, "its size 2 is written in the code")
case("a scripted view", compiled(lambda: torch.jit.script(in_heads)), frozen=two)
case("a scripted function", compiled(lambda: torch.jit.script(F.silu)), has={"ffn"})
case("a traced function", compiled(lambda: torch.jit.trace(F.silu, example)), frozen=unknown)
case("a scripted module", compiled(lambda: torch.jit.script(nn.GELU())), frozen=unknown)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_a_model_with_modules_in_torchscript() -> None:
    with pytest.raises(DiscoveryError, match="TorchScript"):
        discover(Net(torch.jit.script(Gated()), Gated()))


def test_kernels_of_other_packages_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that no operation of PyTorch shows, as those of flash-linear-attention."""
    package: Any = ModuleType("kernels_of_others")
    package.doubled = lambda x: torch.from_numpy(2 * x.detach().numpy())
    monkeypatch.setitem(sys.modules, package.__name__, package)

    @use_kernel_func_from_hub_with_fallback("doubled", package.__name__)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert free(checked(Net(Body(doubled)))) == {"hidden", "other"}


# ------------------------------------------------------------------------ what a run leaves out


class Loop(nn.Module):
    """Experts that are modules; those that no token chose are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"e{i}": Gated() for i in range(6)})
        self.router = nn.Linear(HIDDEN, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = self.router(flat).softmax(-1).topk(1, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts.children()):
            rows, _ = torch.where(chosen.indices == number)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * chosen.values[rows])
        return out.view(x.shape)


def hardly_the_last() -> nn.Module:
    net = Net(Loop())
    with torch.no_grad():
        net.bodies[0].router.weight[-1] *= 0
        net.bodies[0].router.weight[-1, 0] = 2
    return net


sizes = {"ffn": [8] * 6}
case("an expert without a token", hardly_the_last, only={"hidden", "ffn"}, sizes=sizes)


class Forgotten(nn.Module):
    """A branch that runs in training alone, or never."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)
        self.aside = nn.Linear(*shape, bias=False)
        self.used = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(x))
        return self.aside(y) if self.used else self.down(y)


class Seeing(nn.Module):
    """A model of text in a part of its own, and what would write images into its hidden states."""

    def __init__(self, text: Net, size: int) -> None:
        super().__init__()
        self.text, self.projector = text, nn.Linear(5, size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(tokens)


class OfImages(nn.Module):
    """Experts of text, and as many of images, which tokens of text do not reach."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.text = Mixture(batched=True, top=2)
        self.images = nn.Parameter(torch.zeros(number, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)


class Gates(Attention):
    """A gate for each head, or a norm of each, that no run of text reaches."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate, self.images = nn.Parameter(torch.ones(size)), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gate.mean() if self.images else super().forward(x)


class Either(nn.Module):
    """An unread weight that could belong to either of two."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "unread"):
            setattr(self, name, nn.Parameter(torch.empty(HIDDEN, HIDDEN)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ self.first) @ self.second


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: Net(Forgotten((8, 5))), {"hidden"}),
        (lambda: Net(Forgotten((5, HIDDEN))), {"ffn"}),
        (lambda: Net(Forgotten((5, 7))), {"ffn", "hidden"}),
        (lambda: Seeing(Net(Forgotten((5, 7)), tied=True), HIDDEN), {"ffn"}),
        (lambda: Seeing(Net(Forgotten((5, 7)), tied=True), 97), {"ffn", "hidden"}),
        (lambda: Net(OfImages(4)), {"hidden", "ffn"}),
        (lambda: Net(OfImages(9)), {"hidden", "ffn", "experts"}),
        (lambda: Net(Gates(HEADS)), {"hidden"}),  # as many heads as positions of a channel
        (lambda: Net(Gates(97)), ATTENTION),
        (lambda: Net(Either()), set()),
    ],
)
def test_parameters_that_are_not_reached(make: Callable[[], nn.Module], kept: set[str]) -> None:
    discovery = discover(make().eval())
    assert free(discovery) == kept
    for group in discovery.groups:
        assert group.frozen is None or "not reached by the forward pass" in group.frozen


class Growing(nn.Module):
    """A table with one row per position, which longer inputs lengthen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.register_buffer("grown", torch.ones(4, HIDDEN), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        if size > len(self.grown):
            more = self.grown[-1:].expand(2 * size - len(self.grown), -1)
            self.grown = torch.cat([self.grown, more])
        return self.inner(x * self.grown[:size])


class Remade(Growing):
    """The table is made anew in another form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.grown = self.grown[None] if self.grown.dim() == 2 else self.grown[0]
        return self.inner(x * self.grown.flatten(0, -2)[:1])


case("a buffer that grows", lambda: Net(Growing(), Gated()), has={"hidden"})
case("a buffer in another form", lambda: Net(Remade(), Gated()), has={"hidden"})


def test_buffer_that_is_another_by_now() -> None:
    net = Net(Growing(), Gated())
    discovery = discover(net)
    net.bodies[0].grown = net.bodies[0].grown[None]
    with pytest.raises(InfeasibleError, match="run discover again on the model as it is now"):
        cut_(net, discovery, pick(discovery, ("hidden",)))


# ------------------------------------------------------------------------------ sizes that compare


class Widths(nn.Module):
    """Goes on by whether two sizes are equal."""

    def __init__(self, width: int, *, attributes: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)
        self.width = self.other = width
        self.attributes = attributes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(x))
        equal = self.width == self.other if self.attributes else x.shape[-1] == y.shape[-1]
        return self.down(y) * (0.5 if equal else 1.0)


def test_sizes_that_may_not_become_equal() -> None:
    net = Net(Widths(HIDDEN + 4, attributes=False))
    discovery = discover(net)
    (ffn,) = of_kind(discovery, "ffn")
    verified_prune_(copy.deepcopy(net), discovery, {ffn.name: np.arange(3)})
    with pytest.raises(InfeasibleError, match="the answer would change"):
        verified_prune_(net, discovery, {ffn.name: np.arange(4)})


def test_attributes_that_stay_equal() -> None:
    net = Net(Widths(8, attributes=True))
    discovery = discover(net)
    (ffn,) = of_kind(discovery, "ffn")
    verified_prune_(net, discovery, {ffn.name: np.arange(2)})


class Pieces(nn.Module):
    """Several pieces of one axis, two of them of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = 3, 4, 5
        self.up, self.down = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.first, self.second, self.second, self.last]
        a, b, c, d = self.up(x).split(sizes, -1)
        return self.down(torch.cat([F.silu(a), b.tanh(), F.gelu(c), d.sigmoid()], -1))


def must_be_even(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[-1] % 2 == 0
    return F.silu(x)


@pytest.mark.parametrize(
    ("body", "reason"), [(Pieces(), "second"), (Body(must_be_even), "% 2) == 0 (")]
)
def test_sizes_that_units_cannot_follow_one_by_one(body: nn.Module, reason: str) -> None:
    (group,) = of_kind(discover(Net(body)), "ffn")
    assert reason in str(group.frozen)


class Scaled(Net):
    """Multiplies by what a module says of its size, which is another's too."""

    def __init__(self, what: str) -> None:
        super().__init__(Gated(), tied=True)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 1)
        self.wide = weight_norm(nn.Linear(HIDDEN, HIDDEN))
        self.what = what

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.bodies[0](x) + self.conv(x.transpose(1, 2)).transpose(1, 2) + self.wide(x)
        module, name = self.what.split(".")
        return self.out(x) / getattr(getattr(self, module), name)


@pytest.mark.parametrize("what", ["out.in_features", "conv.out_channels", "wide.in_features"])
def test_sizes_that_modules_state_are_numbers(what: str) -> None:
    discovery = discover(Scaled(what).eval())
    trace = discovery.graph.trace
    reason = str(trace.atoms.reason(trace.tensors["embed.weight"][1]))
    assert f"{what.partition('.')[2]} is used as a number" in reason
    assert "hidden" not in free(discovery)


# ----------------------------------------------------------------------------------------- layers


class Residual(nn.Module):
    """A layer with its own residual connection."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Layered(Net):
    """Its bodies are layers."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in self.bodies:
            x = body(x)
        return self.out(x)


class InSequence(Layered):
    """Something else holds the layers, too."""

    def __init__(self) -> None:
        super().__init__(*(Residual() for _ in range(3)))
        self.all = nn.Sequential(*self.bodies)


class Adding(Net):
    """Adds the input of a layer to its output in place."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in self.bodies:
            y = body(x)
            y += x
            x = y
        return self.out(x)


class Given(nn.Module):
    """A layer that its caller gives a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Gated()

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + scale * self.body(x)


class ByPlace(Net):
    """Gives each layer a weight of its own, or all the same."""

    def __init__(self, own: bool, made: bool) -> None:
        super().__init__(Given(), Given(), Given())
        self.scales, self.own = nn.Parameter(torch.tensor([1.0, 0.5, 0.25])), own
        self.made = made
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for number, body in enumerate(self.bodies):
            scale = self.scales[number] if self.own else self.scale
            x = body(x, 1 + scale if self.made and self.own else scale)
        return self.out(x)


def lending() -> nn.Module:
    shared = Gated()
    return Layered(*(Residual(shared if n in (0, 2) else None) for n in range(4)))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("make", "reason", "modules"),
    [
        (InSequence, "all holds layers of bodies as well", "012"),
        (lending, None, "123"),
        (lambda: ByPlace(False, False), None, "012"),
        (lambda: ByPlace(True, False), "argument 0 differs from layer to layer", "012"),
        (lambda: ByPlace(True, True), "argument 1 differs from layer to layer", "012"),
        (lambda: Adding(Gated(), Gated(), Gated()), "", ""),
    ],
)
def test_layers(
    make: Callable[[], Net],
    reason: str | None,
    modules: str,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large:  # then weights are ghosts, which have equal values
        monkeypatch.setattr(tracing, "LARGE", 0)
    found = of_kind(discover(make().eval()), "layers")
    assert [group.modules for group in found if not group.frozen or modules] == (
        [tuple(f"bodies.{number}" for number in modules)] if modules else []
    )
    if modules:
        assert (found[0].frozen is None) == (reason is None)


def test_a_list_of_layers_under_two_names() -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Layered(*(Residual() for _ in range(3)))
            self.layers = self.model.bodies

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens)

    model = Wrapping()
    discovery = discover(model)
    verified_prune_(model, discovery, {"layers": np.array([1])})
    assert model.layers is model.model.bodies
    left = count_parameters(discovery, {"layers": np.array([1])})
    assert sum(one.numel() for one in model.parameters()) == left
