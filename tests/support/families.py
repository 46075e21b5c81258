"""Tiny random models of many families, with what must be prunable in each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_pruner.discovery.groups import discover
from llm_pruner.types import Discovery

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GQA = ("hidden", "heads", "query_heads", "head_dim", "ffn", "layers")
MHA = ("hidden", "heads", "head_dim", "ffn", "layers")
NO_HEADS = ("hidden", "head_dim", "ffn", "layers")


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        model_type: as ``transformers`` names it.
        kinds: kinds of groups that must exist, and of which none may be frozen.
        config: settings on top of ``BASE``.
        without: settings of ``BASE`` that this type derives itself.
        fixed: names of groups that are an exception: they must be frozen.
        absent: kinds of which no unit may be prunable.
        frozen: (tensor, dim) -> part of the reason; axes that must hold frozen positions.
    """

    model_type: str
    kinds: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    frozen: Mapping[tuple[str, int], str] = field(default_factory=dict)


_GPT2 = {"n_inner": 40}
_OWN_ATTENTION = Version(transformers.__version__) < Version("5.25")
"""Whether Falcon has code for attention of its own, in which the size of a head is a number."""
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", GQA, {"num_hidden_layers": 3}),
    "llama_mha": Family("llama", MHA, {"num_key_value_heads": 6}),
    # One key-value head for all: what can go are its query heads.
    "llama_mqa": Family("llama", MHA, {"num_key_value_heads": 1}),
    "llama_biases": Family("llama", GQA, {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": Family("llama", GQA, {"tie_word_embeddings": True}),
    "mistral": Family("mistral", GQA, {"sliding_window": 4}),
    "qwen2": Family("qwen2", GQA),
    "qwen3": Family("qwen3", GQA),
    "gemma2": Family("gemma2", GQA, {"sliding_window": 4}),
    "gemma3_text": Family(
        "gemma3_text",
        GQA,
        {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Family("phi3", GQA),
    "starcoder2": Family("starcoder2", GQA),
    "olmo2": Family("olmo2", GQA),
    "gpt2": Family("gpt2", MHA, _GPT2 | {"num_hidden_layers": 3}),
    "gpt_neox": Family("gpt_neox", MHA, {"use_parallel_residual": True}),
    "gpt_neox_serial": Family("gpt_neox", MHA, {"use_parallel_residual": False}),
    # Only part of a head is rotated. One attribute sizes rotated, unrotated and value channels: the
    # rotated ones stay, and the others shrink together.
    "phi": Family("phi", GQA, fixed=("head_dim",)),
    "gptj": Family("gptj", MHA, _GPT2 | {"rotary_dim": 4}, fixed=("head_dim",)),
    "mamba": Family("mamba", ("hidden", "ffn", "layers"), {"state_size": 4}),
    "bloom": Family(
        "bloom",
        NO_HEADS,
        {"n_layer": 2, "n_head": 6},
        # ALiBi slopes are computed from the number of heads, by their position.
        absent=("heads", "query_heads"),
        frozen={
            ("transformer.h.0.self_attention.query_key_value.weight", 0): "written in the code"
        },
    ),
    "falcon": Family(
        "falcon",
        ("hidden", "heads", "ffn", "layers"),
        {"alibi": False},
        without=("head_dim",),
        absent=("head_dim",) if _OWN_ATTENTION else ("query_heads",),
        # The key-value head is taken from behind the query heads by a literal position or number.
        frozen={
            ("transformer.h.0.self_attention.query_key_value.weight", 0): "2 is written"
            if _OWN_ATTENTION
            else "single positions of it are taken",
        },
    ),
    "falcon_new": Family(
        "falcon",
        ("hidden", "heads", "ffn", "layers"),
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        without=("head_dim",),
        absent=("head_dim",) if _OWN_ATTENTION else ("query_heads",),
        frozen={("transformer.h.0.self_attention.dense.weight", 1): "used as a number"}
        if _OWN_ATTENTION
        else {("transformer.h.0.self_attention.query_key_value.weight", 0): "single positions of"},
    ),
    "falcon_alibi": Family(
        "falcon",
        ("hidden", "ffn", "layers"),
        {"alibi": True, "multi_query": False, "parallel_attn": False},
        without=("head_dim",),
        absent=("heads", "query_heads", *(("head_dim",) if _OWN_ATTENTION else ())),
        frozen={("transformer.h.0.self_attention.dense.weight", 1): "used as a number"}
        if _OWN_ATTENTION
        else {("transformer.h.0.self_attention.query_key_value.weight", 0): "written in the code"},
    ),
    "opt": Family("opt", MHA, {"ffn_dim": 40, "word_embed_proj_dim": 48}),
    "mpt": Family(
        "mpt",
        NO_HEADS,
        {"d_model": 48, "n_heads": 6, "n_layers": 2, "expansion_ratio": 2},
        absent=("heads", "query_heads"),
        frozen={("transformer.blocks.0.attn.Wqkv.weight", 0): "computed from positions"},
    ),
    "mixtral": Family(
        "mixtral", (*GQA, "experts"), {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        (*GQA, "experts"),
        {**_MOE, "num_experts": 6, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": Family("qwen3_moe", (*GQA, "experts"), {**_MOE, "num_experts": 4}),
    "olmoe": Family("olmoe", (*GQA, "experts"), {"num_experts_per_tok": 2, "num_experts": 5}),
    "deepseek_v3": Family(
        "deepseek_v3",
        ("hidden", "heads", "head_dim", "value_dim", "ffn", "other", "experts", "layers"),
        {
            **_MOE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 6,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        without=("head_dim",),
        # Whole groups of experts stay; of each group the same experts go.
        fixed=("layers.1.experts_2", "layers.2.experts_2"),
    ),
}


def make(
    name: str, *, attention: str | None = None, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Return the random model of a family in float32 and eval mode.

    Biases and norms are random as well: at their initial zeros and ones a mistake in them would go
    unseen. Weights have variance 1 / inputs, which keeps logits between 1 and 10.

    Args:
        name: key of ``FAMILIES``.
        attention: implementation of attention; the family's default if not given.
        seed: seed of the weights.
        config: settings that replace those of the family.
    """
    family = FAMILIES[name]
    settings = {key: value for key, value in BASE.items() if key not in family.without}
    model_config = AutoConfig.for_model(
        family.model_type, **(settings | {**family.config} | config)
    )
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 0.15)
    return model


@cache
def discovered(name: str, attention: str | None = None) -> tuple[PreTrainedModel, Discovery]:
    """Return a family's model and what can be removed from it; shared by tests, so leave it be."""
    model = make(name, attention=attention)
    return model, discover(model)


@cache
def _made(name: str, config: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, Discovery]:
    model = make(name, **dict(config))
    return model, discover(model)


def fresh(name: str, **config: Any) -> tuple[PreTrainedModel, Discovery]:
    """Return a family's model, which the test may change, and what can be removed from it."""
    model, discovery = _made(name, tuple(sorted(config.items())))
    return copy.deepcopy(model), discovery


@cache
def llama_7b() -> tuple[PreTrainedModel, Discovery]:
    """Return LLaMA-7B on the meta device and what can be removed from it; shared, so leave it be.

    To trace 32 layers takes seconds.
    """
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    return model, discover(model)
