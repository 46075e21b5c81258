"""Groups of real and of hand-written models: kinds, names, blocks, companions."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from families import discovered
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import DiscoveryError, UserError
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import cut_verified_, largest_difference, tolerance
from llm_pruner.types import Companion
from nets import HIDDEN, Gated, NanoGPT, Net, Settings
from removals import cut_as_twin_, pick


def test_names_follow_the_forward_pass() -> None:
    _, discovery = discovered("llama")
    assert [group.name for group in discovery.groups] == [
        "hidden",
        "head_dim",
        *(
            f"layers.{layer}.{kind}"
            for layer in range(3)
            for kind in ("heads", "query_heads", "value_dim", "ffn")
        ),
        "layers",
    ]
    for group in discovery.groups:
        expected = int(group.name.split(".")[1]) if "." in group.name else None
        assert group.layer == expected
        assert group.name.endswith(group.kind)
    with pytest.raises(KeyError, match=r"layers\.9\.ffn"):
        discovery.group("layers.9.ffn")


def test_query_heads_in_key_value_groups() -> None:
    _, discovery = discovered("llama")
    heads = discovery.group("layers.1.heads")
    queries = discovery.group("layers.1.query_heads")
    assert (heads.size, queries.size) == (2, 6)
    assert heads.blocks is None
    assert queries.blocks is not None
    assert queries.blocks.tolist() == [0, 0, 0, 1, 1, 1]
    at = "model.layers.1.self_attn"
    index = {(member.tensor, member.dim): member.index for member in heads.members}
    assert set(index) == {(f"{at}.{name}_proj.weight", 0) for name in "qkv"} | {
        (f"{at}.o_proj.weight", 1)
    }
    assert (index[f"{at}.q_proj.weight", 0] == np.arange(48).reshape(2, 24)).all()
    assert (index[f"{at}.v_proj.weight", 0] == np.arange(16).reshape(2, 8)).all()
    for member in queries.members:
        assert (member.index == np.arange(48).reshape(6, 8)).all()


def test_one_head_size_for_keys_and_values() -> None:
    _, discovery = discovered("llama")
    # A unit is a rotary pair, positions i and i + 4 of each head; the values lose two channels.
    pairs = discovery.group("head_dim")
    assert pairs.size == 4
    assert pairs.companions == tuple(
        Companion(f"layers.{layer}.value_dim", Fraction(2)) for layer in range(3)
    )
    assert discovery.group("layers.1.value_dim").companions == (
        Companion("head_dim", Fraction(1, 2)),
    )
    keys = next(m for m in pairs.members if m.tensor == "model.layers.0.self_attn.k_proj.weight")
    assert keys.index[1].tolist() == [1, 5, 9, 13]
    tables = [member for member in pairs.members if member.buffer]
    assert {member.tensor for member in tables} == {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }
    assert tables == list(pairs.members[-len(tables) :])


def test_experts_need_aligned_widths() -> None:
    _, discovery = discovered("mixtral")
    assert discovery.group("layers.0.ffn").multiple == 8
    assert discovery.group("hidden").multiple == 8
    _, dense = discovered("llama")
    assert {group.multiple for group in dense.groups} == {1}


def test_nothing_of_the_model_changes() -> None:
    model, _ = discovered("llama_tied")
    model = copy.deepcopy(model)
    model.train()
    model.model.layers[0].mlp.eval()
    before = copy.deepcopy(model)
    discover(model)
    assert [module.training for module in model.modules()] == [
        module.training for module in before.modules()
    ]
    for (name, old), new in zip(
        before.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new), name
    for (path, module), old_module in zip(model.named_modules(), before.modules(), strict=True):
        for key, value in vars(module).items():
            if isinstance(value, int):
                assert type(value) is type(vars(old_module)[key]), (path, key)
        assert not module._forward_hooks, path
    assert model.model.layers[0].self_attn.config is model.config


class Swapping(Net):
    """Replaces a part of itself when it is run, as BigBird does its attention on short input."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.out = copy.copy(self.out)
        return super().forward(tokens)


def test_a_part_that_a_run_replaces_is_put_back() -> None:
    net = Swapping(Gated())
    out = net.out
    discover(net)
    assert net.out is out


def test_hand_written_model() -> None:
    model = NanoGPT()
    discovery = discover(model)
    assert {group.kind for group in discovery.groups} == {
        *("hidden", "heads", "head_dim", "value_dim", "ffn", "layers")
    }
    assert all(group.frozen is None for group in discovery.groups)
    removal = pick(discovery)
    assert cut_as_twin_(model, discovery, removal) > 0.1
    assert sum(p.numel() for p in model.parameters()) == count_parameters(discovery, removal)
    assert model.lm_head.weight is model.wte.weight
    assert len(model.h) == 2


def test_hand_written_model_with_one_number_for_two_axes() -> None:
    model = NanoGPT(literal=True)
    discovery = discover(model)
    # view(B, T, C) makes the heads as wide as the residual stream: neither can shrink alone.
    for name in ("hidden", "layers.0.heads"):
        assert "positions are left" in str(discovery.group(name).frozen)
    removal = pick(discovery)
    assert {discovery.group(name).kind for name in removal} == {"ffn", "layers"}
    expected = twin_logits(model, discovery, removal)
    cut_(model, discovery, removal)
    assert largest_difference(expected, pruned_logits(model, discovery)) <= tolerance(expected)


def test_channels_that_nothing_reads_are_frozen() -> None:
    class Collecting(NanoGPT):
        """Computes states that a longer run would use, and drops them."""

        def __init__(self) -> None:
            super().__init__()
            self.states = nn.Linear(Settings.n_embd, 16)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            self.states(self.ln_f(self.wte(idx)))
            return super().forward(idx)

    discovery = discover(Collecting())
    (group,) = [g for g in discovery.groups if any(m.tensor == "states.bias" for m in g.members)]
    assert {member.tensor for member in group.members} == {"states.weight", "states.bias"}
    assert group.frozen == "the traced run did not use what it computes"
    assert discovery.group("hidden").frozen is None
    assert "states.weight" in {member.tensor for member in discovery.group("hidden").members}


def test_unreached_parameters_are_reported() -> None:
    model = NanoGPT()
    model.spare = nn.Linear(3, 5)
    discovery = discover(model)
    stuck = {(axis.tensor, axis.dim): axis.reason for axis in discovery.frozen}
    assert stuck["spare.weight", 0] == stuck["spare.bias", 0] == "not reached by the forward pass"
    assert not [g for g in discovery.groups if any(m.tensor.startswith("spare") for m in g.members)]


def test_unreached_sibling_freezes_what_it_would_have_to_fit() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # An equal one would be run on what the others are given.
            self.experts = nn.ModuleList([Gated(), Gated(width=6), Gated()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x) + self.experts[2](x)

    discovery = discover(Net(Experts()))
    assert not [group for group in discovery.groups if group.frozen is None]
    stuck = {(axis.tensor, axis.dim): axis.reason for axis in discovery.frozen}
    reason = stuck["bodies.0.experts.0.up.weight", 1]
    assert reason.startswith("bodies.0.experts.1.")
    assert reason.endswith("was not reached by the forward pass")


class Crossed(nn.Module):
    """Holds beside what is for text its like for something else that text does not bring."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Gated(), Gated()])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = self.parts[0](x)
        if context is not None:
            x = x + self.parts[1](context)
        return x


def test_a_sibling_for_what_is_not_text_is_not_taken_for_an_expert() -> None:
    discovery = discover(Net(Crossed()))
    stuck = {(axis.tensor, axis.dim): axis.reason for axis in discovery.frozen}
    assert stuck["bodies.0.parts.1.gate.weight", 1] == "not reached by the forward pass"
    assert not [g for g in discovery.groups if any(".parts.1." in m.tensor for m in g.members)]


class Generating(Net):
    """Has a ``generate`` of its own, which takes no mask."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return super().forward(input_ids)

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        raise NotImplementedError


def test_long_input_is_run_without_generate_where_that_fails() -> None:
    graph = discover(Generating(Gated())).graph
    assert [scene.name for scene in graph.scenes] == ["8 tokens", "129 tokens", "training"]
    assert not graph.left_out


class Blockwise(Net):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] % 64:
            raise ValueError("the length is no multiple of 64")
        return super().forward(tokens)


def test_given_tokens_are_what_a_cut_is_compared_on() -> None:
    net, tokens = Blockwise(Gated()), torch.arange(64)[None] % 20
    discovery = discover(net, tokens=tokens)
    assert discovery.graph.left_out == ("1 token", "training")
    _, verified = cut_verified_(net, discovery, pick(discovery))
    assert verified.scenes == ("the given tokens", "128 tokens")
    with pytest.raises(UserError, match=r"shape \(64,\) .* give integers of shape"):
        discover(net, tokens=tokens[0])


class Narrow(Gated):
    """Divides by a width, on long input alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y / self.down.in_features if x.shape[1] > 16 else y


class Placed(nn.Module):
    """Takes a place as well as tokens, and looks them up in a table that is no embedding."""

    class Config(NamedTuple):
        layer_types: tuple[str, ...] = ("one", "other")

    class Dictionary(dict[str, int]):
        __getattr__ = dict.get

    def __init__(self, config: object, *bodies: nn.Module) -> None:
        super().__init__()
        self.config, self.bodies = config, nn.ModuleList(bodies)
        self.table = nn.Parameter(torch.linspace(-1, 1, 40 * HIDDEN).sin().view(40, HIDDEN))

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        x = self.table[tokens] + start
        for body in self.bodies:
            x = x + body(x)
        return x @ self.table.T


@pytest.mark.parametrize("config", [Placed.Config(), Placed.Dictionary(width=HIDDEN)])
def test_a_forward_pass_that_is_given_runs_on_all_input(config: object) -> None:
    net = Placed(config, Gated(), Narrow()).eval()
    discovery = discover(net, forward=lambda model, tokens: [model(tokens, 0)])
    names = ["8 tokens", "129 tokens", "1 token", "training"]
    assert [scene.name for scene in discovery.graph.scenes] == names
    assert [g.members[0].tensor for g in discovery.groups if g.kind == "ffn"] == [
        "bodies.0.gate.weight"
    ]
    # Also of a copy it is known how many tokens there are.
    _, verified = cut_verified_(copy.deepcopy(net), discovery, pick(discovery))
    assert [*verified.scenes] == names


class Tabled(nn.Module):
    """Reads a table that is shorter than long input, and says its own width where that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)
        self.register_buffer("places", torch.linspace(0, 1, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places, inner = self.places[: x.shape[1]], self.up(x)
        assert len(places) == x.shape[1], f"{len(places)} places for {tuple(inner.shape)}"
        return self.down(inner * places[:, None])


def test_a_run_that_failed_ties_nothing() -> None:
    discovery = discover(Net(Tabled(), Tabled()))
    assert [scene.shape[1] for scene in discovery.graph.scenes] == [8, 64, 1, 7]
    assert [g.size for g in discovery.groups if g.kind == "other"] == [8, 8]


def test_model_without_an_embedding() -> None:
    with pytest.raises(
        DiscoveryError, match=r"has no token embedding: .* looks its token ids up in no table"
    ):
        discover(nn.Linear(4, 4))


def test_model_that_cannot_run() -> None:
    model = NanoGPT()
    model.lm_head = nn.Linear(7, 40)
    with pytest.raises(DiscoveryError, match=r"NanoGPT cannot be traced: .*\(2, 8\).*RuntimeError"):
        discover(model)
    assert type(model.h[0].attn.n_head) is int


def test_model_that_returns_no_logits() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden_states": self.embed(tokens)}

    with pytest.raises(DiscoveryError, match="returns dict without logits"):
        discover(Odd())


class Streams(nn.Module):
    """Layers that mix parallel streams of the hidden state into new ones."""

    def __init__(self, streams: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.spread = nn.Parameter(torch.randn(streams, 1))
        self.layers = nn.ModuleList(Mixing(streams, width) for _ in range(3))
        self.head = nn.Linear(width, 40, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens).unsqueeze(2) * self.spread
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.sum(2))


class Mixing(nn.Module):
    def __init__(self, streams: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(streams, streams, bias=False)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mix(hidden.transpose(2, 3)).transpose(2, 3) * self.scale


def test_layers_that_number_streams_anew_stay() -> None:
    torch.manual_seed(0)
    discovery = discover(Streams())
    (layers,) = (group for group in discovery.groups if group.kind == "layers")
    assert layers.frozen == "each layer numbers the streams of the hidden state anew"
