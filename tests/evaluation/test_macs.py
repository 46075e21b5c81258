"""MACs, bytes read and cache against counts by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import llama_7b, make
from helpers import VOCABULARY, of_tokens_alone, tiny_model
from llm_pruner import Selection, Target, allocate, discover, prune_
from llm_pruner.errors import LLMPrunerError
from llm_pruner.evaluation.footprint import (
    Counter,
    attention_macs,
    count_work,
    model_size,
    paper_macs,
)
from llm_pruner.models.forward import tensor_bytes

LAYERS, HIDDEN, FFN, HEADS, KV, HEAD = 3, 48, 80, 6, 3, 8
ATTENTION = 2 * HIDDEN * HEADS * HEAD + 2 * HIDDEN * KV * HEAD
PER_TOKEN = LAYERS * (ATTENTION + 3 * HIDDEN * FFN) + HIDDEN * VOCABULARY


def pairs(queries: int, keys: int) -> int:
    """MACs of both products of attention, all layers and heads."""
    return LAYERS * 2 * HEADS * queries * keys * HEAD


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("weights", [True, False])
def test_llama(attention: str, weights: bool) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    if not weights:
        model = without_weights(model)
    assert paper_macs(model) == 64 * PER_TOKEN + pairs(64, 64)
    counts = count_work(model, prompt_tokens=20, batch_size=2)
    # The prefill needs the logits of one position alone.
    one_text = 20 * PER_TOKEN - 19 * HIDDEN * VOCABULARY + pairs(20, 20)
    assert counts.prefill_macs == 2 * one_text
    assert counts.token_macs == 2 * (PER_TOKEN + pairs(1, 21))
    # Keys and values of 3 heads of 8 in 3 layers, 4 bytes each.
    assert counts.cache_bytes_per_token == LAYERS * 2 * KV * HEAD * 4
    assert counts.cache_bytes_fixed == 0
    assert paper_macs(of_tokens_alone(model)) == 64 * PER_TOKEN + pairs(64, 64)


def test_bytes_read_are_weights_and_cache() -> None:
    counts = count_work(tiny_model(), prompt_tokens=20)
    # Two products read the input of the attention thrice, of the FFN twice, and so on.
    activations = LAYERS * (3 * HIDDEN + HEADS * HEAD + 2 * HIDDEN + FFN) + HIDDEN
    read = PER_TOKEN + activations + LAYERS * (HEADS + 2 * KV * 21) * HEAD
    assert counts.token_bytes_read == 4 * read


def test_gpt2() -> None:
    # Conv1D and 1,024 positions; the FFN is four times as wide.
    model = tiny_model("gpt2")
    block = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN
    assert paper_macs(model) == 64 * (3 * block + HIDDEN * VOCABULARY) + pairs(64, 64)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("weights", [True, False])
def test_mixtral_counts_active_experts_only(experts: str, weights: bool) -> None:
    model = tiny_model("mixtral")
    if not weights:
        model = without_weights(model)
    model.set_experts_implementation(experts)
    two_of_four = 4 * HIDDEN + 2 * 3 * HIDDEN * FFN
    per_token = LAYERS * (ATTENTION + two_of_four) + HIDDEN * VOCABULARY
    assert paper_macs(model) == 64 * per_token + pairs(64, 64)
    counts = count_work(model, prompt_tokens=20)
    assert counts.token_macs == per_token + pairs(1, 21)
    # Beside the weights there are activations, which are hundreds of times smaller.
    assert counts.token_bytes_read == pytest.approx(4 * per_token, rel=0.06)


def test_layers_that_differ() -> None:
    model = tiny_model()
    dense, work = paper_macs(model), count_work(model)
    discovery = discover(model)
    heads = next(g for g in discovery.groups if g.kind == "heads" and g.layer == 1)
    ffn = next(g for g in discovery.groups if g.kind == "ffn" and g.layer == 2)
    prune_(model, discovery, {heads.name: np.array([1]), ffn.name: np.arange(30)})
    # A key-value head has two query heads: three rows of the projections and a column of o_proj.
    gone = (2 * 2 + 2) * HIDDEN * HEAD + 3 * HIDDEN * 30
    assert dense - paper_macs(model) == 64 * gone + 2 * 2 * 64 * 64 * HEAD
    after = count_work(model)
    assert work.token_macs - after.token_macs == gone + 2 * 2 * 65 * HEAD
    assert after.cache_bytes_per_token == 2 * (3 + 2 + 3) * HEAD * 4


@pytest.mark.parametrize("name", ["mamba", "gpt_neox", "bloom", "gemma3_text", "deepseek_v3"])
def test_stand_ins_count_as_weights_do(name: str) -> None:
    real = make(name)
    counts = count_work(real)
    assert counts == count_work(without_weights(real))
    assert counts.token_macs > 0.9 * model_size(real).blocks


def test_recurrent_state_does_not_grow() -> None:
    counts = count_work(make("mamba"))
    assert counts.cache_bytes_per_token == 0
    assert counts.cache_bytes_fixed > 0


@pytest.mark.slow
def test_llama_7b_is_the_papers() -> None:
    """LLM-Pruner, table 1: 424.02G MACs dense; 339.60G with 25% of layers 4 to 29 removed."""
    shared, discovery = llama_7b()
    model: Any = copy.deepcopy(shared)
    assert model_size(model).total == 6_738_415_616
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    dense = 64 * (32 * block + 4096 * 32000) + 32 * 2 * 64 * 64 * 4096
    assert paper_macs(model) == dense == pytest.approx(424.0e9, rel=0.001)
    assert count_work(model).cache_bytes_per_token == 32 * 2 * 4096 * 2
    scores = {group.name: np.arange(group.size, dtype=float) for group in discovery.groups}
    layers = {"heads": (4, 29), "ffn": (4, 29)}
    selection = Selection(("heads", "ffn"), layer_ranges=layers)
    prune_(model, discovery, allocate(discovery, scores, selection, Target(unit_ratio=0.25)))
    assert model_size(model).total == 6_738_415_616 - 26 * block // 4 == 5_422_977_024
    pruned = dense - 26 * (64 * block + 2 * 64 * 64 * 4096) // 4
    assert paper_macs(model) == pruned == pytest.approx(339.6e9, rel=0.001)


def test_products() -> None:
    # Two query heads read one key-value head; values are wider than keys.
    assert attention_macs(
        torch.Size((1, 2, 5, 4)), torch.Size((1, 1, 7, 4)), torch.Size((1, 1, 7, 6))
    ) == 2 * 5 * 7 * (4 + 6)
    with torch.no_grad(), Counter() as counter:
        nn.functional.conv1d(torch.ones(1, 6, 9), torch.ones(6, 1, 4), groups=6)
    assert counter.macs == 6 * 6 * 4
    with torch.no_grad(), Counter() as counter:
        torch.ones(3, 4) @ torch.ones(4)
        torch.ones(3, 4) + 1
    assert counter.macs == 12


def test_bytes_of_nested_tensors_count_once() -> None:
    shared = torch.zeros(3)

    class Holder:
        def __init__(self) -> None:
            self.parts = [shared, {"again": shared, "other": (torch.zeros(2, dtype=torch.int8),)}]
            self.itself = self

    assert tensor_bytes(Holder()) == 3 * 4 + 2
    assert tensor_bytes(None) == 0


def test_errors() -> None:
    model = tiny_model()
    model.lm_head = nn.Linear(3, 3)
    with pytest.raises(LLMPrunerError, match=r"LlamaForCausalLM does not run: RuntimeError: .*"):
        paper_macs(model)
