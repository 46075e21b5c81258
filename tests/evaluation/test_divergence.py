"""The divergence from the dense model: against sums written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import tiny_model
from llm_pruner.errors import UserError
from llm_pruner.evaluation.divergence import divergence

ROWS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


def test_a_model_is_no_distance_from_itself() -> None:
    model = tiny_model()
    found = divergence(model, model, "dense", ROWS, 1, 2, "text")
    assert (found.kl, found.kl_stderr, found.changed, found.changed_stderr) == (0, 0, 0, 0)


@torch.no_grad()
def test_it_is_the_mean_over_predicted_tokens_with_the_spread_of_windows() -> None:
    dense, model = tiny_model(), tiny_model(seed=1)
    found = divergence(model, dense, "dense", ROWS, 3, 2, "text")
    p, q = (one(ROWS).logits[:, 2:-1].double().log_softmax(-1) for one in (dense, model))
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    changed = (p.argmax(-1) != q.argmax(-1)).double().mean(1)
    nll = -p.gather(-1, ROWS[:, 3:, None]).mean()
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_stderr == pytest.approx(float(kl.std()) / math.sqrt(5), rel=1e-4)
    assert found.changed == pytest.approx(float(changed.mean()))
    assert found.changed_stderr == pytest.approx(float(changed.std()) / math.sqrt(5))
    assert found.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert found.kl > 0


def test_one_window_has_no_spread() -> None:
    found = divergence(tiny_model(seed=1), tiny_model(), "dense", ROWS[:1], 1, 1, "text")
    assert found.kl_stderr is None
    assert found.changed_stderr is None


def test_models_with_other_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="dense predicts 259 tokens and the model 300"):
        divergence(tiny_model(vocab_size=300), tiny_model(), "dense", ROWS, 1, 1, "text")


def test_what_is_not_finite_is_said() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.inf)
    with pytest.raises(UserError, match="divergence from dense on text is not finite"):
        divergence(broken, tiny_model(), "dense", ROWS, 1, 1, "text")
