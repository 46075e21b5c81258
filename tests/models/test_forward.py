"""What is put in place of a module's forward pass for a time, and taken away again."""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import tiny_model
from llm_pruner import Taylor, discover, score
from llm_pruner.models.forward import own_forward, own_functions
from removals import cut_as_twin_, pick


def test_own_forward_gives_back_just_what_was_there() -> None:
    plain, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    kept = {"forward": abs, "_original_forward": len}
    vars(replaced).update(kept)
    with own_forward(plain, replaced):
        for one in (plain, replaced):
            one.forward = one._original_forward = print  # as accelerate does
    assert not {*kept} & vars(plain).keys()
    assert {name: vars(replaced)[name] for name in kept} == kept


def _norm_by_a_kernel(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """What no trace follows and gives no gradient, as a kernel for inference."""
    x, weight = hidden_states.detach().numpy(), self.weight.detach().numpy()
    variance = (x**2).mean(-1, keepdims=True)
    return torch.from_numpy(weight * (x / np.sqrt(variance + self.variance_epsilon)))


def with_kernels(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Return a model as transformers loads it on a GPU, kernels of the hub in place of its code."""
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    model = tiny_model("llama")
    vars(model)["_use_kernels"] = True
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            vars(module)["forward"] = MethodType(_norm_by_a_kernel, module)
    return model


def kernels_of(model: PreTrainedModel) -> list[object]:
    found = [vars(module).get("forward") for module in model.modules()]
    return [vars(model)["_use_kernels"], *(one for one in found if one is not None)]


def test_kernels_of_the_hub_change_neither_groups_nor_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = with_kernels(monkeypatch), tiny_model("llama")
    kernels = kernels_of(model)
    assert len(kernels) == 2 + 2 * len(model.model.layers)
    groups, same = discover(model), discover(plain)
    assert [(one.name, one.size, one.frozen) for one in groups.groups] == [
        (one.name, one.size, one.frozen) for one in same.groups
    ]
    tokens = np.arange(24).reshape(2, 12)
    scores, expected = (score(one, groups, Taylor(), tokens) for one in (model, plain))
    for name, values in expected.items():
        np.testing.assert_array_equal(scores[name], values)
    assert kernels_of(model) == kernels
    assert cut_as_twin_(model, groups, pick(groups)) > 1e-3
    left = kernels_of(model)  # a layer went
    assert len(left) == len(kernels) - 2
    assert all(one in kernels for one in left)


def test_a_kernel_in_the_place_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which transformers makes a module of, and modules that call it have beside their own."""

    class Rotation(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    model, function = with_kernels(monkeypatch), Rotation()
    kernel = vars(function)["forward"] = MethodType(lambda _, x: -x.detach(), function)
    for layer in model.model.layers:
        vars(layer.self_attn)["_kernel_funcs"] = {"apply_rotary_pos_emb": function}
    x = torch.ones(1, requires_grad=True)
    with own_functions(model):
        assert function(x).requires_grad
    assert vars(function)["forward"] is kernel


def test_a_kernel_behind_the_forward_pass_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels(monkeypatch)
    norm = model.model.norm
    kernel = vars(norm)["_old_forward"] = vars(norm)["forward"]
    vars(norm)["forward"] = moved = lambda *args: norm._old_forward(*args)
    x = torch.ones(1, norm.weight.numel(), requires_grad=True)
    with own_functions(model):
        assert norm(x).requires_grad
    assert not norm(x).requires_grad
    assert [vars(norm)[name] for name in ("_old_forward", "forward")] == [kernel, moved]


def test_a_forward_pass_of_a_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels(monkeypatch)
    vars(model)["_use_kernels"] = False
    x = torch.ones(1, model.model.norm.weight.numel(), requires_grad=True)
    with own_functions(model):
        assert not model.model.norm(x).requires_grad
