"""How far a model is from the dense one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from families import fresh, make
from llm_pruner.evaluation.divergence import compare
from llm_pruner.search.divergence import DivergenceMeter, divergences
from llm_pruner.surgery.cut import cut_, cut_copy


def tokens(samples: int, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(1))


def test_sample_by_sample_the_divergence_is_the_same() -> None:
    dense, other, held_out = make("llama"), make("llama", seed=1), tokens(3)
    meter = DivergenceMeter(dense, held_out)
    found = divergences(dense, (dense, other), held_out)
    assert found == pytest.approx([meter.of(dense), meter.of(other)], rel=1e-5, abs=1e-7)
    assert found[1] > 10 * abs(found[0])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_trial_is_the_pruned_model_and_leaves_the_dense_one(family: str) -> None:
    model, discovery = fresh(family)
    before = copy.deepcopy(model.state_dict())
    meter = DivergenceMeter(model, tokens(2))
    group = next(g for g in discovery.groups if g.kind == "ffn" and g.frozen is None)
    removal = {group.name: np.arange(group.multiple)}
    found = meter.of(cut_copy(model, discovery, removal))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    pruned = copy.deepcopy(model)
    cut_(pruned, discovery, removal)
    assert found == pytest.approx(meter.of(pruned), rel=1e-5)
    assert found > 0


def test_tokens_that_are_never_written_are_no_difference() -> None:
    dense, other, held_out = make("llama"), make("llama", seed=1), tokens(2)
    never = torch.tensor([5, 6])
    for model in (dense, other):
        head = model.lm_head.forward
        model.lm_head.forward = lambda x, head=head: head(x).index_fill(-1, never, -torch.inf)
    found = divergences(dense, (dense, other), held_out)
    assert abs(found[0]) < 1e-4
    assert found[1] > 10 * abs(found[0])
    logits = dense(held_out).logits[0].detach()
    assert compare(logits, logits, held_out[0]).isfinite().all()
