"""Patterns of code beyond the plain ones: the pruned model equals a dense copy with zeros."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    RwkvConfig,
    XLNetConfig,
)
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers import tiny_model
from llm_pruner import Criterion, score
from llm_pruner.checkpoints.save import save_checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import DiscoveryError, InfeasibleError
from llm_pruner.models.forward import logits_of
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters, removed_positions
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.surgery.verify import prune_ as verified_prune_
from llm_pruner.tracing import run as tracing
from llm_pruner.tracing.run import vocabulary_size
from llm_pruner.tracing.scenes import staged
from llm_pruner.types import Discovery, Group, Removal
from nets import HEADS, HIDDEN, SIZE, VOCABULARY, Attention, Body, Gated, NanoGPT, Net, attend
from removals import bound_to, pick

LENGTHS = (3, 8, 40)


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


def checked(
    model: nn.Module, *, dense: bool = True, lengths: tuple[int, ...] = LENGTHS
) -> Discovery:
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
        for length in lengths:
            tokens = torch.randint(
                VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length)
            )
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


def member(group: Group, tensor: str, dim: int) -> list[list[int]]:
    (found,) = [m for m in group.members if m.tensor.endswith(tensor) and m.dim == dim]
    return found.index.tolist()


# --------------------------------------------------------------------------------- convolutions


class Mixer(nn.Module):
    """up, a convolution along the sequence, down."""

    def __init__(self, make: Callable[[], nn.Module], width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(out, HIDDEN)
        self.conv = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.gelu(self.up(x)).transpose(1, 2))
        return self.down(F.gelu(y[..., : x.shape[1]].transpose(1, 2)))


def test_transposed_convolution() -> None:
    discovery = checked(Net(Mixer(lambda: nn.ConvTranspose1d(8, 6, 3), out=6)))
    first, second = of_kind(discovery, "ffn")
    assert (first.size, second.size) == (8, 6)
    assert member(first, "conv.weight", 0) == [[i] for i in range(8)]
    assert member(second, "conv.weight", 1) == [[i] for i in range(6)]


GROUPED = {
    "plain": (lambda: nn.Conv1d(8, 6, 3, padding=2), 6, {8, 6}),
    "same": (lambda: nn.Conv1d(8, 6, 3, padding="same"), 6, {8, 6}),
    "circular": (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"), 6, {8, 6}),
    "replicate": (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="replicate"), 6, {8, 6}),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, padding=2, groups=8), 8, {8}),
    "depthwise with a multiplier": (
        lambda: nn.Conv1d(8, 16, 3, padding=2, groups=8), 16, {8, 2},
    ),
    "groups": (lambda: nn.Conv1d(8, 6, 3, padding=2, groups=2), 6, {2, 4, 3}),
    "transposed depthwise": (lambda: nn.ConvTranspose1d(8, 8, 3, groups=8), 8, {8}),
    "transposed multiplier": (lambda: nn.ConvTranspose1d(8, 16, 3, groups=8), 16, {8, 2}),
    "transposed groups": (lambda: nn.ConvTranspose1d(8, 6, 3, groups=2), 6, {2, 4, 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_a_convolution(name: str) -> None:
    make, out, sizes = GROUPED[name]
    net = Net(Mixer(make, out=out))
    discovery = checked(net)
    inner = [group for group in discovery.groups if group.kind != "hidden"]
    assert {group.size for group in inner} == sizes
    assert all(group.frozen is None for group in inner)
    cut_(net, discovery, pick(discovery))
    conv = net.bodies[0].conv
    transposed = isinstance(conv, nn.ConvTranspose1d)
    first, second = conv.weight.shape[:2]
    grouped = (first, second * conv.groups) if transposed else (second * conv.groups, first)
    assert (conv.in_channels, conv.out_channels) == grouped


class Functional(Mixer):
    """A causal depthwise convolution as a function, over two dimensions, groups by keyword."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.kernel = nn.Parameter(torch.zeros(8, 1, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(self.up(x).mT[..., None], (0, 0, 2, 0))
        y = F.conv2d(y, self.kernel, groups=y.shape[1])
        return self.down(F.gelu(y[..., 0].mT))


def test_groups_given_by_keyword() -> None:
    ffn = of_kind(checked(Net(Functional())), "ffn")
    assert [group.size for group in ffn] == [8]


# ------------------------------------------------------------------------------ computed weights


def test_a_learned_slope_and_two_statistics_at_once() -> None:
    class Bent(Body):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.bend = nn.PReLU(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.bend(self.up(x).flatten(0, 1)).view(*x.shape[:2], -1))

    (group,) = of_kind(checked(Net(Bent())), "ffn")
    assert group.size == 8
    centred = Body(lambda y: F.gelu(y) - torch.std_mean(y, 1, keepdim=True)[1])
    assert len(of_kind(checked(Net(centred)), "ffn")) == 1


def test_a_linear_module_that_is_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(input=F.gelu(self.up(input=x)))

    model = Net(Named())
    discovery = checked(model)
    ids = torch.randint(VOCABULARY, (2, 8))
    for criterion in ("fisher-obs", "taylor", "wanda"):
        found = score(model, discovery, Criterion(criterion), input_ids=ids, seed=0)
        assert all(np.isfinite(values).all() for values in found.values())


def test_an_uneven_chunk_leaves_the_rest_prunable() -> None:
    def halves(y: torch.Tensor) -> torch.Tensor:
        left, right = y.chunk(2, -1)
        return left[..., :3] * right

    assert "hidden" in free(checked(Net(Body(halves, 7, 3))))


def test_complex_numbers_of_two_real_ones() -> None:
    def turned(y: torch.Tensor) -> torch.Tensor:
        return (torch.complex(y, y.sin()) * torch.polar(y.exp(), y)).real

    assert "hidden" in free(checked(Net(Body(turned))))


def test_what_runs_in_inference_mode() -> None:
    class Inferring(Net):
        @torch.inference_mode()
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens)

    discovery = discover(Inferring(Gated()))
    assert "ffn" in free(discovery)


def test_a_weight_that_could_be_either_of_two_stays() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("first", "second", "unread"):
                setattr(self, name, nn.Parameter(torch.empty(HIDDEN, HIDDEN)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(x @ self.first) @ self.second

    discovery = discover(Net(Either()))
    assert "not reached" in why(discovery, "unread", 0)
    assert free(discovery) == set()  # it may have to follow either


def test_layers_that_something_else_holds_stay() -> None:
    class InSequence(Net):
        def __init__(self) -> None:
            super().__init__(*(Residual() for _ in range(3)))
            self.all = nn.Sequential(*self.bodies)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.out(self.all(self.embed(tokens)))

    (group,) = of_kind(discover(InSequence()), "layers")
    assert group.frozen == "all holds layers of bodies as well"


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


def test_a_list_of_layers_under_two_names() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Layered(*(Residual() for _ in range(3)))
            self.layers = self.model.bodies

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens)

    model = Wrapped()
    discovery = discover(model)
    verified_prune_(model, discovery, {"layers": np.array([1])})
    assert model.layers is model.model.bodies
    left = count_parameters(discovery, {"layers": np.array([1])})
    assert sum(one.numel() for one in model.parameters()) == left


def test_a_layer_that_lends_a_part_to_others_stays() -> None:
    shared = Gated()
    model = Layered(*(Residual(shared if n in (0, 2) else None) for n in range(4)))
    (group,) = of_kind(discover(model), "layers")
    assert group.modules == ("bodies.1", "bodies.2", "bodies.3")


def test_gated_linear_unit() -> None:
    ffn = of_kind(checked(Net(Body(F.glu, width=16, inner=8), Body(nn.GLU(), 12, 6))), "ffn")
    assert [group.size for group in ffn] == [8, 6]
    assert member(ffn[0], "up.weight", 0) == [[i, i + 8] for i in range(8)]


class Wrapped(Body):
    """A feed-forward network whose weights are computed by a wrapper."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(F.gelu)
        self.up, self.down = wrap(self.up), wrap(self.down)


def test_weight_norm() -> None:
    net = Net(Wrapped(nn.utils.parametrizations.weight_norm))
    (ffn,) = of_kind(checked(net, dense=False), "ffn")
    cut_(net, discover(net), {ffn.name: np.arange(3)})
    assert (net.bodies[0].up.out_features, net.bodies[0].down.in_features) == (5, 5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_in_a_hook() -> None:
    net = Net(Wrapped(nn.utils.weight_norm))
    with torch.no_grad():
        net(torch.zeros(1, 2, dtype=torch.long))  # so that it can be copied
    assert {"ffn", "hidden"} <= free(checked(net, dense=False))


def test_spectral_norm() -> None:
    discovery = discover(Net(Wrapped(nn.utils.parametrizations.spectral_norm)))
    assert free(discovery) == set()
    assert any("a spectral norm" in axis.reason for axis in discovery.frozen)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_of_peft(method: str) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    targets = ["gate", "up", "down"]
    if method == "ia3":
        config = IA3Config(target_modules=targets, feedforward_modules=["down"])
    else:
        config = LoraConfig(r=4, target_modules=targets, use_dora=method == "dora")
    net = get_peft_model(Net(Gated(), Gated()), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_B" in name or "ia3" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert {"ffn", "hidden"} <= free(checked(net, dense=method == "lora"))


# ----------------------------------------------------------------------------- tokens and outputs


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
        elif self.way == "function":
            x = F.embedding(tokens, self.table)
        elif self.way == "index":
            x = self.table[tokens]
        elif self.way == "equal":
            x = (tokens[..., None] == torch.arange(VOCABULARY)).to(self.table.dtype) @ self.table
        elif self.way == "gather":
            x = self.table.gather(0, tokens.reshape(-1, 1).expand(-1, self.table.shape[1]))
            x = x.view(*tokens.shape, -1)
        else:
            x = F.one_hot(tokens, VOCABULARY).to(self.table.dtype) @ self.table
        x = x + self.second(tokens + 3) + self.types(torch.zeros_like(tokens))
        x = x + self.places(torch.arange(tokens.shape[1])[None])
        for body in self.bodies:
            x = x + body(x)
        return self.out(x)


@pytest.mark.parametrize("way", ["embedding", "function", "index", "one_hot", "equal", "gather"])
def test_tables_that_tokens_index(way: str) -> None:
    net = Tabled(way)
    assert vocabulary_size(net) == VOCABULARY
    discovery = checked(net)
    (hidden,) = of_kind(discovery, "hidden")
    assert hidden.size == HIDDEN
    table = "embed.weight" if way == "embedding" else "table"
    (frozen,) = [axis for axis in discovery.frozen if (axis.tensor, axis.dim) == (table, 0)]
    assert frozen.reason == "the vocabulary" or way in ("one_hot", "equal")


def test_no_table_is_said_so() -> None:
    with pytest.raises(DiscoveryError, match="looks its token ids up in no table"):
        discover(nn.Linear(8, 8))


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Pair(NamedTuple):
    loss: torch.Tensor
    scores: torch.Tensor


class Plain:
    def __init__(self, x: torch.Tensor) -> None:
        self.logits = x


OUTPUTS: dict[str, Callable[[torch.Tensor], object]] = {
    "tuple": lambda x: (x, None),
    "list": lambda x: [x.sum(), x],
    "dict": lambda x: {"loss": x.sum(), "logits": x},
    "other name": lambda x: {"hidden_states": (x * 2,), "lm_scores": x},
    "dataclass": lambda x: Output(x.sum(), x),
    "named tuple": lambda x: Pair(x.sum(), x),
    "object": Plain,
    "nested": lambda x: (None, {"logits": x}),
}


class Returning(Net):
    def __init__(self, make: Callable[[torch.Tensor], object]) -> None:
        super().__init__(Gated())
        self.make = make

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.make(super().forward(tokens))  # type: ignore[return-value]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    assert {"ffn", "hidden"} <= free(checked(Returning(OUTPUTS[name])))


class Published(NanoGPT):
    """nanoGPT as it is used: a ``generate`` of its own, logits of the last position, a loss."""

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(0, idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            idx = torch.cat([idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
        return idx


def test_module_with_a_config_and_generate_of_its_own() -> None:
    net = Published()
    discovery = checked(net, dense=False, lengths=(3, 8, 32))
    assert {"ffn", "hidden", "heads"} <= free(discovery)
    tokens = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    for name in ("taylor", "fisher"):
        scores = score(net, discovery, Criterion(name), input_ids=tokens, seed=0)
        assert all(np.isfinite(values).all() for values in scores.values())
        assert {"hidden", "layers.0.heads"} <= set(scores)


# ------------------------------------------------------------------------------------- kinds


class Streams(Net):
    """Hyper-connections: several copies of the hidden state, mixed anew around every layer."""

    def __init__(self, *, static: bool) -> None:
        super().__init__(Gated(), Gated())
        self.count = 3
        self.mix = nn.ModuleList(nn.Linear(HIDDEN, 3) for _ in range(2))
        self.read = nn.ParameterList(torch.rand(3) for _ in range(2))
        self.static = static

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)[:, :, None].repeat(1, 1, self.count, 1)
        for body, mix, read in zip(self.bodies, self.mix, self.read, strict=True):
            alpha = torch.tanh(mix(x.mean(2)))
            weights = read if self.static else alpha.softmax(-1)
            inside = (weights[..., None, :] @ x).squeeze(2)
            x = x + torch.sigmoid(alpha)[..., None] * body(inside)[:, :, None]
        return self.out(x.sum(2))


@pytest.mark.parametrize("static", [False, True])
def test_streams_are_no_channels(static: bool) -> None:
    discovery = checked(Streams(static=static), dense=False)
    assert [group.size for group in of_kind(discovery, "ffn")] == [8, 8]
    assert {group.size for group in of_kind(discovery, "other")} <= {3}


class NormedTogether(Attention):
    """Attention whose values are normed over heads and channels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((HEADS, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.heads, self.size)
        q, k, v = (p(x).view(shape) for p in (self.q, self.k, self.v))
        q, k, v = (p.transpose(1, 2) for p in (q, k, self.norm(v)))
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


def test_a_norm_over_several_axes() -> None:
    discovery = checked(Net(NormedTogether()), dense=False)
    assert {group.kind for group in discovery.groups if group.frozen is None} == {
        "hidden", "heads", "head_dim", "value_dim"
    }  # fmt: skip


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


def test_what_is_written_by_position() -> None:
    """Where fewer positions are written than there are values, which ones depends on the place."""
    assert "hidden" in free(checked(Net(Scattered())))
    assert "hidden" not in free(discover(Net(Scattered(HIDDEN - 2))))


class NumpySized(Attention):
    """Attention whose number of heads is one of numpy, which nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.kv_heads = np.int64(HEADS)


def test_numbers_of_numpy_hold_an_axis() -> None:
    discovery = checked(Net(NumpySized()))
    assert "heads" not in free(discovery)


class Cached(Attention):
    """Attention over keys and values that lie in buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("past_k", "past_v"):
            self.register_buffer(name, torch.zeros(2, HEADS, 64, SIZE), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        q, k, v = (
            p(x).view(x.shape[0], size, self.heads, self.size).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        self.past_k[:, :, :size] = k
        self.past_v[:, :, :size] = v
        out = attend(q, self.past_k[:, :, :size], self.past_v[:, :, :size])
        return self.o(out.transpose(1, 2).flatten(2))


def test_heads_over_a_cache_in_buffers() -> None:
    discovery = checked(Net(Cached()))
    assert {group.kind for group in discovery.groups} == {
        "hidden", "heads", "head_dim", "value_dim"
    }  # fmt: skip


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


@pytest.mark.parametrize(("top", "one_hot"), [(None, False), (2, False), (2, True)])
@pytest.mark.parametrize("batched", [False, True])
def test_experts_by_einsum(batched: bool, top: int | None, one_hot: bool) -> None:
    mixture = Mixture(batched=batched, top=top, one_hot=one_hot)
    discovery = checked(Net(mixture), dense=False)
    (experts,) = of_kind(discovery, "experts")
    (ffn,) = of_kind(discovery, "ffn")
    assert (experts.size, experts.least, ffn.size) == (4, top or 1, 6)
    assert "head_dim" not in {group.kind for group in discovery.groups}


def test_experts_that_are_chosen_one_after_the_other() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, 5, bias=False)
            self.w = nn.Parameter(torch.zeros(5, HIDDEN, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            probs = self.router(x).softmax(-1)
            first = probs.topk(1).indices
            second = probs.scatter(-1, first, 0.0).topk(1).indices
            return torch.einsum("bsd,bskdh->bsh", x, self.w[torch.cat((first, second), dim=-1)])

    (experts,) = of_kind(checked(Net(Twice()), dense=False), "experts")
    assert (experts.size, experts.least, experts.frozen) == (5, 2, None)


# -------------------------------------------------------------------------------- compiled code


def _size_as_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * x.shape[-1]


def _in_heads(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.view(x.shape[0], x.shape[1], 2, 4).flatten(2))


def _scripted(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return torch.jit.script(function)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(_size_as_a_number), "its size is used as a number"),
        (lambda: torch.jit.script(_in_heads), "its size 2 is written in the code"),
        (lambda: torch.jit.trace(F.gelu, torch.zeros(2, 8, 8)), "compiled code of which nothing"),
        (
            lambda: torch.jit.trace(nn.Tanh(), torch.zeros(2, 8, 8)),
            "compiled code of which nothing",
        ),
        (lambda: torch.jit.script(nn.GELU()), None),
        (lambda: torch.jit.script(F.silu), None),
        (lambda: (torch.jit.script(F.silu), torch.jit.script(F.silu))[1], None),
        (lambda: torch.jit.trace(F.silu, torch.zeros(2, 8, 8)), "compiled code of which nothing"),
    ],
)
def test_torchscript(make: Callable[[], Any], reason: str | None) -> None:
    function = make()
    discovery = checked(Net(Body(lambda x: function(x))))
    frozen = {(axis.tensor, axis.dim): axis.reason for axis in discovery.frozen}
    found = frozen.get(("bodies.0.up.weight", 0))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_modules_in_torchscript() -> None:
    assert {"ffn", "hidden"} <= free(checked(Net(torch.jit.script(Gated()), Gated())))


class Flexible(Attention):
    """Attention by ``flex_attention``, with or without a modification of the scores and a mask."""

    def __init__(self, score: Any = None, mask: Any = None, kv_heads: int = HEADS) -> None:
        super().__init__(heads=6, kv_heads=kv_heads if kv_heads != HEADS else 6)
        self.score, self.mask = score, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, size = x.shape[:2]
        q = self.q(x).view(batch, size, self.heads, self.size).transpose(1, 2)
        k, v = (
            p(x).view(batch, size, self.kv_heads, self.size).transpose(1, 2)
            for p in (self.k, self.v)
        )
        mask = None
        if self.mask is not None:
            mask = create_block_mask(self.mask, None, None, size, size, device="cpu")
        out = flex_attention(q, k, v, self.score, mask, scale=0.5, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


SLOPES = torch.linspace(0.1, 0.6, 6)
FLEXIBLE = {
    "plain": (None, None, True),
    "causal": (None, lambda b, h, q, k: q >= k, True),
    "relative": (lambda s, b, h, q, k: torch.tanh(s) - 0.1 * (q - k), None, True),
    "alibi": (lambda s, b, h, q, k: s - SLOPES[h] * (q - k), lambda b, h, q, k: q >= k, False),
    "by head": (None, lambda b, h, q, k: q - k < 2 + h, False),
    "one position at a time": (
        lambda s, b, h, q, k: s + SLOPES[(q % 6).reshape(1)][0],
        None,
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize(
    ("name", "kv_heads"), [*((name, 2) for name in FLEXIBLE), ("plain", HEADS), ("alibi", HEADS)]
)
def test_flex_attention(name: str, kv_heads: int) -> None:
    score, mask, heads = FLEXIBLE[name]
    discovery = checked(Net(Flexible(score, mask, kv_heads)))
    assert ("heads" in free(discovery)) == heads
    assert "hidden" in free(discovery)
    if not heads:
        assert why(discovery, "q.weight", 0).partition(" (")[0] in (
            "computed from positions",
            "looked up by position",
            "read by compiled code of which nothing is known",
        )


def test_loss_over_all_routers_keeps_them_equal() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    discovery = discover(model)
    experts = of_kind(discovery, "experts")
    assert all(group.frozen is None and len(group.companions) == 2 for group in experts[:1])
    removal = pick(discovery, ("experts",))
    expected = twin_logits(model, discovery, removal)
    cut_(model, discovery, removal)
    assert largest_difference(expected, pruned_logits(model, discovery)) <= 1e-5
    tokens = torch.arange(20)[None]
    assert bool(model(tokens, labels=tokens).aux_loss.isfinite())
    assert model.num_experts == 4 - len(removal[experts[0].name])


# ------------------------------------------------------------------- attention modules of PyTorch


class Multihead(nn.Module):
    """Attention by ``nn.MultiheadAttention``, and a feed-forward network."""

    def __init__(self, *, batch_first: bool, weights: bool, separate: bool = False) -> None:
        super().__init__()
        sizes = {"kdim": HIDDEN, "vdim": 8} if separate else {}
        self.inner = nn.MultiheadAttention(HIDDEN, 3, batch_first=batch_first, **sizes)
        self.value = nn.Linear(HIDDEN, 8) if separate else nn.Identity()
        self.ffn = Gated()
        self.batch_first, self.weights = batch_first, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.inner(y, y, self.value(y), attn_mask=mask, need_weights=self.weights)
        return self.ffn(x + (y if self.batch_first else y.transpose(0, 1)))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first: bool, weights: bool, separate: bool) -> None:
    net = Net(Multihead(batch_first=batch_first, weights=weights, separate=separate))
    discovery = checked(net, dense=False)
    assert free(discovery) == {"ffn"}
    assert "takes the size of a head from the hidden size" in why(discovery, "ffn.gate.weight", 1)


class Transformer(Net):
    """The encoder of PyTorch with a causal mask, or its decoder over what another layer gave."""

    def __init__(self, *, decoder: bool, norm_first: bool) -> None:
        super().__init__()
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        self.bodies = nn.ModuleList(
            kind(HIDDEN, 3, 20, batch_first=True, norm_first=norm_first, dropout=0.1)
            for _ in range(2)
        )
        self.decoder = decoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = memory = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        for body in self.bodies:
            if self.decoder:
                x = body(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_mask=mask)
            else:
                x = body(x, src_mask=mask, is_causal=True)
        return self.out(x)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers(decoder: bool, norm_first: bool) -> None:
    discovery = checked(Transformer(decoder=decoder, norm_first=norm_first), dense=False)
    assert [group.size for group in of_kind(discovery, "ffn")] == [20, 20]


# ------------------------------------------------------------------------ what a run leaves out


class Loop(nn.Module):
    """Experts that are modules; those that no token chose are not called."""

    def __init__(self, experts: nn.ModuleList | nn.ModuleDict, *, always: bool = False) -> None:
        super().__init__()
        self.experts, self.always = experts, always
        self.router = nn.Linear(HIDDEN, len(experts), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = self.router(flat).softmax(-1).topk(1, -1)
        out = torch.zeros_like(flat)
        experts = self.experts
        experts = list(experts.values() if isinstance(experts, nn.ModuleDict) else experts)
        for number, expert in enumerate(experts):
            rows, _ = torch.where(chosen.indices == number)
            if len(rows) or self.always:
                out.index_add_(0, rows, expert(flat[rows]) * chosen.values[rows])
        return out.view(x.shape)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_expert_without_a_token(keys: bool, always: bool) -> None:
    experts = [Gated() for _ in range(6)]
    if keys:
        loop = Loop(nn.ModuleDict({f"e{i}": e for i, e in enumerate(experts)}), always=always)
    else:
        loop = Loop(nn.ModuleList(experts), always=always)
    net = Net(loop)
    with torch.no_grad():
        # Hardly any token chooses the last.
        loop.router.weight[-1] *= 0
        loop.router.weight[-1, 0] = 2
    discovery = checked(net)
    inner = of_kind(discovery, "ffn")
    assert [group.size for group in inner] == [8] * 6
    assert all(group.frozen is None for group in inner)
    assert "hidden" in free(discovery)


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


@pytest.mark.parametrize(
    ("shape", "kept"), [((8, 5), {"hidden"}), ((5, HIDDEN), {"ffn"}), ((5, 7), {"ffn", "hidden"})]
)
def test_modules_that_are_not_reached(shape: tuple[int, int], kept: set[str]) -> None:
    discovery = checked(Net(Forgotten(shape)))
    assert free(discovery) == kept
    for group in discovery.groups:
        if group.frozen is not None:
            assert group.frozen == (
                "bodies.0.aside.weight was not reached by the forward pass and may have to follow"
            )


class Seeing(nn.Module):
    """A model of text in a part of its own, and what would write images into its hidden states."""

    def __init__(self, text: Net, size: int) -> None:
        super().__init__()
        self.text, self.projector = text, nn.Linear(5, size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(tokens)


@pytest.mark.parametrize(("size", "kept"), [(HIDDEN, {"ffn"}), (97, {"ffn", "hidden"})])
def test_what_writes_images_into_hidden_states_is_not_reached(size: int, kept: set[str]) -> None:
    discovery = discover(Seeing(Net(Forgotten((5, 7)), tied=True), size).eval())
    assert free(discovery) == kept


class OfImages(nn.Module):
    """Experts of text, and as many of images, which tokens of text do not reach."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.text = Mixture(batched=True, top=2)
        self.images = nn.Parameter(torch.zeros(number, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)


@pytest.mark.parametrize(("number", "prunable"), [(4, False), (9, True)])
def test_experts_of_images_are_not_reached(number: int, prunable: bool) -> None:
    net = Net(Attention())
    net.bodies[0] = OfImages(number)
    assert ("experts" in free(discover(net))) == prunable


class Gates(Attention):
    """Attention with a gate for each head, or a norm of each, that no run of text reaches."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate, self.images = nn.Parameter(torch.ones(size)), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gate.mean() if self.images else super().forward(x)


@pytest.mark.parametrize("of", ["heads", "head_dim"])
def test_a_gate_of_each_head_that_is_not_reached(of: str) -> None:
    sizes = {group.kind: group.size for group in discover(Net(Attention())).groups}
    discovery = checked(Net(Gates(sizes[of])))
    assert of not in free(discovery)
    assert free(checked(Net(Gates(97)))) == free(discover(Net(Attention())))


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


def test_buffer_that_has_grown() -> None:
    discovery = checked(Net(Growing(), Gated()))
    assert "hidden" in free(discovery)


def test_buffer_that_is_another_by_now() -> None:
    net = Net(Growing(), Gated())
    discovery = discover(net)
    net.bodies[0].grown = net.bodies[0].grown[None]
    with pytest.raises(InfeasibleError, match="run discover again on the model as it is now"):
        cut_(net, discovery, pick(discovery, ("hidden",)))


class Remade(Growing):
    """The table is made anew in another form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.grown = self.grown[None] if self.grown.dim() == 2 else self.grown[0]
        return self.inner(x * self.grown.flatten(0, -2)[:1])


def test_buffer_of_another_form_after_the_run() -> None:
    net = Net(Remade(), Gated())
    assert vocabulary_size(net) == VOCABULARY
    discovery = checked(net)
    assert net.bodies[0].grown.dim() == 2
    assert "hidden" in free(discovery)


# ------------------------------------------------------------------------------- whole models


def _saved(model: PreTrainedModel, folder: Path, kinds: tuple[str, ...] | None = None) -> Any:
    """Prune, check, save, and return the model as it is loaded again."""
    dense_config = copy.deepcopy(model.config)
    discovery = discover(model)
    removal = pick(discovery, kinds)
    assert removal
    expected = twin_logits(model, discovery, removal)
    edits = cut_(model, discovery, removal)
    assert largest_difference(expected, pruned_logits(model, discovery)) <= 1e-5
    save_checkpoint(model, folder, edits=edits, dense_config=dense_config)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    return loaded


@pytest.mark.parametrize("kind", ["hidden", "ffn"])
def test_state_that_settings_size(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    config = RwkvConfig(vocab_size=40, num_hidden_layers=2, context_length=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    loaded = _saved(model, tmp_path / "out", (kind,))
    out = loaded.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 6


def test_norms_of_single_heads_are_saved(tmp_path: Path) -> None:
    _saved(tiny_model("stablelm", qk_layernorm=True), tmp_path / "out")


def test_mask_embedding_that_generation_reads() -> None:
    config = XLNetConfig(vocab_size=40, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    discovery = discover(model)
    (hidden,) = of_kind(discovery, "hidden")
    assert any(m.tensor.endswith("mask_emb") for m in hidden.members)
    verified_prune_(copy.deepcopy(model), discovery, pick(discovery, ("hidden", "ffn")))
    heads = of_kind(discovery, "heads")
    assert all(group.frozen is None for group in heads)
    # A bias for segments, which the run is given none of, follows the one for content.
    assert any(m.tensor.endswith("r_s_bias") for m in heads[0].members)


def test_projector_of_images_keeps_the_hidden_size() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 8}
    heads = {"num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "num_key_value_heads": 4, **text, **heads},
        vision_config={"model_type": "clip_vision_model", "patch_size": 4, **vision, **heads},
        image_token_index=39,
    )
    discovery = discover(LlavaForConditionalGeneration(config).eval())
    (hidden,) = of_kind(discovery, "hidden")
    assert "multi_modal_projector" in str(hidden.frozen)
    assert {"heads", "ffn"} <= free(discovery)


# ------------------------------------------------------------------------------ sizes that compare


def _even(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[-1] % 2 == 0, "gate and value"
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def _in_two(x: torch.Tensor) -> torch.Tensor:
    gate, value = rearrange(x, "b t (two n) -> two b t n", two=2)
    return F.silu(gate) * value


@pytest.mark.parametrize("function", [_even, _in_two])
def test_a_size_that_is_to_be_even(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    discovery = checked(Net(Body(function, width=16, inner=8)))
    assert [len(group.members[0].index) for group in of_kind(discovery, "ffn")] == [8]


def test_a_size_that_is_to_be_even_and_need_not_be_cut_so() -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] % 2 == 0
        return F.silu(x)

    (group,) = of_kind(discover(Net(Body(between))), "ffn")
    assert "% 2) == 0" in str(group.frozen)
    assert "the answer would change" in str(group.frozen)


class _Widths(nn.Module):
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


def test_sizes_that_are_not_to_become_equal() -> None:
    net = Net(_Widths(HIDDEN + 4, attributes=False))
    discovery = discover(net)
    (ffn,) = of_kind(discovery, "ffn")
    for count in (3, 5):
        smaller = copy.deepcopy(net)
        verified_prune_(smaller, discovery, {ffn.name: np.arange(count)})
    with pytest.raises(InfeasibleError, match="the answer would change"):
        verified_prune_(net, discovery, {ffn.name: np.arange(4)})


def test_attributes_that_are_to_stay_equal() -> None:
    (ffn,) = of_kind(discover(Net(_Widths(8, attributes=True))), "ffn")
    assert ffn.frozen is None  # nothing follows from either
    net = Net(_Widths(8, attributes=True))
    verified_prune_(net, discover(net), {ffn.name: np.arange(2)})


def test_how_many_tokens_each_expert_gets() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, 4, bias=False)
            self.up = nn.Parameter(torch.zeros(4, HIDDEN, 8))
            self.down = nn.Parameter(torch.zeros(4, 8, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, chosen = self.gate(x).topk(2, -1)
            counts = chosen.new_zeros(*chosen.shape[:2], self.gate.out_features)
            self.load = counts.scatter_(-1, chosen, torch.ones_like(chosen)).sum((0, 1))
            y = F.silu(torch.einsum("btd,btkdf->btkf", x, self.up[chosen]))
            y = torch.einsum("btkf,btkfd->btkd", y, self.down[chosen])
            return (weights.softmax(-1)[..., None] * y).sum(2)

    discovery = discover(Net(Counting()).double())
    assert {"experts", "ffn"} <= free(discovery)
    net = Net(Counting())
    removal = pick(discovery, ("experts",))
    verified_prune_(net, discover(net), removal)


class _Pieces(nn.Module):
    """Several pieces of one axis, two of them of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = 3, 4, 5
        self.up, self.down = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.first, self.second, self.second, self.last]
        a, b, c, d = self.up(x).split(sizes, -1)
        return self.down(torch.cat([F.silu(a), b.tanh(), F.gelu(c), d.sigmoid()], -1))


def test_pieces_that_share_a_size() -> None:
    """Units of the first and the last piece may go alone, of those between not."""
    (group,) = of_kind(discover(Net(_Pieces())), "ffn")
    assert "second" in str(group.frozen)


class _Cached(nn.Module):
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


def test_copies_of_what_a_cache_holds_are_no_weights() -> None:
    net = Net(_Cached())
    discovery = discover(net)
    assert {"heads", "query_heads"} <= free(discovery)
    for kind in ("heads", "query_heads"):
        verified_prune_(copy.deepcopy(net), discovery, pick(discovery, (kind,)))


class _MappedHeads(nn.Module):
    """Each head by itself, its weights along an axis that is mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(HEADS, HIDDEN, SIZE)) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(x @ q, x @ k, x @ v)

        return self.o(torch.vmap(head, out_dims=2)(self.q, self.k, self.v).flatten(2))


def test_heads_that_are_mapped_over() -> None:
    discovery = discover(Net(_MappedHeads(), Gated()))
    assert "ffn" in free(discovery)
    assert "torch.vmap" in why(discovery, "q", 0)


# ------------------------------------------------------------------------------- norms of groups


class _GroupNormed(nn.Module):
    def __init__(self, *, module: bool) -> None:
        super().__init__()
        self.attention, self.heads = Attention(), HEADS
        self.norm = nn.GroupNorm(HEADS, HEADS * SIZE)
        self.module, self.attention.o = module, nn.Identity()
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x).flatten(0, 1)
        if self.module:
            y = self.norm(y)
        else:
            y = torch.group_norm(y, self.heads, self.norm.weight, self.norm.bias, 1e-5, False)
        return self.o(y.unflatten(0, x.shape[:2]))


@pytest.mark.parametrize("module", [True, False])
def test_a_norm_of_each_head(module: bool) -> None:
    net = Net(_GroupNormed(module=module))
    discovery = checked(net, dense=False)
    (heads,) = of_kind(discovery, "heads")
    assert heads.size == HEADS
    assert any(one.tensor.endswith("norm.weight") for one in heads.members)
    verified_prune_(net.float(), discover(net.float()), {heads.name: np.array([0, 2])})
    if module:
        assert net.bodies[0].norm.num_groups == 1


@pytest.mark.slow
def test_flex_attention_of_transformers() -> None:
    model = tiny_model("llama")
    usual = discover(model)
    model.set_attn_implementation("flex_attention")
    discovery = discover(model)
    assert model.config._attn_implementation == "flex_attention"
    assert {g.name: g.frozen for g in discovery.groups} == {g.name: g.frozen for g in usual.groups}
    removal = pick(discovery)
    expected = twin_logits(model, discovery, removal)
    cut_(model, discovery, removal)
    # As it is called, it needs a compiler.
    model.set_attn_implementation("eager")
    assert largest_difference(expected, pruned_logits(model, discovery)) <= 1e-5


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


def test_a_size_that_decides_only_which_kernel_runs() -> None:
    discovery = checked(Net(Wide()), dense=False)
    assert free(discovery) == {"hidden", "heads", "query_heads", "head_dim", "value_dim"}


# ------------------------------------------------------------------------------ linear attention


class Delta(Attention):
    """Attention by the delta rule: values are corrected by solving a system of equations."""

    def __init__(self, *, left: bool) -> None:
        super().__init__()
        self.left = left

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.q, self.k, self.v)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in layers)
        system = k @ k.mT * 0.1
        if self.left:
            v = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        else:
            every, wanted = system.sum(1, keepdim=True), {"upper": True, "unitriangular": True}
            v = torch.linalg.solve_triangular(every, v.mT, left=False, **wanted).mT
        return self.o(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("left", [True, False])
def test_heads_whose_values_are_solved_for(left: bool) -> None:
    discovery = checked(Net(Delta(left=left)))
    assert free(discovery) == {"hidden", "heads", "head_dim", "value_dim"}


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


# ------------------------------------------------------------------- found by reading the rules


class Tiled(Attention):
    """Copies of keys and values as the outer axis, as einops' ``b (r kv) n d``."""

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, sequence, size = x.shape
        x = x[:, None].expand(batch, self.repeats, heads, sequence, size)
        return x.reshape(batch, self.repeats * heads, sequence, size)


def test_copies_as_the_outer_axis_go_for_all_heads_at_once() -> None:
    discovery = checked(Net(Tiled(heads=6, kv_heads=2)), dense=False)
    assert {"heads", "head_dim"} <= free(discovery)


class Tagged(Net):
    """Returns classes beside the logits, and goes on with them."""

    def __init__(self, chosen: bool) -> None:
        super().__init__(Gated())
        self.tag, self.back, self.chosen = nn.Linear(HIDDEN, 7), nn.Linear(7, HIDDEN), chosen

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        classes = self.tag(x)
        x = x + self.back(classes.softmax(-1)) + self.bodies[0](x)
        tags = classes.argmax(-1) if self.chosen else classes
        return {"logits": self.out(x), "tags": tags}


@pytest.mark.parametrize("chosen", [False, True])
def test_classes_that_are_returned_stay(chosen: bool) -> None:
    discovery = discover(Tagged(chosen).eval())
    trace = discovery.graph.trace
    assert "returned" in str(trace.atoms.reason(trace.tensors["tag.weight"][0]))
    assert "ffn" in free(discovery)


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
def test_sizes_that_modules_say_of_themselves_are_numbers(what: str) -> None:
    discovery = discover(Scaled(what).eval())
    name = what.partition(".")[2]
    (hidden,) = of_kind(discovery, "hidden") or [None]
    trace = discovery.graph.trace
    reason = trace.atoms.reason(trace.tensors["embed.weight"][1])
    assert reason is not None
    assert f"{name} is used as a number" in reason
    assert hidden is None or hidden.frozen


class Adding(Net):
    """Adds the input of a layer to its output in place."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in self.bodies:
            y = body(x)
            y += x
            x = y
        return self.out(x)


def test_a_caller_that_adds_the_input_in_place() -> None:
    discovery = checked(Adding(Gated(), Gated(), Gated()))
    assert all(group.frozen for group in of_kind(discovery, "layers"))


class Given(nn.Module):
    """A layer that is given a number by its caller."""

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


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("own", "made"), [(False, False), (True, False), (True, True)])
def test_weights_that_layers_are_given_by_place(
    own: bool, made: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # then weights have stand-ins, which are alike
        monkeypatch.setattr(tracing, "LARGE", 0)
    (layers,) = of_kind(discover(ByPlace(own, made).eval()), "layers")
    assert bool(layers.frozen) is own


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y * (y[..., 1:].square().sum(-1, keepdim=True) + 1).rsqrt(),
        lambda y: y * (y[..., :-1].square().sum(-1, keepdim=True) + 1).rsqrt(),
        lambda y: y * y[..., 2, None],
        lambda y: y * y[..., -2, None],
        lambda y: y * torch.select(y, -1, -2)[..., None],
        lambda y: y * torch.trapezoid(y).unsqueeze(-1),
        lambda y: F.pad(y[..., : np.int64(4)], (0, 4)) + y,
        lambda y: F.pad(y[..., : torch.tensor(4)], (0, 4)) + y,
        lambda y: y * torch.cov(y.flatten(0, 1).T[:4]).diagonal().mean(),
        lambda y: y * torch.cov(y.flatten(0, 1)).diagonal().mean(),
    ],
)
def test_positions_that_code_names(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checked(Net(Body(between)), dense=False)


def test_a_mask_over_several_axes() -> None:
    class Masked(Body):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.w = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("mask", torch.arange(32).view(4, 8) % 3 == 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x).relu()
            return self.down(y / (self.w[self.mask].square().mean() + 1) + self.w.mean(0))

    checked(Net(Masked()), dense=False)


def test_forms_of_repeat_interleave() -> None:
    def between(y: torch.Tensor) -> torch.Tensor:
        counts = torch.repeat_interleave(torch.tensor([1, 0, 2]))
        return torch.repeat_interleave(input=y, repeats=2, dim=-1) * counts.sum()

    assert free(checked(Net(Body(between, inner=16)), dense=False)) == {"hidden", "other"}


@pytest.mark.parametrize(
    "write",
    [
        lambda chosen, order: torch.zeros_like(chosen).scatter(-1, order, chosen),
        lambda chosen, order: chosen.scatter(-1, order, torch.zeros_like(chosen)),
        lambda chosen, order: chosen.scatter_(-1, order[..., :1], 2),
    ],
)
def test_positions_that_are_written_as_values(
    write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, 5)
            self.w1 = nn.Parameter(torch.randn(5, HIDDEN, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = self.router(x).topk(2).indices
            order = torch.tensor([1, 0]).expand_as(chosen)
            return torch.einsum("bsd,bskdh->bsh", x, self.w1[write(chosen, order)])

    discovery = checked(Net(Routed()), dense=False)
    assert "written" in why(discovery, "router.weight", 0)


def test_experts_that_an_operation_without_a_rule_is_given_the_numbers_of() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, 5)
            self.up, self.scale = nn.Parameter(torch.randn(5, HIDDEN)), nn.Parameter(torch.randn(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, chosen = self.gate(x).topk(2)
            scaled = weights * torch.take(self.scale, chosen)
            return (scaled[..., None] * self.up[chosen]).sum(2) * x

    discovery = checked(Net(Scaled()), dense=False)
    assert why(discovery, "gate.weight", 0) == "no rule for the operation take"


def test_axes_that_are_put_in_and_taken_out_in_place() -> None:
    class Inserted(Body):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.gate = nn.Linear(8, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x).relu()
            gate = self.gate(y).sigmoid()
            y.unsqueeze_(2).mul_(2.0).squeeze_(2)
            return self.down(y) * gate

    discovery = checked(Net(Inserted()))
    (group,) = of_kind(discovery, "ffn")
    assert {m.tensor.split(".", 2)[2] for m in group.members} == {
        *("up.weight", "up.bias", "gate.weight", "down.weight")
    }


@pytest.mark.parametrize("shapes", [False, True])
def test_broadcasting_by_name(shapes: bool) -> None:
    class Remembered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(16, HIDDEN)
            self.memory = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.gelu(self.up(x))
            if shapes:
                memory = self.memory.expand(torch.broadcast_shapes(self.memory.shape, y.shape))
            else:
                memory, y = torch.broadcast_tensors(self.memory, y)
            return self.down(torch.cat([memory, y], -1))

    discovery = checked(Net(Remembered()))
    if shapes:
        assert "written in the code (expand)" in why(discovery, "memory", 0)
    else:
        (group,) = of_kind(discovery, "ffn")
        assert "memory" in [member.tensor.rpartition(".")[2] for member in group.members]


@pytest.mark.parametrize("step", ["a size", "of numpy"])
def test_steps_of_slices(step: str) -> None:
    class Strided(Body):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.few, self.out = nn.Linear(HIDDEN, 2), nn.Linear(4, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            few, y = self.few(x), self.up(x).relu()
            by = few.shape[-1] if step == "a size" else np.int64(2)
            return self.down(y) + self.out(y[..., ::by]) * few.sum(-1, keepdim=True)

    discovery = checked(Net(Strided()))
    if step == "a size":
        assert "used as a number" in why(discovery, "few.weight", 0)


def test_axes_that_are_read_by_a_mean() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(HIDDEN, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(x).mean(-1, keepdim=True).sigmoid() * x

    assert "other" in free(checked(Net(Gate()), dense=False))


def test_kernels_of_other_packages_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that no operation of PyTorch shows, as those of flash-linear-attention."""
    package: Any = ModuleType("kernels_of_others")
    package.doubled = lambda x: torch.from_numpy(2 * x.detach().numpy())
    monkeypatch.setitem(sys.modules, package.__name__, package)

    @use_kernel_func_from_hub_with_fallback("doubled", package.__name__)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert free(checked(Net(Body(doubled)))) == {"hidden", "other"}
