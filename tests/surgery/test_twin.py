"""The pruned model equals its masked twin, in every family and for every kind of structure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from families import FAMILIES, discovered, make
from llm_pruner.discovery.groups import discover
from llm_pruner.discovery.run import forward_with_cache
from llm_pruner.models.layers import sharing_copy
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters, removed_positions
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.types import Discovery, Removal
from removals import bound_to, pick, scenes_apart

CASES = [(name, kind) for name, family in FAMILIES.items() for kind in (*family.kinds, "all")]

Note = Callable[[str, object], None]


_dense: WeakKeyDictionary[nn.Module, list[torch.Tensor]] = WeakKeyDictionary()
"""Logits of dense models, which no test changes."""


def dense_logits(model: nn.Module, discovery: Discovery) -> list[torch.Tensor]:
    """Return the logits of a dense model, which are computed once."""
    if model not in _dense:
        _dense[model] = pruned_logits(model, discovery)
    return _dense[model]


def compare(
    model: nn.Module, discovery: Discovery, removal: Removal, *, scenes: int = 4
) -> tuple[float, float]:
    """Return the largest difference of the pruned model from its twin, and from the dense model.

    Args:
        scenes: how many of the ways of running it are looked at.
    """
    dense = dense_logits(model, discovery)
    assert all(bool(logits.isfinite().all()) for logits in dense)
    graph = discovery.graph
    assert len(graph.scenes) == 4
    seen_in = replace(discovery, graph=replace(graph, scenes=graph.scenes[:scenes]))
    expected = twin_logits(model, seen_in, removal)
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    actual = pruned_logits(smaller, seen_in)
    # Prefill, a cached step, padding twice, generate twice, training.
    assert len(actual) == {1: 2, 4: 7}[scenes]
    dense = dense[: len(actual)]
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    assert parameters == count_parameters(discovery, removal)
    assert parameters < count_parameters(discovery)
    return largest_difference(expected, actual), largest_difference(dense, actual)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_what_must_be_prunable_is(family_name: str) -> None:
    _, discovery = discovered(family_name)
    family = FAMILIES[family_name]
    for kind in family.kinds:
        groups = [group for group in discovery.groups if group.kind == kind]
        assert groups, kind
        frozen = {group.name: group.frozen for group in groups if group.frozen is not None}
        assert set(frozen) <= set(family.fixed), frozen
    for name in family.fixed:
        assert "it stays whole so that others" in str(discovery.group(name).frozen)
    layers = {group.layer for group in discovery.groups if group.kind == family.kinds[1]}
    assert len(layers) > 1 or layers == {None}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.absent])
def test_what_must_be_frozen_is(name: str) -> None:
    _, discovery = discovered(name)
    family = FAMILIES[name]
    assert not {group.kind for group in discovery.groups} & set(family.absent)
    trace = discovery.graph.trace
    for (tensor, dim), reason in family.frozen.items():
        found = trace.atoms.reason(trace.tensors[tensor][dim])
        assert found is not None
        assert reason in found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_pruned_equals_twin(name: str, kind: str, record_property: Note) -> None:
    model, discovery = discovered(name)
    removal = pick(discovery, None if kind == "all" else (kind,))
    if kind == "all":
        kinds = {discovery.group(group).kind for group in removal}
        assert kinds >= set(FAMILIES[name].kinds)
    # All kinds together in every scene, so that what is wrong there shows.
    scenes = 4 if kind == "all" else 1
    difference, change = compare(model, discovery, removal, scenes=scenes)
    record_property("twin", (name, kind, difference))
    assert change > 0.1
    assert difference <= 1e-5


TWO_KINDS_OF_ATTENTION = (
    *("llama", "llama_mqa", "mistral", "qwen3", "gemma3_text", "phi3", "olmo2", "starcoder2"),
    *("gpt2", "gpt_neox", "falcon_new", "opt", "mixtral"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_KINDS_OF_ATTENTION)
def test_both_kinds_of_attention(name: str, record_property: Note) -> None:
    model, discovery = discovered(name, "eager")
    default_model, default = discovered(name)
    assert default_model.config._attn_implementation == "sdpa"  # as it is compared above
    assert {group.name: group.frozen for group in discovery.groups} == {
        group.name: group.frozen for group in default.groups
    }
    difference, change = compare(model, discovery, pick(discovery, seed=1))
    record_property("twin", (name, "eager", difference))
    assert change > 0.1
    assert difference <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "falcon_new"])
def test_traced_with_one_attention_and_used_with_another(name: str) -> None:
    # Each kind of attention reads attributes of its own, and all of them must fit.
    model, discovery = discovered(name)
    assert model.config._attn_implementation == "sdpa"
    removal = pick(discovery, seed=3)
    expected = twin_logits(model, discovery, removal)
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    smaller.set_attn_implementation("eager")
    assert largest_difference(expected, pruned_logits(smaller, discovery)) <= 1e-5


class _Double(TorchFunctionMode):
    """Turns casts to float32 into casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def _in_double(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    with _Double():
        return forward_with_cache(model, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_in_double_precision(name: str, record_property: Note) -> None:
    model = make(name).double()
    discovery = discover(model, forward=_in_double)
    difference, change = compare(model, discovery, pick(discovery))
    record_property("twin", (name, "float64", difference))
    assert change > 0.1
    assert difference <= 1e-9


# ------------------------------------------------------------------------------------------------
# A second oracle, which knows nothing of the trace: units are zeroed in a copy of the model, and
# norms over an axis that lost positions are computed on the rest.


class _OnPart(nn.Module):
    """A norm that is computed on some channels only; the others become zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept
        for name, parameter in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(parameter.detach()[kept]))
        if isinstance(norm, nn.LayerNorm):
            norm.normalized_shape = (len(kept),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        out[..., self.kept] = self.norm(x[..., self.kept])
        return out


def zeroed(model: nn.Module, discovery: Discovery, removal: Removal) -> nn.Module:
    """Return a copy with the members' weights zeroed by index."""
    model = copy.deepcopy(model)
    positions = removed_positions(discovery, removal)
    parameters = dict(model.named_parameters())
    for (name, dim), gone in positions.items():
        if name in parameters:
            parameters[name].data.index_fill_(dim, torch.from_numpy(gone), 0.0)
    for path, module in list(model.named_modules()):
        gone = positions.get((f"{path}.weight", 0))
        if gone is not None and "Norm" in type(module).__name__:
            kept = np.delete(np.arange(len(module.weight)), gone)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _OnPart(module, torch.from_numpy(kept)))
    return model


ZEROED = [
    (name, kind)
    for name in (
        *(
            "llama",
            "llama_biases",
            "llama_tied",
            "mistral",
            "qwen3",
            "gemma3_text",
            "phi3",
            "olmo2",
        ),
        *("gpt2", "gpt_neox", "bloom", "falcon_new", "opt", "mixtral", "deepseek_v3"),
    )
    for kind in FAMILIES[name].kinds
    # A router with zeros still chooses: test_experts has an oracle of its own.
    if kind not in ("layers", "experts")
]


@pytest.mark.parametrize(("name", "kind"), ZEROED)
def test_pruned_equals_zeroed_copy(name: str, kind: str) -> None:
    model, discovery = discovered(name)
    removal = pick(discovery, (kind,), seed=2)
    expected = pruned_logits(zeroed(model, discovery, removal), discovery)
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    assert largest_difference(dense_logits(model, discovery), expected) > 0.1
    assert largest_difference(expected, pruned_logits(smaller, discovery)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_pruned_equals_model_without_the_layer(name: str) -> None:
    model, discovery = discovered(name)
    (group,) = [group for group in discovery.groups if group.kind == "layers"]
    for unit, path in enumerate(group.modules):
        shorter = copy.deepcopy(model)

        def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            source = args[0] if args else kwargs["hidden_states"]
            return (source, *output[1:]) if isinstance(output, tuple) else source

        shorter.get_submodule(path).register_forward_hook(skip, with_kwargs=True)
        smaller = copy.deepcopy(model)
        cut_(smaller, discovery, {group.name: np.array([unit])})
        expected = pruned_logits(shorter, discovery)
        assert largest_difference(expected, dense_logits(model, discovery)) > 0.1
        assert largest_difference(expected, pruned_logits(smaller, discovery)) <= 1e-5


# ------------------------------------------------------------------------------------------------
# Mutation control: a single member whose positions are off by one unit must be noticed.


def rolled(discovery: Discovery, group_name: str, place: int) -> Discovery:
    """Return a discovery in which one member gives each unit the positions of its neighbour."""
    group = discovery.group(group_name)
    member = group.members[place]
    moved = replace(member, index=np.roll(member.index, 1, axis=0))
    members = (*group.members[:place], moved, *group.members[place + 1 :])
    groups = [
        replace(group, members=members) if other.name == group_name else other
        for other in discovery.groups
    ]
    return replace(discovery, groups=tuple(groups))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        # A copy of the rotary frequencies that only a change of their base would read.
        ("llama", "original_inv_freq"),
        ("llama_biases", "original_inv_freq"),
        ("qwen3", "original_inv_freq"),
        ("gemma3_text", "original_inv_freq"),
        ("mixtral", "original_inv_freq"),
        ("gpt2", None),
        # Without a rotation, a bias of the keys adds the same number to all scores of a query, and
        # softmax does not see it. Rotated keys, and biases fused with others, are seen.
        ("opt", "k_proj.bias"),
    ],
)
def test_shifted_member_is_noticed(name: str, unseen: str | None, record_property: Note) -> None:
    model, discovery = discovered(name)
    scenes = scenes_apart(discovery)
    missed, expected_misses, tried = [], [], 0
    for group in discovery.groups:
        removal = pick(discovery, (group.kind,))
        removal = {bound: removal[bound] for bound in bound_to(discovery, group)}
        expected: dict[int, list[torch.Tensor]] = {}
        for place, member in enumerate(group.members):
            smaller = sharing_copy(model)
            cut_(smaller, rolled(discovery, group.name, place), removal)
            tried += 1
            # The first scene that shows it will do.
            for number, scene in enumerate(scenes):
                if number not in expected:
                    expected[number] = twin_logits(model, scene, removal)
                actual = pruned_logits(smaller, scene)
                if not largest_difference(expected[number], actual) <= 1e-4:
                    break
            else:
                missed.append((group.name, member.tensor, member.dim))
            if unseen and member.tensor.endswith(unseen):
                expected_misses.append((group.name, member.tensor, member.dim))
    record_property("mutations", (name, tried, len(missed)))
    assert tried > 20
    assert missed == expected_misses
    assert bool(expected_misses) == bool(unseen)
