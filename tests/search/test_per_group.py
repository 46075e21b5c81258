"""Measured damage: levels, the ranking that follows from them, and trials that resume."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from families import make
from helpers import tiny_model
from llm_pruner import Criterion, Selection, Target, allocate, discover, score
from llm_pruner.errors import UserError
from llm_pruner.planning import Level, Survivors, trial_removals
from llm_pruner.planning.measured import damage_by_step
from llm_pruner.search.divergence import Judge, divergences
from llm_pruner.search.per_group import measure_levels


def tokens(samples: int, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(1))


def test_damage_is_laid_out_by_importance_between_levels() -> None:
    importance = np.array([1.0, 3.0, 4.0, 6.0, 8.0])
    costs = damage_by_step(importance, [(2, 0.4), (4, 2.4)])
    # The first two steps cost 0.4 as 1 : 3, the next two 2 as 4 : 6, the last one goes on so.
    np.testing.assert_allclose(costs, [0.1, 0.3, 0.8, 1.2, 1.6], rtol=0.01)
    assert costs[:2].sum() == pytest.approx(0.4)
    assert costs[2:4].sum() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("importance", "points"),
    [
        ([0.0, 0.0, 0.0], [(3, 0.3)]),
        ([-1.0, 0.0, 2.0], [(1, 0.2), (2, 0.1)]),  # measured damage may fall by chance
        ([1.0, np.inf, np.nan], [(2, 0.2)]),
    ],
)
def test_every_step_has_a_finite_cost_and_they_ascend(
    importance: list[float], points: list[tuple[int, float]]
) -> None:
    costs = damage_by_step(np.array(importance), points)
    assert np.isfinite(costs).all()
    assert (np.diff(costs) >= 0).all()
    assert costs[0] >= 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_a_trial_that_resumes_measures_the_same(family: str) -> None:
    model = make(family)
    discovery = discover(model)
    held_out = tokens(2)
    whole, part = Judge(model, held_out), Judge(model, held_out, resume=True)
    before = copy.deepcopy(model.state_dict())
    found = {}
    for group in discovery.groups:
        if group.kind in ("heads", "ffn") and group.frozen is None and group.layer is not None:
            removal = {group.name: np.arange(group.multiple)}
            one, other = (judge.of_removal(discovery, removal) for judge in (whole, part))
            assert one == pytest.approx(other, rel=1e-3, abs=1e-7)
            found[group.name] = one
    part.close()
    assert len({group.split(".")[1] for group in found}) > 1
    assert max(found.values()) > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sample_by_sample_the_divergence_is_the_same() -> None:
    dense, other, held_out = make("llama"), make("llama", seed=1), tokens(3)
    judge = Judge(dense, held_out)
    found = divergences(dense, (dense, other), held_out)
    assert found == pytest.approx([judge.of(dense), judge.of(other)], rel=1e-5, abs=1e-7)
    assert found[1] > 10 * abs(found[0])


def test_the_ranking_follows_what_was_measured_and_not_the_scale_of_scores() -> None:
    model = tiny_model()
    discovery = discover(model)
    selection = Selection(("heads", "ffn"), scope="measured")
    survivors = Survivors.dense(discovery)
    # Layer 0 says that its units are worthless, and is worth the most.
    scores = {g.name: np.arange(1.0, g.size + 1) for g in discovery.groups}
    for group in discovery.groups:
        if group.layer == 0:
            scores[group.name] = scores[group.name] * 1e-9
    levels = [
        Level(name, steps, steps * (5.0 if ".0." in f".{name}." else 1.0))
        for name, steps, _ in trial_removals(discovery, scores, selection, survivors)
    ]
    target = Target(ratio=0.1)
    removal = allocate(discovery, scores, selection, target, levels=levels)
    layers = {group.name: group.layer for group in discovery.groups}
    assert {layers[name] for name in removal}
    assert 0 not in {layers[name] for name in removal}
    plain = allocate(discovery, scores, Selection(("heads", "ffn"), scope="global"), target)
    assert 0 in {layers[name] for name in plain}
    with pytest.raises(UserError, match="nothing was measured of"):
        allocate(discovery, scores, selection, target)


def test_measured_levels_find_the_layer_that_matters() -> None:
    """A layer whose FFN is scaled up is where the damage is, whatever the criterion says."""
    torch.manual_seed(0)
    model = tiny_model()
    downs = [m for n, m in model.named_modules() if n.endswith("down_proj")]
    with torch.no_grad():
        for at, down in enumerate(downs):
            assert isinstance(down, nn.Linear)
            down.weight.mul_(20.0 if at == 1 else 1.0)
    discovery = discover(model)
    selection = Selection(("ffn",), scope="measured")
    scores = score(model, discovery, Criterion("random"), input_ids=None, seed=0)
    survivors = Survivors.dense(discovery)
    levels = measure_levels(model, discovery, scores, selection, survivors, tokens(2))
    assert {level.group for level in levels} == {
        group.name for group in discovery.groups if group.kind == "ffn"
    }
    removal = allocate(discovery, scores, selection, Target(ratio=0.1), levels=levels)
    by_layer = {
        group.layer: len(removal.get(group.name, ()))
        for group in discovery.groups
        if group.kind == "ffn"
    }
    assert by_layer[1] == min(by_layer.values())
    assert by_layer[1] < max(by_layer.values())
