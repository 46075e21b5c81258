"""Repair: training a pruned model by what the dense one says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command import done, save_tiny, write_text
from helpers import tiny_model
from llm_pruner.errors import UserError
from llm_pruner.models.layers import sharing_copy
from llm_pruner.recovery import repair, repair_
from llm_pruner.recovery.methods import blocks
from llm_pruner.search.divergence import divergences
from llm_pruner.settings.recover import TrainingSettings


def text(samples: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 200, (samples, 1), generator=draw)
    return first + torch.arange(32) % 7


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A dense model, and one that shares its weights but for damaged MLPs."""
    dense = tiny_model("llama")
    for layer in dense.model.layers:
        layer.mlp.down_proj.weight.data *= 20  # as much in the hidden state as a trained model's
    damaged = sharing_copy(dense)
    for layer in damaged.model.layers:
        weight = layer.mlp.down_proj.weight.detach().clone()
        weight[:, ::2] = 0
        layer.mlp.down_proj.weight = torch.nn.Parameter(weight)
    return dense, damaged


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a repair end after so many steps, however long they take."""
    settings = repair._settings
    few = lambda *given: settings(*given).but(max_minutes=None).with_trainer(max_steps=20)  # noqa: E731
    monkeypatch.setattr(repair, "_settings", few)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", ["blocks", "lora"])
def test_it_comes_nearer_to_the_dense_model_which_stays(
    pair: tuple[Any, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, damaged = copy.deepcopy(pair)
    monkeypatch.setattr(repair, "method_for", lambda _: method)
    kept = {name: weight.detach().clone() for name, weight in dense.named_parameters()}
    embedding = damaged.get_input_embeddings().weight
    (before,) = divergences(dense, (damaged,), text(4, 9))
    (before_held,) = divergences(dense, (damaged,), text(8, 1))
    found = repair_(damaged, dense, text(64, 0), text(8, 1), minutes=60, seed=0)
    (after,) = divergences(dense, (damaged,), text(4, 9))
    assert found.gained
    assert found.steps == 20
    assert after < 0.9 * before
    assert found.before.loss == pytest.approx(before_held, rel=0.05)  # without the last tokens
    assert all(torch.equal(weight, kept[name]) for name, weight in dense.named_parameters())
    assert damaged.get_input_embeddings().weight is embedding
    assert all(weight.requires_grad for weight in damaged.parameters())
    assert not damaged.training


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_it_leaves_a_model_that_gains_nothing(pair: tuple[Any, Any]) -> None:
    dense, _ = pair
    same = copy.deepcopy(dense)
    weights = [*same.parameters()]
    found = repair_(same, dense, text(64, 0), text(8, 1), minutes=60, seed=0)
    assert not found.gained
    assert all(a is b for a, b in zip(weights, same.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_it_is_judged_as_it_will_be_saved(pair: tuple[Any, Any]) -> None:
    dense, damaged = copy.deepcopy(pair)

    def other_(network: Any) -> None:
        for layer in network.model.layers:
            layer.mlp.down_proj.weight.data.mul_(-9)

    found = repair_(damaged, dense, text(64, 0), text(8, 1), minutes=60, seed=0, as_saved_=other_)
    assert not found.gained


def test_a_weight_of_several_modules_stays_one() -> None:
    model = tiny_model("llama")
    trained = copy.deepcopy(model)
    for one in (model, trained):
        layers = one.model.layers
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    trained.model.layers[0].mlp.up_proj.weight.data += 1
    repair._take_(model, trained)
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert weights[0] is weights[1]
    assert torch.equal(weights[0], trained.model.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
def test_prune_repairs_what_it_saves(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", num_hidden_layers=3)
    source = write_text(tmp_path / "t.txt", 20_000)
    read = ("--calibration", source, "--samples", 16, "--set", "seq_len=32")
    refit = ("--preset", "fast", "--compensation", "least-squares")
    asked = ("--ratio", 0.2, *refit, *read, "--repair-minutes", 0.02)
    out = done("prune", dense, "--out", tmp_path / "small", *asked, "--json", tmp_path / "j").out
    found = json.loads((tmp_path / "j").read_text())
    assert found["repair"]["steps"] >= 1
    assert found["refitted"]  # what came before is told as well
    assert "repair" in found["seconds"]
    assert "on held-out text" in out
    plan = tmp_path / "small" / "plan.json"
    assert "repair" not in plan.read_text()  # it does not say what goes
    done("prune", dense, "--out", tmp_path / "plan", *asked, "--dry-run")
    assert (tmp_path / "plan").read_text() == plan.read_text()
    again = ("--plan", plan, *read, "--repair-minutes", 0.02)
    done("prune", dense, "--out", tmp_path / "again", *again)


def test_a_model_in_half_precision_gets_adapters(pair: tuple[Any, Any]) -> None:
    dense, _ = pair
    assert repair.method_for(dense) == "blocks"
    assert repair.method_for(copy.deepcopy(dense).bfloat16()) == "lora"
    half = copy.deepcopy(dense).bfloat16()
    with pytest.raises(UserError, match="half-precision"):
        blocks.prepare_(half, TrainingSettings(method="blocks"))
