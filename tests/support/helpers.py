"""Tiny random models and a tokenizer, made without files and without a network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

VOCABULARY = 259
"""Three special tokens and the 256 bytes."""

LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256},
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6},
    "opt": {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
    },
    "qwen3": LLAMA | {"head_dim": 8},
    "gemma3_text": LLAMA | {"head_dim": 8},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA
    | {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
"""Sizes by model type; a type that is not named takes llama's."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, then one id per byte."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
    )


def tiny_model(model_type: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random causal language model in float32 and eval mode.

    One-dimensional parameters (biases, norm weights) are randomised too: at their initial zeros
    and ones a mistake in them would go unseen.

    Args:
        model_type: a model type of transformers, such as ``llama``.
        seed: seed of the weights.
        config: config values that replace the tiny ones.
    """
    sizes = SIZES.get(model_type, LLAMA)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    settings = AutoConfig.for_model(model_type, **(sizes | tokens | config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.requires_grad_(True)
    return model


def of_tokens_alone(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose forward pass takes token ids and nothing else, as code may."""
    own: Any = type(model)

    class Plain(own):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return own.forward(self, input_ids=input_ids, use_cache=False)

    model.__class__ = Plain
    return model


@contextmanager
def modules_of_checkpoints_in(cache: Path) -> Iterator[None]:
    """Have transformers keep the code of checkpoints in a folder, and forget it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.syspath_prepend(cache)
        yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
