"""The criterion reap: what a router sends to each expert, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from command import done, run, write_text
from families import discovered, make
from helpers import tiny_model, tiny_tokenizer
from llm_pruner import Criterion, score
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.types import Discovery

IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def experts(discovery: Discovery) -> list[str]:
    return [g.name for g in discovery.groups if g.kind == "experts" and g.frozen is None]


def test_the_value_is_the_formula() -> None:
    model, discovery = discovered("mixtral")
    seen: dict[str, Any] = {}
    layer: Any = model.get_submodule("model.layers.1.mlp.experts")
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.update(args=args))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    hidden, index, weights = seen["args"]
    gate_up, downs = layer.gate_up_proj.detach(), layer.down_proj.detach()
    expected = []
    for expert in range(4):
        values = []
        for token, place in zip(*torch.where(index == expert), strict=True):
            gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2)
            output = F.linear(F.silu(gate) * up, downs[expert])
            values.append(float(weights[token, place] * output.norm()))
        expected.append(np.mean(values) if values else 0.0)
    names = experts(discovery)
    found = score(model, discovery, Criterion("reap"), input_ids=IDS, seed=0, groups=names)
    np.testing.assert_allclose(found["layers.1.experts"], expected, rtol=1e-4)
    assert max(expected) > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_every_mixture_is_scored_and_left_as_it_was(family: str) -> None:
    model, discovery = discovered(family)
    names = experts(discovery)
    with torch.no_grad():
        before = model(IDS).logits
        found = score(model, discovery, Criterion("reap"), input_ids=IDS, seed=0, groups=names)
        assert torch.equal(model(IDS).logits, before)
    assert list(found) == names
    assert all(np.isfinite(values).all() and values.max() > 0 for values in found.values())


def test_an_expert_that_no_token_is_sent_to_is_worth_nothing() -> None:
    model = make("mixtral")
    gate: Any = model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        gate.weight[2] = 0
        gate.weight[[0, 1]] = gate.weight[[0, 1]].abs() + 1
    hidden_is_positive: Any = model.get_submodule("model.layers.0.post_attention_layernorm")
    hidden_is_positive.register_forward_hook(lambda _m, _a, output: output.abs())
    discovery = discover(make("mixtral"))
    names = experts(discovery)
    found = score(model, discovery, Criterion("reap"), input_ids=IDS, seed=0, groups=names)
    assert found["layers.0.experts"][2] == 0
    assert found["layers.0.experts"][:2].min() > 0


def test_other_structures_are_refused() -> None:
    model, discovery = discovered("mixtral")
    with pytest.raises(UserError, match="criterion 'reap' scores experts and not"):
        score(model, discovery, Criterion("reap"), input_ids=IDS, seed=0)


def test_experts_called_otherwise_are_refused() -> None:
    model, discovery = discovered("mixtral")
    names = experts(discovery)
    layer: Any = model.get_submodule("model.layers.0.mlp.experts")
    plain = layer.forward
    layer.forward = lambda hidden, index, weights, scale=1.0: plain(hidden, index, weights) * scale
    mixture: Any = model.get_submodule("model.layers.0.mlp")
    handle = mixture.experts.register_forward_pre_hook(lambda _m, args: (*args, 1.0), prepend=True)
    try:
        with pytest.raises(UserError, match="not called with the indices and weights"):
            score(model, discovery, Criterion("reap"), input_ids=IDS, seed=0, groups=names)
    finally:
        handle.remove()
        del layer.forward


def test_by_command(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    tiny_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given = ("--structures", "experts", "--criterion", "reap", "--unit-ratio", 0.25)
    given += ("--calibration", write_text(tmp_path / "text.txt"), "--samples", 4, "--seq-len", 32)
    given += ("--protect-first", 0, "--protect-last", 0)
    assert "3 of 4" in done("prune", folder, "--out", tmp_path / "out", *given).out
    refused = run("prune", folder, "--out", tmp_path / "no", *given[2:], "--structures", "ffn")
    assert refused.code == 2
    assert "choose another criterion or other structures" in refused.err
