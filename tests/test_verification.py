"""The check that a pruned model has to pass before it may be saved."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from families import discovered
from llm_pruner.errors import VerificationError
from llm_pruner.groups import discover
from llm_pruner.surgery import prune_
from llm_pruner.types import Discovery, Removal
from llm_pruner.verification import (
    find_culprits,
    largest_difference,
    pruned_logits,
    require_equal,
    tolerance,
    twin_logits,
)
from nets import Body, Net
from removals import bound_to, pick


def sabotaged(discovery: Discovery, name: str) -> Discovery:
    """Return a discovery in which the last member of a group holds the wrong positions."""
    group = discovery.group(name)
    wrong = replace(group.members[-1], index=group.members[-1].index[::-1])
    changed = replace(group, members=(*group.members[:-1], wrong))
    return replace(
        discovery,
        groups=tuple(changed if other.name == name else other for other in discovery.groups),
    )


def check(model: nn.Module, discovery: Discovery, removal: Removal, wrong: Discovery) -> float:
    expected = twin_logits(model, discovery, removal)
    smaller = copy.deepcopy(model)
    prune_(smaller, wrong, removal)
    return require_equal(
        expected, pruned_logits(smaller, wrong), lambda: find_culprits(model, wrong, removal)
    )


def test_right_surgery_passes() -> None:
    model, discovery = discovered("llama")
    assert 0 < check(model, discovery, pick(discovery), discovery) < 1e-5


@pytest.mark.parametrize("name", ["hidden", "layers.1.ffn", "layers.2.heads"])
def test_wrong_surgery_is_refused_and_named(name: str) -> None:
    model, discovery = discovered("llama")
    removal = pick(discovery, ("hidden", "ffn", "heads"))
    wrong = sabotaged(discovery, name)
    # While culprits are sought, the twin works from the same wrong members, as if discovery itself
    # were wrong: surgery still removes other positions than the rest of the group expects.
    with pytest.raises(VerificationError) as caught:
        check(model, discovery, removal, wrong)
    message = str(caught.value)
    assert f"at fault: {name}; nothing was saved" in message
    assert "--structures" in message


def test_bound_groups_are_named_together() -> None:
    model, discovery = discovered("gpt2")
    removal = pick(discovery, ("head_dim", "ffn"))
    name = "layers.1.value_dim"
    wrong = sabotaged(discovery, name)
    culprits = find_culprits(model, wrong, removal)
    assert sorted(culprits) == sorted(bound_to(discovery, discovery.group(name)))


def test_only_in_combination() -> None:
    one, other = [torch.zeros(1, 2, 3)], [torch.ones(1, 2, 3)]
    with pytest.raises(VerificationError, match=r"by 1 \(limit 1e-05\); at fault: only groups in"):
        require_equal(one, other, list)


def test_culprits_are_sought_only_when_needed() -> None:
    def never() -> list[str]:
        raise AssertionError

    same = [torch.full((1, 1, 3), 5.0)]
    assert require_equal(same, [same[0] + 1e-6], never) == pytest.approx(1e-6, rel=0.1)


def test_values_that_are_not_finite_never_pass() -> None:
    for bad in (float("nan"), float("inf")):
        logits = [torch.tensor([[[1.0, bad]]])]
        assert largest_difference(logits, [torch.ones(1, 1, 2)]) == float("inf")
    with pytest.raises(VerificationError):
        require_equal([torch.ones(1, 1, 2)], [torch.full((1, 1, 2), float("nan"))], list)
    with pytest.raises(ValueError, match="longer"):
        largest_difference([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_tolerance_follows_size_and_precision() -> None:
    assert tolerance([torch.tensor([0.5])]) == 1e-5
    assert tolerance([torch.tensor([0.5]), torch.tensor([-300.0])]) == pytest.approx(3e-3)
    assert tolerance([torch.tensor([0.5], dtype=torch.float64)]) == 1e-5
    assert tolerance([torch.tensor([2.0], dtype=torch.bfloat16)]) == pytest.approx(0.5)


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


def test_twin_leaves_the_model_as_it_was_after_an_error() -> None:
    model, discovery = discovered("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        twin_logits(model, discovery, pick(discovery), tokens=torch.full((1, 4), 1000))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_twin_without_removal_is_the_model() -> None:
    model, discovery = discovered("llama")
    assert (
        largest_difference(twin_logits(model, discovery, {}), pruned_logits(model, discovery))
        < 1e-5
    )


def test_given_tokens_are_used() -> None:
    model, discovery = discovered("llama")
    removal = pick(discovery, ("ffn",))
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    expected = twin_logits(model, discovery, removal, tokens)
    assert [tensor.shape for tensor in expected] == [(1, 4, 100), (1, 1, 100)] * 2
    smaller = copy.deepcopy(model)
    prune_(smaller, discovery, removal)
    assert largest_difference(expected, pruned_logits(smaller, discovery, tokens)) <= 1e-5


def test_in_half_precision() -> None:
    model, discovery = discovered("llama")
    model = copy.deepcopy(model).to(torch.bfloat16)
    discovery = discover(model)
    assert check(model, discovery, pick(discovery), discovery) > 0


def test_pruned_model_that_cannot_run() -> None:
    model, discovery = discovered("llama")
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(3, 48))
    with pytest.raises(VerificationError, match=r"cannot run \(.*\); nothing was saved"):
        pruned_logits(broken, discovery)


def test_use_of_a_size_that_the_trace_cannot_see() -> None:
    # Python gives a float on the left no way to ask where the size came from: the trace takes the
    # channels for prunable, and the comparison is what stops a wrong model.
    net = Net(Body(lambda x: x * (1.0 / x.shape[-1])))
    discovery = discover(net)
    removal = {"layers.0.other": np.array([0, 1])}
    with pytest.raises(VerificationError, match=r"at fault: layers\.0\.other; nothing was saved"):
        check(net, discovery, removal, discovery)
