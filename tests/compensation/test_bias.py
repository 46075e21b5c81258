"""Bias compensation: the formula, never worse, and biases that a checkpoint brings back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm_pruner.commands.refitter
from command import done, save_tiny, write_text
from families import make
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.compensation import add_means_
from llm_pruner.discovery.groups import discover
from llm_pruner.models.load import load_model
from llm_pruner.surgery.cut import prune_

TEXT = ("--samples", 16, "--seq-len", 32)


def tokens(samples: int = 12, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 100, (samples, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("family", "group", "consumer"),
    [
        ("llama", "layers.1.ffn", "model.layers.1.mlp.down_proj"),
        ("llama", "layers.0.heads", "model.layers.0.self_attn.o_proj"),
        ("gpt2", "layers.1.ffn", "transformer.h.1.mlp.c_proj"),
    ],
)
def test_a_bias_is_the_mean_of_what_was_removed(family: str, group: str, consumer: str) -> None:
    dense: Any = make(family)
    discovery = discover(dense)
    removal = {group: np.array([0, 2])} if "ffn" in group else {group: np.array([1])}
    pruned = copy.deepcopy(dense)
    prune_(pruned, discovery, removal)
    seen: list[torch.Tensor] = []
    module = dense.get_submodule(consumer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    (found,) = add_means_(pruned, dense, discovery, removal, tokens())
    handle.remove()
    inputs = torch.cat([one.flatten(0, -2) for one in seen])
    weight = module.weight.detach() if family == "llama" else module.weight.detach().T
    (member,) = (m for m in discovery.group(group).members if m.tensor == f"{consumer}.weight")
    lost = member.index[removal[group]].ravel()
    wanted = inputs[:, lost].mean(0) @ weight[:, lost].T
    old = getattr(module, "bias", None)
    actual = pruned.get_submodule(consumer).bias
    torch.testing.assert_close(actual, wanted if old is None else wanted + old)
    assert found.module == consumer
    assert found.biased
    added = inputs[:, lost] @ weight[:, lost].T
    energy = (inputs @ weight.T).square().sum()
    assert found.before == pytest.approx(float(added.square().sum() / energy), rel=1e-4)
    left = (added - added.mean(0)).square().sum() / energy
    assert found.after == pytest.approx(float(left), rel=1e-3)
    assert found.after < found.before


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("structures", ["ffn", "heads,ffn", "ffn,hidden", "ffn,layers"])
def test_what_is_saved_comes_back(
    tmp_path: Path, structures: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_pruner.commands.refitter, "divergences", lambda *_: [0.0, 1.0])
    dense = save_tiny(tmp_path / "dense")
    given = ("--ratio", 0.3, "--criterion", "l2", "--structures", structures, "--steps", steps)
    given = (*given, "--protect-first", 0, "--protect-last", 0, "--split", "equal")
    text = ("--calibration", write_text(tmp_path / "text.txt"), *TEXT)
    result = done(
        "prune", dense, "--out", tmp_path / "out", *given, *text, "--compensation", "bias"
    )
    assert "biases took up the mean in" in result.out
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["compensation"] == "bias"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    biases = [name for name in weights if name.endswith("mlp.down_proj.bias")]
    assert biases
    model: Any = load_model(str(tmp_path / "out")).model
    for name in biases:
        torch.testing.assert_close(model.get_parameter(name).detach(), weights[name])
        assert weights[name].abs().max() > 0
    # And once more, from what was pruned.
    again = ("--ratio", 0.1, "--criterion", "l2", "--structures", "ffn")
    done("prune", tmp_path / "out", "--out", tmp_path / "again", *again)
    kept = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(kept[name], weights[name]) for name in biases)


def test_a_model_that_has_biases_stays_stock(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = ("--calibration", write_text(tmp_path / "text.txt"), *TEXT)
    given = ("--unit-ratio", 0.25, "--structures", "ffn", "--criterion", "l2", "--uniform")
    done(
        *("prune", tmp_path / "dense", "--out", tmp_path / "out", *given, *text),
        *("--compensation", "bias", "--json", tmp_path / "run.json"),
    )
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["saved_as"] == "stock"


def test_no_gain_leaves_the_model_without_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_pruner.commands.refitter, "divergences", lambda *_: [1.0, 0.5])
    dense = save_tiny(tmp_path / "dense")
    text = ("--calibration", write_text(tmp_path / "text.txt"), *TEXT)
    given = ("--ratio", 0.2, "--structures", "ffn", "--criterion", "l2", "--compensation", "bias")
    result = done("prune", dense, "--out", tmp_path / "out", *given, *text)
    assert "compensation was no gain on held-out text" in result.out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in weights if name.endswith("bias")]
