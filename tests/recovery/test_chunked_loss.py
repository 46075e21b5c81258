"""Losses whose logits are computed a few tokens at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32

from helpers import tiny_model
from llm_pruner.data.sequences import TrainingSequence, make_sequence
from llm_pruner.recovery import Teacher, chunked_loss
from llm_pruner.recovery.chunked_loss import summed_loss
from llm_pruner.recovery.distill import DirectTeacher
from llm_pruner.recovery.objective import (
    Targets,
    divergence_and_gradient_,
    mixed_loss_and_gradient_,
    task_loss_and_gradient_,
    text_objective,
)
from llm_pruner.recovery.packing import lay_out, target_logits, target_tokens
from llm_pruner.settings.recover import DistillationSettings
from losses import distillation_loss, task_loss


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_LEAST_TOKENS", 7)
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", {"cpu": 0, "cuda": 0})


def samples(count: int = 9) -> list[TrainingSequence]:
    draw = np.random.default_rng(0)
    return [
        make_sequence(draw.integers(3, 259, n).tolist(), [t % 3 > 0 for t in range(n)], 0)
        for n in draw.integers(4, 20, count).tolist()
    ]


def test_the_gradient_of_the_text_s_loss() -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(9, 40, dtype=torch.float64)).requires_grad_()
    tokens = torch.randint(40, (9,))
    wanted = task_loss(logits, tokens)
    (slope,) = torch.autograd.grad(wanted, logits)
    loss, gradient = task_loss_and_gradient_(logits.detach().clone(), tokens)
    assert torch.allclose(loss, wanted)
    assert torch.allclose(gradient, slope)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("k", [4, 40])
def test_the_gradient_of_the_mixture(temperature: float, weight: float, k: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 40, dtype=torch.float64)).requires_grad_()
    tokens = torch.randint(40, (9,))
    tokens[:3] = 0
    taught = (3 * torch.randn(9, 40, dtype=torch.float64) / temperature).log_softmax(-1).topk(k)
    told = Targets(tokens, taught.indices, taught.values, temperature, weight)
    part = distillation_loss(logits, taught.indices, taught.values, temperature)
    wanted = weight * part + (1 - weight) * task_loss(logits, tokens)
    (slope,) = torch.autograd.grad(wanted, logits)
    loss, gradient = mixed_loss_and_gradient_(logits.detach().clone(), told)
    assert torch.allclose(loss, wanted)
    assert torch.allclose(gradient, slope, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the latter's logits come all at once
def test_a_teacher_that_is_asked_gives_all_of_its_distribution(family: str) -> None:
    torch.manual_seed(0)
    dense, model, data = tiny_model(family), tiny_model(family, initializer_range=0.1), samples()
    teacher = DirectTeacher(dense)
    for batch in lay_out(data, range(9), packed=True, capacity=40, micro_tokens=80):
        log_p = target_logits(dense, batch)[0].log_softmax(-1)
        log_q = target_logits(model, batch)[0].log_softmax(-1)
        whole = (log_p.exp() * (log_p - log_q)).sum()
        wanted = gradients(model, whole)
        loss = summed_loss(model, batch, teacher.objective(batch))
        found = gradients(model, loss)
        assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)
        for name, one in found.items():
            scale = float(wanted[name].abs().max())
            assert torch.allclose(one, wanted[name], atol=1e-4 * max(scale, 1)), name
        with torch.no_grad():
            scored = float(summed_loss(model, batch, teacher.objective(batch)))
        assert scored == pytest.approx(float(whole.detach()), rel=1e-4)
    assert all(one.grad is None for one in dense.parameters())


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


# GPT-2's embeddings are tied, Granite divides its logits, Gemma 2 caps them.
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma2"])
@pytest.mark.parametrize("trained", ["all", "no output embedding"])
def test_chunks_give_the_loss_and_gradients_of_all_at_once(family: str, trained: str) -> None:
    model, data = tiny_model(family), samples()
    head = model.get_output_embeddings()
    if trained != "all":
        head.requires_grad_(False)
    for batch in lay_out(data, range(9), packed=True, capacity=40, micro_tokens=80):
        assert batch.targets > 14
        tokens = target_tokens(batch)
        whole = task_loss(target_logits(model, batch)[0], tokens)
        wanted = gradients(model, whole / 3)
        spans = []
        text = text_objective(tokens)

        def objective(logits: Any, span: slice, text: Any = text) -> Any:
            spans.append(span)  # noqa: B023
            assert len(logits) == span.stop - span.start
            return text(logits, span)

        loss = summed_loss(model, batch, objective)
        found = gradients(model, loss / 3)
        assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
        assert found.keys() == wanted.keys()
        for name, one in found.items():
            scale = float(wanted[name].abs().max())
            assert torch.allclose(one, wanted[name], atol=1e-5 * max(scale, 1)), name
        chunked = family in ("llama", "gpt2")
        assert (len(spans) > 1) == chunked
        assert [*range(batch.targets)] == [n for s in spans for n in range(s.start, s.stop)]
        with torch.no_grad():
            assert float(summed_loss(model, batch, text)) == pytest.approx(
                float(whole.detach()), 1e-5
            )
    assert "forward" not in vars(head)


@pytest.mark.parametrize("factor", [1, 2])
def test_logits_that_accelerate_makes_float32_are_the_head_s(factor: int) -> None:
    """As it does with each output of a bfloat16 model; what is done to them then is not lost."""
    model = tiny_model("llama").bfloat16()
    model.get_output_embeddings().requires_grad_(False)
    (batch,) = lay_out(samples(), range(9), packed=True, capacity=200, micro_tokens=200)
    tokens, spans = target_tokens(batch), []
    text = text_objective(tokens)
    logits = factor * target_logits(model, batch)[0].float()
    wanted = gradients(model, task_loss(logits, tokens))
    plain = convert_outputs_to_fp32(model.forward)

    def forward(*args: Any, **keywords: Any) -> Any:
        found = plain(*args, **keywords)
        if factor != 1:
            found.logits = found.logits * factor
        return found

    model.forward = forward

    def objective(logits: Any, span: slice) -> Any:
        spans.append(span)
        return text(logits, span)

    loss = summed_loss(model, batch, objective)
    found = gradients(model, loss)
    assert (len(spans) > 1) == (factor == 1)
    assert float(loss.detach()) == pytest.approx(float(task_loss(logits, tokens).detach()), 1e-2)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        scale = float(wanted[name].abs().max())
        assert torch.allclose(one, wanted[name], atol=0.05 * scale), name
    with torch.no_grad():
        spans.clear()
        summed_loss(model, batch, objective)
    assert (len(spans) > 1) == (factor == 1)


_GROUPS: list[Any] = []
"""They outlive their test: whoever frees one holds Python's lock and waits for its threads, which
may yet need that lock to let go of the last sum."""


def test_weights_that_are_kept_in_half_follow_the_head() -> None:
    model = tiny_model("llama")
    head = model.get_output_embeddings().requires_grad_(False)
    (batch,) = lay_out(samples(), range(9), packed=True, capacity=200, micro_tokens=200)

    def loss() -> tuple[float, float]:
        tokens = target_tokens(batch)
        with torch.autocast("cpu", torch.bfloat16):
            chunked = summed_loss(model, batch, text_objective(tokens))
            whole = task_loss(target_logits(model, batch)[0], tokens)
            return float(chunked.detach()), float(whole.detach())

    first = loss()
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    with torch.no_grad():
        head.weight.mul_(30)
    second = loss()
    assert second[0] == pytest.approx(second[1], rel=1e-3)
    assert second[0] > 1.01 * first[0]


def test_a_teacher_is_asked_in_chunks(tmp_path: Path) -> None:
    student, dense, data = tiny_model(), tiny_model(seed=5), samples()
    settings = DistillationSettings(temperature=2.0, distill_weight=0.7, teacher_top_k=4)
    teacher = Teacher(dense, data, settings, tmp_path, identity="dense", seq_len=64)
    (batch,) = lay_out(data, range(9), packed=True, capacity=200, micro_tokens=200)
    loss = summed_loss(student, batch, teacher.objective(batch))
    found = gradients(student, loss)
    logits, tokens = target_logits(student, batch)
    ids, values = teacher.says(batch)
    whole = 0.7 * distillation_loss(logits, ids, values, 2.0) + 0.3 * task_loss(logits, tokens)
    wanted = gradients(student, whole)
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, one in found.items():
        assert torch.allclose(one, wanted[name], atol=1e-4), name


def test_tokens_that_are_never_written_are_no_loss() -> None:
    """As where a model gives minus infinity for rows beyond its vocabulary."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 8)
    wanted, gradient = divergence_and_gradient_(logits.clone(), teacher)
    wider = [F.pad(one, (0, 3), value=-torch.inf) for one in (logits, teacher)]
    found, padded = divergence_and_gradient_(*wider)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(padded, F.pad(gradient, (0, 3)))
    broken, _ = divergence_and_gradient_(torch.full_like(logits, torch.nan), teacher)
    assert broken.isnan()
