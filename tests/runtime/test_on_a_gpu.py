"""Every stage on a device that the processor's tensors may not meet, beside the same on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.compensation import refit_
from llm_pruner.data.text import EvaluationText
from llm_pruner.discovery.groups import discover
from llm_pruner.evaluation.answers import Asked, write_batch
from llm_pruner.evaluation.likelihood import log_likelihoods
from llm_pruner.evaluation.perplexity import perplexity_of_windows
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.speed import measure_speed
from llm_pruner.importance import Criterion, boundary_pass, score
from llm_pruner.models import streaming
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.streaming import stream_
from llm_pruner.planning import Numbering, Selection, Target
from llm_pruner.runtime import precision
from llm_pruner.search.structure_split import find_split
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.surgery import verify
from llm_pruner.surgery.verify import cut_verified_
from llm_pruner.types import Discovery, Removal
from second_device import SecondDevice, is_there, put_

IDS = torch.randint(3, 100, (16, 16), generator=torch.Generator().manual_seed(1))


def removal_of(discovery: Discovery) -> Removal:
    return {
        group.name: np.arange(max(1, group.size // 3))
        for group in discovery.groups
        if group.kind in ("ffn", "heads") and group.frozen is None
    }


def stages(model: Any, discovery: Discovery) -> Iterator[Any]:
    """Yield what each stage of a run finds, as numbers."""
    scores = {}
    for criterion in ("fisher", "taylor", "fisher-obs"):
        scores = score(model, discovery, Criterion(criterion), input_ids=IDS, seed=0)
        yield np.concatenate(list(scores.values()))
    free = {group.kind for group in discovery.groups if group.frozen is None}
    kinds = tuple(kind for kind in ("heads", "hidden", "ffn") if kind in free)[-2:]
    selection = Selection(structures=kinds, scope="global")
    about = selection, Target(ratio=0.1), Numbering.dense(discovery), IDS[-4:]
    _, trials = find_split(model, discovery, scores, *about, refit_on=IDS[:-4])
    yield np.array([trial.divergence for trial in trials])
    pruned, removal = sharing_copy(model), removal_of(discovery)
    cut_verified_(pruned, discovery, removal)
    done = refit_(pruned, model, discovery, removal, IDS)
    yield np.array([one.after for one in done])
    text = EvaluationText("text", None, "")
    yield np.array(perplexity_of_windows(pruned, IDS, text, PerplexitySettings()).nll)


@pytest.fixture(autouse=True)
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have neither device round factors to bfloat16, and room on both."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda *_: False)
    monkeypatch.setattr(boundary_pass, "free_bytes", lambda _: 2**40)


@contextmanager
def _on_gpu(model: Any) -> Iterator[None]:
    with SecondDevice():
        put_(model)
        assert model(IDS.to("cuda")).logits.device == torch.device("cuda:0")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_model_on_a_gpu(name: str) -> None:
    model = make(name)
    discovery = discover(model)
    expected = list(stages(copy.deepcopy(model), discovery))
    with _on_gpu(model):
        for found, wanted in zip(stages(model, discovery), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
        assert all(is_there(parameter) for parameter in model.parameters())


@pytest.mark.slow
def test_blocks_that_are_moved_to_a_gpu_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_undisturbed_by_modes", nullcontext)  # the device is one
    model = make("llama")
    model.save_pretrained(tmp_path)
    discovery = discover(model)
    expected = list(stages(model, discovery))
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with SecondDevice():
        stream_(streamed, torch.float32, "cuda")
        for found, wanted in zip(stages(streamed, discovery), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)


def test_a_float32_copy_in_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_undisturbed_by_modes", nullcontext)  # the device is one
    monkeypatch.setattr(verify, "free_bytes", lambda _: 0)
    model = make("llama").bfloat16()
    discovery = discover(model)
    with _on_gpu(model):
        _, verified = cut_verified_(model, discovery, removal_of(discovery))
    # In bfloat16 it would be a hundred times as much.
    assert 0 < verified.difference < 1e-4


def test_the_speed_of_a_gpu_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", "NVIDIA {}".format)
    model = tiny_model("llama")
    with _on_gpu(model):
        (speed,) = measure_speed([model], prompt_tokens=8, new_tokens=1, repeats=1)
    assert speed.device == "NVIDIA cuda:0"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tasks_answers_and_divergence_on_a_gpu(name: str) -> None:
    model, dense, tokenizer = tiny_model(name), tiny_model(name), tiny_tokenizer()
    context = tuple(range(5, 17))
    pairs = [(context, (9, 8)), (context, (4, 5, 6)), (context, (7,)), ((5, 6, 7), (8, 9))]
    asked = Asked(("hello there", "a"), new_tokens=5, title="answers", stops=("x",))
    text = EvaluationText("text", None, "")

    def found() -> list[Any]:
        against: Any = SimpleNamespace(model=dense, name="dense")
        nll = perplexity_of_windows(model, IDS, text, PerplexitySettings(), against)
        return [
            log_likelihoods(model, pairs, max_length=32),
            sample_continuation(model, tokenizer, "hello", 4),
            write_batch(model, tokenizer, asked.prompts, asked),
            (nll.nll, nll.divergence),
        ]

    expected = found()
    with SecondDevice():
        put_(model)
        put_(dense)
        assert found() == expected


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with SecondDevice():
        there = torch.ones(2).to("cuda")
        with pytest.raises(RuntimeError, match="at least two devices"):
            there + torch.ones(2)
        assert not is_there(there.cpu() + 1)
        assert (there + torch.ones(2, device="cuda")).device.type == "cuda"
