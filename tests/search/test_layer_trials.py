"""What each layer costs, by trial removals of one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import fresh
from helpers import tiny_model, tiny_tokenizer
from llm_pruner import discover
from llm_pruner.models.load import load_model
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.planning import Numbering, Selection, Target, allocate
from llm_pruner.planning.candidates import find_candidates
from llm_pruner.search import layer_trials
from llm_pruner.search.divergence import DivergenceMeter, divergences
from llm_pruner.search.layer_trials import (
    Damage,
    allocate_by_damage,
    by_damage,
    measure_layers,
)
from llm_pruner.surgery.cut import cut_copy
from llm_pruner.types import Discovery, Scores


def tokens(samples: int = 4, length: int = 64) -> torch.Tensor:
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(1))


def random_scores(discovery: Discovery) -> Scores:
    generator = np.random.default_rng(0)
    return {group.name: generator.random(group.size) for group in discovery.groups}


def test_slopes_rise_and_pass_over_a_point_that_lies_too_high() -> None:
    assert Damage((4, 8), (1.0, 4.0)).slopes(8) == pytest.approx(
        [0.25, 0.25, 0.3125, 0.4375, 0.5625, 0.6875, 0.75, 0.75]
    )
    # From 0 to 3 at 8, in one line below the point at 4.
    assert Damage((4, 8), (2.0, 3.0)).slopes(8) == pytest.approx([3 / 8] * 8)
    # What was not tried is taken to do twice the damage of the largest that was.
    assert Damage((4,), (1.0,)).slopes(5)[-1] == pytest.approx(1.0)
    # Less than nothing, as noise gives, is nothing.
    assert Damage((4, 8), (-0.1, 1.0)).slopes(8).min() == 0


@pytest.mark.parametrize(
    ("samples", "length", "judged"),
    [(128, 16, 1024), (32, 64, 1024), (16, 32, 512), (4, 512, 1024), (2, 1024, 1024)],
)
def test_trials_are_judged_on_as_many_tokens_as_there_are(
    samples: int, length: int, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=1024), []
    discovery, held_out = discover(model), tokens(samples, length)
    real = layer_trials.DivergenceMeter

    def noted(model: Any, ids: torch.Tensor) -> Any:
        seen.append(ids)
        return real(model, ids)

    monkeypatch.setattr(layer_trials, "DivergenceMeter", noted)
    asked = random_scores(discovery), Selection(("ffn",)), Numbering.dense(discovery)
    measure_layers(model, discovery, *asked, held_out)
    assert [ids.numel() for ids in seen] == [judged]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_new"])
def test_the_damage_is_that_of_the_model_without_the_units(name: str) -> None:
    model, discovery = fresh(name)
    held_out = tokens()
    scores, numbering = random_scores(discovery), Numbering.dense(discovery)
    selection = Selection(("heads", "ffn"), scope="global")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure_layers(model, discovery, scores, selection, numbering, held_out)
    candidates = find_candidates(discovery, scores, selection, numbering)
    movable = [one for one in candidates.all if len(one.counts) > 1]
    assert list(found) == [one.group.name for one in movable]
    meter = DivergenceMeter(model, held_out)
    for one in movable:
        damage = found[one.group.name]
        for count, divergence in zip(damage.steps, damage.divergence, strict=True):
            removal = candidates.removal({one.group.name: count})
            cut = meter.of(cut_copy(model, discovery, removal))
            assert divergence == pytest.approx(cut, rel=1e-3, abs=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_read_block_by_block_the_damage_is_the_same(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = []
    for memory in (None, 1000):
        model = load_model(str(tmp_path), memory=memory).model
        assert is_model_streamed(model) == (memory is not None)
        discovery = discover(model)
        scores, numbering = random_scores(discovery), Numbering.dense(discovery)
        asked = discovery, scores, Selection(("ffn",), scope="global"), numbering
        found.append(measure_layers(model, *asked, tokens()))
    resident, streamed = found
    assert resident.keys() == streamed.keys()
    for name, damage in resident.items():
        assert streamed[name].divergence == pytest.approx(damage.divergence, rel=1e-5, abs=1e-8)


def test_a_layer_that_costs_more_is_spared() -> None:
    model, discovery = fresh("llama")
    held_out = tokens()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(20)
    numbering, target = Numbering.dense(discovery), Target(ratio=0.06)
    selection = Selection(("ffn",), scope="global", spread=2.0)
    scores = random_scores(discovery)
    # Scores that send the cut to the very layer.
    scores["layers.1.ffn"] = scores["layers.1.ffn"] * 1e-3
    asked = discovery, scores, selection
    damage = measure_layers(model, *asked, numbering, held_out)
    removal = allocate_by_damage(model, *asked, target, numbering, None, damage, held_out)
    sizes = {name: len(units) for name, units in removal.items()}
    by_scores = allocate(*asked, target, numbering)
    assert len(by_scores["layers.1.ffn"]) > len(by_scores["layers.2.ffn"])
    assert sizes["layers.1.ffn"] < sizes["layers.2.ffn"]
    # The units of a layer go in the order of the scores.
    for name, count in sizes.items():
        assert removal[name].tolist() == sorted(np.argsort(scores[name])[:count].tolist())


def test_the_scores_decide_if_their_model_is_nearer() -> None:
    model, discovery = fresh("llama")
    held_out, scores = tokens(), random_scores(discovery)
    numbering, target = Numbering.dense(discovery), Target(ratio=0.1)
    selection = Selection(("ffn",), scope="global", spread=3.0)
    asked = discovery, scores, selection
    # Damage that is not so: the first layer is free, the others are dear.
    steps = (8, 16)
    wrong = {
        group.name: Damage(steps, (0.0, 0.0) if group.layer == 0 else (1.0, 9.0))
        for group in discovery.groups
        if group.kind == "ffn"
    }
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(50)
    removal = allocate_by_damage(model, *asked, target, numbering, None, wrong, held_out)
    by_scores = allocate(*asked, target, numbering)
    by_trials = allocate(
        discovery, by_damage(*asked, numbering, wrong), selection, target, numbering
    )
    near, far = divergences(
        model, [cut_copy(model, discovery, one) for one in (by_scores, by_trials)], held_out
    )
    assert near < far
    assert {name: units.tolist() for name, units in removal.items()} == {
        name: units.tolist() for name, units in by_scores.items()
    }


def test_what_is_known_is_not_tried_again_and_too_many_groups_are_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, discovery = fresh("llama")
    scores, numbering = random_scores(discovery), Numbering.dense(discovery)
    both = discovery, scores, Selection(("heads", "ffn"), scope="global"), numbering
    ffn = discovery, scores, Selection(("ffn",), scope="global"), numbering
    first = measure_layers(model, *ffn, tokens())
    ran: list[int] = []
    with model.model.layers[-1].register_forward_hook(lambda *_: ran.append(1)):
        assert measure_layers(model, *ffn, tokens(), first) == first
        assert ran == []
        found = measure_layers(model, *both, tokens(), first)
        assert ran
    assert found.keys() > first.keys()
    assert all(found[name] is damage for name, damage in first.items())
    monkeypatch.setattr(layer_trials, "MOST", 2)
    assert measure_layers(model, *ffn, tokens()) == {}


def test_trials_begin_at_their_layer() -> None:
    model, discovery = fresh("llama")
    scores, numbering = random_scores(discovery), Numbering.dense(discovery)
    asked = discovery, scores, Selection(("ffn",), scope="global"), numbering
    ran: dict[int, int] = {}
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(
            lambda *_, number=number: ran.update({number: ran.get(number, 0) + 1})
        )
    measure_layers(model, *asked, tokens())
    assert ran[0] < ran[1] < ran[2]


def test_units_of_infinite_importance_stay_what_they_are() -> None:
    _, discovery = fresh("llama")
    scores, numbering = random_scores(discovery), Numbering.dense(discovery)
    selection = Selection(("ffn",), scope="global")
    damage = {group.name: Damage((8,), (1.0,)) for group in discovery.groups if group.kind == "ffn"}
    scores["layers.0.ffn"][:5] = np.inf
    scores["hidden"][1] = np.inf
    found = by_damage(discovery, scores, selection, numbering, damage)
    assert np.flatnonzero(np.isinf(found["layers.0.ffn"])).tolist() == [0, 1, 2, 3, 4]
    assert found["hidden"].argsort().tolist() == scores["hidden"].argsort().tolist()
    assert found["hidden"][0] > 0
    removal = allocate(discovery, found, selection, Target(ratio=0.2), numbering)
    assert min(removal["layers.0.ffn"]) > 4
