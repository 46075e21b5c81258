"""Discovery, scores and checks leave a model as it was, whatever it keeps from a forward pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.importance import Criterion, score
from llm_pruner.surgery.verify import prune_
from llm_pruner.tracing import scenes
from nets import HIDDEN, VOCABULARY, Body, Gated, Net


def tokens(samples: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(
        0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1)
    )


class Kept:
    """What code of a model holds beside its modules."""

    def __init__(self) -> None:
        self.made: dict[str, torch.Tensor] = {}


class Biased(nn.Module):
    """Adds a bias that a small network makes of the position, once for each length."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, HIDDEN))
        self.place, self.kept, self.made = place, Kept(), ({}, [])
        self.bias: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        where = {"object": self.kept.made, "dict in a tuple": self.made[0]}.get(self.place, {})
        found = self.bias if self.place == "attribute" else where.get(str(length))
        if found is None or len(found) < length:
            found = self.mlp(torch.arange(length, dtype=x.dtype)[:, None]).detach()
            where[str(length)] = self.bias = found
        return found[:length]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("place", ["attribute", "object", "dict in a tuple"])
def test_what_a_forward_pass_keeps_is_not_kept(place: str, scored: bool) -> None:
    model = Net(Gated(), Biased(place))
    discovery = discover(model)
    group = next(group for group in discovery.groups if group.size == 16)
    assert group.frozen is None
    if scored:
        score(model, discovery, Criterion("taylor"), input_ids=tokens(), seed=0)
    fresh = copy.deepcopy(model)
    prune_(model, discovery, {group.name: np.arange(4)})
    bodies = (model.bodies[1], fresh.bodies[1])
    assert not any(one.kept.made or one.made[0] or one.bias is not None for one in bodies)
    with torch.no_grad():
        assert bodies[0].mlp(torch.ones(1, 1)).shape == (1, HIDDEN)
        twin = fresh.bodies[1].mlp[2]
        twin.weight[:, :4] = 0
        torch.testing.assert_close(model(tokens()), fresh(tokens()))


class Beginning(nn.Module):
    """Counts its runs, and sets its scale by the first batch that it sees, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = Gated(), nn.Parameter(torch.empty(HIDDEN))
        self.register_buffer("begun", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.begun:
            self.scale.data.copy_(1 / x.std((0, 1)))
        self.begun += 1
        return self.inner(x * self.scale)


@pytest.mark.parametrize("begun", [0, 1])
def test_what_a_first_run_sets_is_left_to_the_first_run(begun: int) -> None:
    model = Net(Beginning()).double()
    model.bodies[0].begun.fill_(begun)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    discovery = discover(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune_(model, discovery, {"hidden": np.array([3])})
    kept = np.delete(np.arange(HIDDEN), 3)
    assert torch.equal(model.bodies[0].scale, before["bodies.0.scale"][kept])
    assert model.bodies[0].begun == begun


def test_settings_within_settings_are_left_alone() -> None:
    """As of Phi-3, whose code writes a size into the dictionary that all its configs share."""
    model = tiny_model(
        "phi3",
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        max_position_embeddings=512,
        original_max_position_embeddings=64,
    )
    rope = dict(model.config.rope_parameters)
    with torch.no_grad():
        before = copy.deepcopy(model)(tokens()).logits
    discovery = discover(model)
    assert model.config.rope_parameters == rope
    assert all(
        type(value) is type(rope[key]) for key, value in model.config.rope_parameters.items()
    )
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)
    group = next(group for group in discovery.groups if group.kind == "ffn")
    prune_(model, discovery, {group.name: np.arange(4)})


class Sized(Gated):
    """Asks a memoised method for its sizes."""

    @functools.lru_cache(maxsize=None)  # noqa: B019, UP033
    def halves(self) -> tuple[int, int]:
        return self.up.out_features, self.down.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(inner.view(*x.shape[:2], self.halves()[0]))


def test_a_memoised_method_keeps_no_size_of_a_trace() -> None:
    model = Net(Sized())
    model.get_input_embeddings = lambda: model.embed  # no untraced run is needed to find it
    discover(model)
    with torch.no_grad():
        assert model(tokens()).isfinite().all()
    assert all(type(size) is int for size in model.bodies[0].halves())


def test_an_empty_place_in_a_list_of_modules() -> None:
    model = Net(Gated(), Gated())
    model.more = nn.ModuleList([nn.Linear(2, 2), None])  # type: ignore[list-item]
    discovery = discover(model)
    found = score(model, discovery, Criterion("fisher"), input_ids=tokens(), seed=0)
    assert len(found) == 3  # the hidden state and what each body has


OF_ALL_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda w: w.mean(),
    "largest of sums": lambda w: w.sum(1).amax(),
    "least of the largest": lambda w: w.flatten().topk(5).values.min(),
}


class Ternary(nn.Linear):
    """As BitNet b1.58: a weight is its sign, or nothing, times one number that is made of all."""

    scale: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = type(self).scale(self.weight.abs()).clamp(min=1e-5)
        return nn.functional.linear(
            x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias
        )


@pytest.mark.parametrize("way", OF_ALL_VALUES)
def test_a_scale_of_all_values_of_a_weight_freezes_it(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(Ternary, "scale", staticmethod(OF_ALL_VALUES[way]), raising=False)
    body = Body(torch.relu)
    body.up, body.down = Ternary(HIDDEN, 8), Ternary(8, HIDDEN)
    discovery = discover(Net(Gated(), body))
    assert not any(
        member.tensor.startswith("bodies.1")
        for group in discovery.groups
        if group.frozen is None and group.kind != "layers"
        for member in group.members
    )


class Linear(nn.Module):
    """Linear attention of one sample at a time, by products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, size) for size in (8, 8, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (nn.functional.elu(one(x)) + 1 for one in (self.q, self.k))
        scores = torch.stack([a @ b.T for a, b in zip(q, k, strict=True)])
        return scores.tril() @ self.v(x) / x.shape[1]


def test_a_product_of_two_activations_is_over_what_is_left() -> None:
    model = Net(Gated(), Linear())
    discovery = discover(model)
    group = next(
        group
        for group in discovery.groups
        if any((member.tensor, member.dim) == ("bodies.1.q.weight", 0) for member in group.members)
    )
    prune_(model, discovery, {group.name: np.arange(3)})
    assert model.bodies[1].q.weight.shape == (5, HIDDEN)


def test_stand_ins_of_streamed_weights_are_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # As after a model whose code writes into parameters of these names.
    monkeypatch.setattr(scenes, "_written", {"weight", "scale"})
    model = nn.Linear(4, 3)
    model.weight.data = torch.zeros(1, 1).expand(3, 4)  # one value that stands for all
    model.scale = nn.Parameter(torch.ones(3))
    with torch.no_grad(), scenes.unwritten(model):
        model.scale.fill_(2.0)
    assert model.weight.stride() == (0, 0)
    assert model.scale.tolist() == [1.0, 1.0, 1.0]
