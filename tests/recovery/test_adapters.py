"""Adapters computed as one operation: the same values and gradients as PEFT's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import tiny_model
from llm_pruner.recovery.kernels.adapters import fused_adapters


def adapted(kind: str = "llama", **options: Any) -> Any:
    """Return a model with adapters that do something."""
    model = tiny_model(kind)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1, generator=generator)
    return model.train()


def gradients(model: Any, *, fused: bool, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Return the logits, and the gradient of each weight that is trained."""
    dtype = torch.bfloat16 if bf16 else None
    ids = torch.arange(3, 25).view(2, 11)
    model.zero_grad()
    with fused_adapters(model, dtype) if fused else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.float().logsumexp(-1).pow(2).mean().backward()
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    return {"logits": logits.detach().float(), **found}


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a tensor, as a share of its norm."""
    assert found.keys() == wanted.keys()
    assert len(found) > 10
    return max(float((found[n] - one).norm() / one.norm()) for n, one in wanted.items())


def count_fused(model: Any) -> int:
    """Return the number of layers that are computed as one operation."""
    with fused_adapters(model):
        count = sum("forward" in vars(one) for one in model.modules())
    assert not any("forward" in vars(one) for one in model.modules())
    return count


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_values_and_gradients_are_those_of_peft(kind: str) -> None:
    model = adapted(kind)
    assert count_fused(model) >= 8
    wanted = gradients(model, fused=False)
    assert distance(gradients(model, fused=True), wanted) < 1e-5


def test_in_bfloat16_rounding_is_no_worse() -> None:
    model = adapted()
    exact = gradients(model, fused=False)
    found, usual = (gradients(model, fused=fused, bf16=True) for fused in (True, False))
    assert 1e-4 < distance(found, exact) < 1.5 * distance(usual, exact)


def test_weights_that_would_take_too_much_memory_are_rounded_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    kept = gradients(model, fused=True, bf16=True)
    monkeypatch.setattr("llm_pruner.recovery.kernels.adapters._SHARE", 0.0)
    anew = gradients(model, fused=True, bf16=True)
    assert all(torch.equal(anew[name], one) for name, one in kept.items())


def test_other_adapters_are_left_alone() -> None:
    assert count_fused(adapted(use_dora=True)) == 0
    assert count_fused(adapted(lora_dropout=0.1)) == 0
    model = adapted()
    everything = count_fused(model)
    first = next(one for one in model.modules() if hasattr(one, "base_layer"))
    first.base_layer.register_forward_hook(lambda *_: None)
    assert count_fused(model) == everything - 1
    with model.disable_adapter(), fused_adapters(model):
        found = model(input_ids=torch.arange(5)[None]).logits
    with model.disable_adapter():
        assert torch.equal(found, model(input_ids=torch.arange(5)[None]).logits)
