"""The check that a pruned model has to pass before it may be saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from families import discovered
from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import VerificationError
from llm_pruner.models.layers import own_copy, sharing_copy
from llm_pruner.models.streaming import is_model_streamed, stream_
from llm_pruner.runtime.precision import exact_products
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import ModelSettings
from llm_pruner.surgery import cut as surgery
from llm_pruner.surgery import pruner, verify
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import (
    cut_verified_,
    find_culprits,
    largest_difference,
    prune_,
    require_same,
    tolerance,
)
from llm_pruner.types import Discovery, IntArray, Removal
from nets import Body, Net
from removals import pick


def sabotaged(discovery: Discovery, name: str, order: Any = slice(None, None, -1)) -> Discovery:
    """Return a discovery in which the last member of a group holds the wrong positions."""
    group = discovery.group(name)
    wrong = replace(group.members[-1], index=group.members[-1].index[order])
    changed = replace(group, members=(*group.members[:-1], wrong))
    return replace(
        discovery,
        groups=tuple(changed if other.name == name else other for other in discovery.groups),
    )


def check(model: nn.Module, removal: Removal, wrong: Discovery) -> float:
    smaller = copy.deepcopy(model)
    before = [(name, tensor, tensor.clone()) for name, tensor in smaller.named_parameters()]
    try:
        return cut_verified_(smaller, wrong, removal)[1].difference
    except VerificationError:
        # What is refused leaves the model as it was, to the same tensors.
        after = dict(smaller.named_parameters())
        assert len(after) == len(before)
        for name, tensor, value in before:
            assert after[name] is tensor
            assert torch.equal(tensor, value)
        raise


def test_right_surgery_passes() -> None:
    model, discovery = discovered("llama")
    assert 0 < check(model, pick(discovery), discovery) < 1e-5


@pytest.mark.parametrize("name", ["hidden", "layers.1.ffn", "layers.2.heads"])
def test_wrong_surgery_is_refused_and_named(name: str) -> None:
    model, discovery = discovered("llama")
    removal = pick(discovery, ("hidden", "ffn", "heads"))
    wrong = sabotaged(discovery, name)
    # The twin works from the same wrong members, as if discovery itself
    # were wrong: surgery still removes other positions than the rest of the group expects.
    with pytest.raises(VerificationError) as caught:
        check(model, removal, wrong)
    message = str(caught.value)
    assert f"at fault: {discovery.group(name).kind}; nothing was saved" in message
    assert "--structures" in message


def test_bound_groups_are_named_together() -> None:
    model, discovery = discovered("gpt2")
    removal = pick(discovery, ("head_dim", "ffn"))
    wrong = sabotaged(discovery, "layers.1.value_dim")
    culprits = find_culprits(model, wrong, removal, discovery.graph.scenes[0])
    assert culprits == ["head_dim", "value_dim"]


def test_query_heads_are_tried_with_the_heads_that_share_them() -> None:
    model, discovery = discovered("llama")
    removal: dict[str, IntArray] = {}
    for layer in range(2):
        query = discovery.group(f"layers.{layer}.query_heads")
        assert query.blocks is not None
        # The first key-value head goes with its query heads, of the others one each.
        _, first = np.unique(query.blocks, return_index=True)
        removal |= {query.name: first[1:], f"layers.{layer}.heads": np.array([0])}
        removal[f"layers.{layer}.ffn"] = np.array([0, 3])
    shared = discovery.group("layers.0.query_heads").size // discovery.group("layers.0.heads").size
    another = np.arange(discovery.group("layers.0.query_heads").size).reshape(-1, shared)[:, ::-1]
    wrong = sabotaged(discovery, "layers.0.query_heads", another.ravel())
    culprits = find_culprits(model, wrong, removal, discovery.graph.scenes[0])
    assert culprits == ["heads", "query_heads"]


def test_values_that_are_not_finite_never_pass() -> None:
    for bad in (float("nan"), float("inf")):
        logits = [torch.tensor([[[1.0, bad]]])]
        assert largest_difference(logits, [torch.ones(1, 1, 2)]) == float("inf")
    with pytest.raises(ValueError, match="longer"):
        largest_difference([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_tolerance_follows_size_and_precision() -> None:
    assert tolerance([torch.tensor([0.5])]) == 1e-5
    assert tolerance([torch.tensor([0.5]), torch.tensor([-300.0])]) == pytest.approx(3e-3)
    assert tolerance([torch.tensor([0.5], dtype=torch.float64)]) == 1e-5
    assert tolerance([torch.tensor([2.0], dtype=torch.bfloat16)]) == pytest.approx(0.5)
    deep = nn.Sequential(nn.ModuleList(nn.Linear(1, 1) for _ in range(32)))
    assert tolerance([torch.tensor([0.5])], deep) == pytest.approx(2e-5)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "mixtral"])
def test_twin_leaves_the_model_as_it_was(name: str) -> None:
    model, discovery = discovered(name)
    before = copy.deepcopy(model.state_dict())
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    logits = pruned_logits(model, discovery)
    for removal in (pick(discovery), pick(discovery, seed=5)):
        twin_logits(model, discovery, removal)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key]), key
    assert not any(module._forward_hooks for module in model.modules())
    for one, other in zip(logits, pruned_logits(model, discovery), strict=True):
        assert torch.equal(one, other)


def test_given_tokens_are_used() -> None:
    model, discovery = discovered("llama")
    removal = pick(discovery, ("ffn",))
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    expected = twin_logits(model, discovery, removal, tokens)
    assert [tensor.shape for tensor in expected] == [(1, 4, 100), (1, 1, 100)]
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    assert largest_difference(expected, pruned_logits(smaller, discovery, tokens)) <= 1e-5


def test_in_half_precision() -> None:
    model, discovery = discovered("llama")
    model = copy.deepcopy(model).to(torch.bfloat16)
    discovery = discover(model)
    assert check(model, pick(discovery), discovery) > 0


@pytest.mark.parametrize("room", [True, False])
def test_what_is_wrong_in_half_precision(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Rounding hides a wrong factor in a model of that type, and not in a wider copy, nor in blocks
    that are wider for their turn."""
    monkeypatch.setattr(verify, "free_bytes", lambda _: 2**40 * room)
    model, _ = discovered("llama")
    model = copy.deepcopy(model).to(torch.bfloat16)
    discovery, other = discover(model), copy.deepcopy(model)
    require_same(model, other, discovery)
    assert {one.dtype for one in (*model.parameters(), *other.parameters())} == {torch.bfloat16}
    other.model.norm.weight.data *= 1.1
    with pytest.raises(VerificationError, match="gives logits that differ by"):
        require_same(model, other, discovery)
    assert {one.dtype for one in (*model.parameters(), *other.parameters())} == {torch.bfloat16}
    net = Net(Body(lambda x: x * (1 + 0.01 * unseen_factor(torch.ones_like(x))))).to(torch.bfloat16)
    with pytest.raises(VerificationError, match="at fault"):
        check(net, {"layers.0.other": np.array([0, 1])}, discover(net))


def test_code_that_runs_in_bfloat16_alone() -> None:
    net = Net(Body(lambda x: torch.relu(x.to(torch.bfloat16)))).to(torch.bfloat16)
    discovery = discover(net)
    (name,) = (g.name for g in discovery.groups if g.kind in ("ffn", "other"))
    assert check(net, {name: np.array([0, 1])}, discovery) < 0.1
    require_same(net, copy.deepcopy(net), discovery)


def test_logits_of_tokens_that_are_never_written() -> None:
    net = Net(Body(torch.relu))
    plain = net.out.forward
    net.out.forward = lambda x: plain(x).index_fill(-1, torch.tensor([3, 4]), -torch.inf)
    discovery = discover(net)
    (name,) = (g.name for g in discovery.groups if g.kind in ("ffn", "other"))
    assert check(net, {name: np.array([0, 1])}, discovery) < 1e-5
    never = torch.tensor([[1.0, -torch.inf]])
    assert largest_difference([never], [never]) == 0
    for odd in (torch.inf, torch.nan, 1.0):
        assert largest_difference([never], [torch.tensor([[1.0, odd]])]) == torch.inf
    assert tolerance([torch.tensor([[3.0, torch.inf, -torch.inf]])]) == pytest.approx(3e-5)


@pytest.mark.parametrize("written", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_large_numbers_that_are_written_hide_nothing(written: float) -> None:
    rows = torch.tensor([[[3.0, written], [-4.0, written]]])
    assert tolerance([rows[:, :1], rows[:, 1:]]) == pytest.approx(4e-5)
    assert verify.difference_beyond_float32([rows], [rows + torch.tensor([1.0, 0.0])]) > 0.9
    for between, wrong in ((torch.relu, False), (unseen_factor, True)):
        net = Net(Body(between))
        plain = net.out.forward
        net.out.forward = lambda x, plain=plain: plain(x).index_fill(
            -1, torch.tensor([3, 4]), written
        )
        discovery = discover(net)
        (name,) = (g.name for g in discovery.groups if g.kind in ("ffn", "other"))
        with pytest.raises(VerificationError, match="at fault") if wrong else nullcontext():
            check(net, {name: np.array([0, 1])}, discovery)


class Tied(nn.Module):
    """Its head is a function that reads the embedding of the model that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = lambda hidden: hidden @ self.embedding.weight.T

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        logits: torch.Tensor = self.head(hidden + self.down(self.up(hidden).relu()))
        return logits


def test_functions_that_a_model_holds_are_copied_with_it() -> None:
    torch.manual_seed(0)
    net = Tied()
    discovery = discover(net)
    (hidden,) = (group for group in discovery.groups if group.kind == "hidden")
    tokens = torch.arange(16)[None]
    copied = own_copy(net)
    cut_verified_(net, discovery, {hidden.name: np.array([0, 3])})
    assert net.embedding.weight.shape == (16, 6)
    before = copied(tokens)
    with torch.no_grad():
        net.embedding.weight.zero_()
    assert torch.equal(copied(tokens), before)
    assert not net(tokens).any()


class Odd(Body):
    """Does something to what is between its layers where a condition holds for it."""

    def __init__(
        self, odd: Callable[[torch.Tensor], torch.Tensor], when: Callable[[Any, torch.Tensor], bool]
    ) -> None:
        super().__init__(torch.relu)
        self.odd, self.when = odd, when

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.between(self.up(x))
        with torch._C.DisableTorchFunction():
            holds = self.when(self, y)
        return self.down(self.odd(y) if holds else y)


def cut_odd(odd: Odd) -> tuple[Net, Discovery, verify.Verified]:
    """Cut a model with such a layer; return it and what is said of it."""
    net = Net(odd)
    discovery = discover(net)
    (name,) = (g.name for g in discovery.groups if g.kind in ("ffn", "other"))
    return net, discovery, cut_verified_(net, discovery, {name: np.array([0, 1])})[1]


def nothing(y: torch.Tensor) -> torch.Tensor:
    return y * torch.nan


def noisy(y: torch.Tensor) -> torch.Tensor:
    return y * torch.rand(())


def test_what_is_not_finite_in_float32_alone_is_a_mistake() -> None:
    with pytest.raises(VerificationError, match="twin by inf"):
        cut_odd(Odd(nothing, lambda _, y: y.shape[-1] < 8 and y.dtype == torch.float32))


def test_what_is_not_finite_in_training_is_not_random() -> None:
    with pytest.raises(VerificationError, match=r"twin by inf .* on training"):
        cut_odd(Odd(nothing, lambda own, y: own.training and y.shape[-1] < 8))


def test_a_dense_model_that_is_not_finite_is_said_to_be() -> None:
    with pytest.raises(VerificationError, match="dense model gives numbers that are not finite on"):
        cut_odd(Odd(nothing, lambda *_: True))


def test_a_model_that_gives_something_else_each_time() -> None:
    with pytest.raises(VerificationError, match="the model gives something else each time"):
        cut_odd(Odd(noisy, lambda *_: True))
    _, _, verified = cut_odd(Odd(noisy, lambda own, _: own.training))
    assert verified.skipped == ("training (random)",)
    assert "8 tokens" in verified.scenes


@pytest.mark.parametrize(("odd", "why"), [(nothing, "not finite"), (noisy, "random")])
def test_what_was_not_compared_is_not_compared_again(odd: Any, why: str) -> None:
    net, discovery, verified = cut_odd(Odd(odd, lambda _, y: y.shape[1] > 60))
    assert verified.skipped == (f"129 tokens ({why})",)
    require_same(net, copy.deepcopy(net), discovery, verified)
    with pytest.raises(VerificationError, match="the saved folder gives logits that differ"):
        require_same(net, copy.deepcopy(net), discovery)


def test_pruned_model_that_cannot_run() -> None:
    model, discovery = discovered("llama")
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(3, 48))
    with pytest.raises(VerificationError, match=r"run on 8 tokens \(.*\); nothing was saved"):
        pruned_logits(broken, discovery)


def unseen_factor(x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        size = x.shape[-1]
    return x * (1.0 / size)


def test_use_of_a_size_that_the_trace_cannot_see() -> None:
    # Where PyTorch is told not to be watched, the comparison is what stops a wrong model.
    net = Net(Body(unseen_factor))
    discovery = discover(net)
    removal = {"layers.0.other": np.array([0, 1])}
    with pytest.raises(VerificationError, match=r"at fault: other; nothing was saved"):
        check(net, removal, discovery)


class Windowed(nn.Module):
    """Attends to a window in code that tracing on a few tokens does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net(Body(lambda x: x))
        self.window = 60

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.inner(tokens)
        if tokens.shape[1] > self.window:
            with torch._C.DisableTorchFunction():
                size = self.inner.bodies[0].up.weight.shape[0]
            logits = logits / size
        return logits


def test_what_only_long_input_shows_is_compared() -> None:
    net = Windowed()
    discovery = discover(net)
    group = next(g for g in discovery.groups if g.kind == "other" and g.frozen is None)
    with pytest.raises(VerificationError, match=r"on 129 tokens; at fault"):
        check(net, {group.name: np.array([0, 1])}, discovery)


@pytest.mark.parametrize("large", [False, True])
def test_what_is_refused_is_undone(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # as of models of which a second one does not fit in memory
        monkeypatch.setattr(surgery, "_BY_PARTS", 0)
    model, discovery = discovered("llama_tied")
    model = copy.deepcopy(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    removal = pick(discovery)
    assert "layers" in removal
    logits = pruned_logits(model, discovery)
    undo = surgery.Undo(model)
    surgery.cut_(model, discovery, removal, undo)
    assert len(model.model.layers) < config["num_hidden_layers"]
    undo()
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for one, other in zip(logits, pruned_logits(model, discovery), strict=True):
        assert torch.equal(one, other)


def test_what_generate_rounds_to_float32_is_no_difference_in_float64() -> None:
    logits = 30 * torch.rand(2, 50, dtype=torch.float64)
    rounded = logits.float()
    other = torch.nextafter(rounded, torch.tensor(torch.inf))
    assert verify.difference_beyond_float32([logits, rounded], [logits, other]) == 0.0
    found = verify.difference_beyond_float32([logits, rounded], [logits + 1e-6, other])
    assert found == pytest.approx(1e-6, rel=1e-3)
    assert verify.difference_beyond_float32([rounded], [other + 1e-3]) > 9e-4
    for odd in (torch.nan, torch.inf):
        wrong = logits.clone()
        wrong[0, 0] = odd
        assert verify.difference_beyond_float32([wrong], [logits]) == torch.inf
        assert verify.difference_beyond_float32([logits], [wrong]) == torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "large", "streamed"])
def test_rounding_is_told_from_a_mistake(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What float32 cannot tell is compared in float64, where only a mistake is left."""
    model, discovery = discovered("llama_tied")
    by_block = kind == "streamed"
    if by_block:
        model = copy.deepcopy(model)
        stream_(model, torch.float32)
        discovery = discover(model)
    if kind == "large":
        monkeypatch.setattr(verify, "free_bytes", lambda _: 0)
    removal = pick(discovery, ("ffn",))
    name = next(iter(removal))
    monkeypatch.setattr(verify, "tolerance", lambda *_: 1e-30)
    with pytest.raises(VerificationError, match="differs from its masked twin"):
        prune_(sharing_copy(model), sabotaged(discovery, name), removal)
    finer = verify._FINER
    monkeypatch.setattr(verify, "_FINER", float("inf"))
    with pytest.raises(VerificationError, match="differs from its masked twin"):
        prune_(sharing_copy(model), discovery, removal)
    monkeypatch.setattr(verify, "_FINER", finer)
    smaller = sharing_copy(model)
    prune_(smaller, discovery, removal)
    assert smaller.num_parameters() < model.num_parameters()
    for one in (model, smaller):
        assert is_model_streamed(one) is by_block
        assert {tensor.dtype for tensor in one.parameters()} == {torch.float32}


def test_products_are_exact_where_models_are_compared() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        model, discovery = tiny_model("llama"), discover(tiny_model("llama"))
        seen: list[str] = []
        handle = model.register_forward_hook(
            lambda *_: seen.append(torch.get_float32_matmul_precision())
        )
        cut_verified_(model, discovery, pick(discovery, ("ffn",)))
        handle.remove()
        assert set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_saved_folder_is_compared_in_the_scenes_of_the_last_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Long input may be shorter or longer once the model is smaller, and has another name.
    dense, first = discovered("llama")
    model = copy.deepcopy(dense)
    surgeon, asked = pruner.Surgeon(model, verify=True, clock=Clock()), list[Any]()
    surgeon.cut(first, pick(first))
    second = discover(model)
    surgeon.cut(second, pick(second))
    monkeypatch.setattr(pruner, "require_same", lambda *given: asked.extend(given))
    monkeypatch.setattr(pruner, "load", lambda *_, **__: SimpleNamespace(model=model))
    surgeon.reload_check(first, ModelSettings(model="dense"), 0)(tmp_path)
    assert asked[2] is second
    assert asked[3] is surgeon.verified
