"""Squares of gradients of samples that go through a block together: each sample's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import tiny_model
from llm_pruner.importance import Criterion, boundary_pass, score, taylor
from llm_pruner.models.blockwise import NotBlockwise
from llm_pruner.types import Discovery, Group, Member

WIDTH = 6
SPECIAL = 50.0
ORDERS = ("second", "mixed")


class Block(nn.Module):
    """A linear module between others, used in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        if way == "shared":
            self.second.weight = self.first.weight
        if way == "subclass":
            self.second = Scaled(WIDTH, WIDTH, bias=False)
        if way == "hooked":
            self.second.register_forward_hook(lambda _m, _a, output: output * 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.first(hidden)
        if self.way == "written over":
            inner = inner.mul_(3.0)
        if self.way == "input written over":
            given = torch.tanh(hidden)
            inner = inner + self.second(given)
            given.zero_()
        if self.way == "used elsewhere":
            inner = inner @ self.first.weight
        if self.way == "time first":
            return hidden + self.second(inner.tanh().transpose(0, 1)).transpose(0, 1)
        if self.way == "flat":
            return hidden + self.second(inner.tanh().flatten(0, 1)).view_as(hidden)
        if self.way == "called by some":
            chosen = hidden[..., 0] > SPECIAL / 2
            out = hidden + inner.tanh()
            if not bool(chosen.any()):
                return out
            return out.masked_scatter(chosen[..., None], out[chosen] + self.second(out[chosen]))
        if self.way == "by keyword":
            return hidden + self.second(input=inner.tanh())
        if self.way == "twice":
            inner = self.first(inner.tanh())
        return hidden + self.second(inner.tanh())


class Scaled(nn.Linear):
    """Does more than multiply."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.tanh())


class Chained(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        with torch.no_grad():
            self.embedding.weight[19, 0] = SPECIAL
        self.layers = nn.ModuleList(Block(way) for _ in range(2))
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def groups_of(model: nn.Module, names: list[str]) -> Discovery:
    """Return a group of each tensor's first axis."""
    groups = []
    for name in names:
        size = model.get_parameter(name).shape[0]
        member = Member(name, 0, np.arange(size)[:, None], 0)
        groups.append(Group(name, "other", None, size, (member,)))
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    return Discovery(tuple(groups), frozen=(), shapes=shapes, buffers={}, aliases={})


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets how many samples went through a block, call for call."""
    found: list[int] = []
    real = boundary_pass._BlockPass._block

    def block(self: Any, index: int, part: slice, *rest: Any) -> None:
        found.append(part.stop - part.start)
        real(self, index, part, *rest)

    monkeypatch.setattr(boundary_pass._BlockPass, "_block", block)
    return found


def alone(
    model: nn.Module, discovery: Discovery, order: str, ids: torch.Tensor, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return the scores found by running the whole model on one sample at a time."""

    def refuse(*_: Any) -> Any:
        raise NotBlockwise("asked to")

    with patch.context() as here:
        here.setattr(taylor, "find_chain", refuse)
        return score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)


@pytest.mark.parametrize("tile", [2**20, 40])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "phi3"])
@pytest.mark.parametrize("order", ORDERS)
def test_linear_modules_of_models_take_samples_together(
    model_type: str, order: str, tile: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Conv1D``, which holds its weight the other way round, and biases among them."""
    monkeypatch.setattr(taylor, "_TILE", tile)
    model = tiny_model(model_type, num_hidden_layers=2).double().requires_grad_(False)
    linear = [path for path, one in model.named_modules() if taylor._is_plain(one)]
    inside = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in linear]
    inside = [name for name in inside if "head" not in name]
    assert model_type == "llama" or model_type == "phi3" or any("bias" in one for one in inside)
    discovery = groups_of(model, inside)
    ids = torch.randint(0, 259, (5, 7), generator=torch.Generator().manual_seed(0))
    got = score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)
    assert sizes == [5, 5]
    assert not any(one.requires_grad for one in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    want = alone(model, discovery, order, ids, monkeypatch)
    for name in inside:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("way", "together"),
    [
        *(("plainly", True), ("twice", True)),
        *((way, False) for way in ("written over", "used elsewhere", "time first", "flat")),
        *((way, False) for way in ("by keyword", "shared", "subclass", "hooked")),
        ("called by some", False),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_what_does_not_show_each_samples_gradient_takes_one_at_a_time(
    way: str, together: bool, order: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Chained(way).double().requires_grad_(False)
    names = [f"layers.{at}.{one}" for at in (0, 1) for one in ("first.weight", "first.bias")]
    names += [f"layers.{at}.second.weight" for at in (0, 1)]
    discovery = groups_of(model, names)
    ids = torch.randint(0, 19, (5, 7))
    ids[3, 2] = 19  # which no other sample has
    got = score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)
    assert sizes == ([5, 5] if together else [1] * 10)
    want = alone(model, discovery, order, ids, monkeypatch)
    for name in names:
        assert want[name].min() > 0
        np.testing.assert_allclose(got[name], want[name], rtol=1e-9)


def test_an_input_that_is_written_over_is_no_gradient_of_anything() -> None:
    """What autograd refuses to differentiate is not differentiated by hand."""
    model = Chained("input written over").requires_grad_(False)
    discovery = groups_of(model, ["layers.0.second.weight"])
    ids = torch.randint(0, 20, (5, 7))
    with pytest.raises(RuntimeError, match="inplace operation"):
        score(model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0)


def test_a_block_with_other_parameters_takes_one_sample_at_a_time(sizes: list[int]) -> None:
    """A norm's scale has no rows of its own; the blocks beside it are not held up."""
    model = tiny_model(num_hidden_layers=2).requires_grad_(False)
    names = [f"model.layers.{at}.mlp.up_proj.weight" for at in (0, 1)]
    discovery = groups_of(model, [*names, "model.layers.0.input_layernorm.weight"])
    ids = torch.randint(0, 259, (5, 7))
    score(model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0)
    assert sizes == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("order", "wanted"), [("first", [5, 5]), ("second", [5, *[1] * 5])])
def test_samples_go_together_where_no_square_is_wanted(
    order: str, wanted: list[int], sizes: list[int]
) -> None:
    """First order needs no sample of its own, nor does a block of which nothing is scored."""
    model = Chained("used elsewhere").requires_grad_(False)
    discovery = groups_of(model, ["layers.0.first.weight"])
    ids = torch.randint(0, 20, (5, 7))
    score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)
    assert sizes == wanted
