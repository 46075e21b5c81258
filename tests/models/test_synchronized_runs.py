"""Runs in step: weights are read once for all of them, and each run is as it is alone."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_model, tiny_tokenizer
from llm_pruner.data.text import EvaluationText
from llm_pruner.discovery.groups import discover
from llm_pruner.evaluation import perplexity as perplexing
from llm_pruner.evaluation.perplexity import perplexity_of_windows
from llm_pruner.models import mapped_weights, streaming, synchronized_runs
from llm_pruner.models.blockwise import find_chain
from llm_pruner.models.load import load_model
from llm_pruner.models.synchronized_runs import in_step, result_of, runs_in_step
from llm_pruner.search.divergence import DivergenceMeter, divergences
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import cut_verified_, require_same
from llm_pruner.tracing.scenes import generated
from llm_pruner.types import Discovery, IntArray

TINY = 1000
"""Bytes into which no weights fit."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = tiny_model(num_hidden_layers=2).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def streamed(folder: str) -> Any:
    return load_model(folder, memory=TINY).model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stored tensors that are read whole, one after the other, by their address in the file."""
    found: list[int] = []
    read = mapped_weights.StoredWeight.read

    def counted(self: Any, *args: Any) -> torch.Tensor:
        value = read(self, *args)
        if value.data_ptr() != self.stored.data_ptr():
            found.append(self.stored.data_ptr())
        return value

    monkeypatch.setattr(mapped_weights.StoredWeight, "read", counted)
    return found


def ffn_and_heads(discovery: Discovery) -> dict[str, IntArray]:
    return {
        group.name: torch.arange(2 if group.kind == "ffn" else 1).numpy()
        for group in discovery.groups
        if group.kind in ("ffn", "heads")
    }


def tokens(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 259, (1, length)) for length in lengths]


def test_the_twin_reads_each_weight_once_for_prefills_and_once_for_steps(
    streamed: Any, reads: list[int]
) -> None:
    discovery = discover(streamed)
    reads.clear()
    twin_logits(streamed, discovery, ffn_and_heads(discovery))
    # Of six forward passes, two are the longest of one way of running it: with the cache.
    assert len(discovery.graph.scenes) == 4
    assert set(Counter(reads).values()) == {2}
    reads.clear()
    _, verified = cut_verified_(streamed, discovery, ffn_and_heads(discovery))
    assert set(Counter(reads).values()) == {4}
    assert len(verified.scenes) == 4
    # Both go through a block before the next one, so that there are two passes over the file.
    first = streamed.model.layers[0].input_layernorm.weight
    with streaming.stored(first) as values:
        places = [at for at, address in enumerate(reads) if address == values.data_ptr()]
    assert places[1] - places[0] < len(reads) // 4 < places[2] - places[1]
    reads.clear()
    require_same(streamed, streamed, discovery)
    assert set(Counter(reads).values()) == {4}


def test_as_many_runs_go_in_step_as_memory_is_meant_for_them() -> None:
    model = tiny_model()
    assert 100 < runs_in_step(model, 16) <= 256
    assert runs_in_step(model, 10**6) < runs_in_step(model, 10**4) < 256
    model.register_buffer("mask", torch.empty(2**27, dtype=torch.bool, device="meta"))
    assert runs_in_step(model, 16) == 3
    assert runs_in_step(model, 10**9) == 1


def test_probes_and_divergences_read_each_weight_once_a_pass(
    streamed: Any, folder: str, reads: list[int]
) -> None:
    ids = torch.cat(tokens(24, 24, 24))
    reads.clear()
    find_chain(streamed.requires_grad_(False), ids, {})
    times = Counter(Counter(reads).values())
    assert times == {1: 1, 2: len(reads) // 2}  # the head is not run on its own
    reads.clear()
    found = divergences(streamed, (streamed, streamed), ids)
    assert set(Counter(reads).values()) == {3}
    assert found == pytest.approx([0, 0], abs=1e-4)
    resident, other = load_model(folder).model, tiny_model(num_hidden_layers=2, seed=3)
    assert DivergenceMeter(streamed, ids).of(other) == DivergenceMeter(resident, ids).of(other)
    assert divergences(streamed, [other], ids) == pytest.approx(divergences(resident, [other], ids))


def test_perplexity_reads_weights_once_for_many_windows(
    streamed: Any, folder: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = load_model(folder)
    dense = replace(resident, model=streamed)
    text, asked = EvaluationText("text", None, ""), PerplexitySettings(batch_size=2)
    rows = torch.cat(tokens(*[24] * 9))
    wanted = perplexity_of_windows(resident.model, rows, text, asked, resident)
    reads.clear()
    assert perplexity_of_windows(streamed, rows, text, asked).nll == wanted.nll
    assert set(Counter(reads).values()) == {1}
    reads.clear()
    for model, times in ((streamed, 2), (resident.model, 1)):
        found = perplexity_of_windows(model, rows, text, asked, dense)
        assert (found.nll, found.divergence) == (wanted.nll, wanted.divergence)
        assert set(Counter(reads).values()) == {times}
        reads.clear()
    size = 2 * 24 * streamed.config.vocab_size * streamed.lm_head.weight.element_size()
    monkeypatch.setattr(perplexing, "_TOGETHER_BYTES", 3 * size)  # three of five batches
    assert perplexity_of_windows(streamed, rows, text, asked, dense).nll == wanted.nll
    assert set(Counter(reads).values()) == {4}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_all_ways_of_running_a_model_give_what_they_give_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    tiny_model(model_type, num_hidden_layers=2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    streamed = load_model(str(tmp_path), memory=TINY).model
    discovery = discover(streamed)
    runs = partial(twin_logits, removal=ffn_and_heads(discovery)), pruned_logits
    found = [run(streamed, discovery=discovery) for run in runs]
    monkeypatch.setattr(synchronized_runs, "is_model_streamed", lambda _: False)
    for run, together in zip(runs, found, strict=True):
        alone = run(streamed, discovery=discovery)
        assert len(alone) == len(together) > 6
        assert all(map(torch.equal, alone, together))


def test_runs_of_any_length_are_each_as_alone(streamed: Any) -> None:
    def fails(model: Any) -> None:
        model(tokens(5)[0])
        raise ValueError("after a pass")

    def by_name(ids: torch.Tensor, model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(ids).logits]

    before, running = sys.stdout, threading.active_count()
    short, long = tokens(9, 30)
    jobs = [partial(generated, tokens=long), fails, partial(by_name, short)]
    jobs += [partial(generated, tokens=short), lambda _: []]
    found = [*in_step(streamed, jobs, "")]
    assert isinstance(found[1], ValueError)
    with pytest.raises(ValueError, match="after a pass"):
        result_of(found[1])
    for job, outcome in zip([jobs[0], *jobs[2:]], [found[0], *found[2:]], strict=True):
        assert all(map(torch.equal, job(streamed), result_of(outcome)))
    assert sys.stdout is before
    assert threading.active_count() == running
    assert streamed.model.layers[0].mlp.up_proj.weight.isnan().all()


def test_an_interrupt_ends_all_runs(streamed: Any) -> None:
    ended = []

    def run(model: Any) -> None:
        try:
            model(tokens(5)[0])
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            model(tokens(5)[0])
        finally:
            ended.append(model)

    running = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        [*in_step(streamed, [run, run, run], "")]
    assert len(ended) == 3
    assert threading.active_count() == running
    assert streamed.model.layers[1].mlp.up_proj.weight.isnan().all()


def test_runs_are_under_the_autocast_of_the_caller(streamed: Any) -> None:
    def kind(model: Any) -> torch.dtype:
        with torch.no_grad():
            model(tokens(5)[0])
            return model.lm_head(torch.zeros(1, 48)).dtype

    assert [*in_step(streamed, [kind, kind], "")] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert [*in_step(streamed, [kind, kind], "")] == [torch.bfloat16] * 2
