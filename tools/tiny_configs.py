"""A tiny valid config for every causal language model that transformers registers.

Sizes are set by the names that configs use for them; the few types for which that gives no valid
config have an entry in ``OVERRIDES``.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCABULARY = 2, 4, 2, 16, 64, 96, 128

_BY_VALUE: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd embed_dim dim embedding_size output_hidden_size "
        "projection_dim out_hidden_size",
    ),
    (
        FFN,
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff d_inner decoder_ffn_dim "
        "encoder_ffn_dim ffn_embed_dim dense_intermediate_size intermediate_size_mlp",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers depth",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads multi_query_group_num swa_num_key_value_heads "
        "num_global_key_value_heads",
    ),
    (
        HEAD_DIM,
        "head_dim kv_channels attention_head_dim d_kv global_head_dim swa_head_dim "
        "swa_v_head_dim linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim "
        "mamba_head_dim mamba_d_head attention_hidden_size_per_head qk_rope_head_dim",
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input text_vocab_size"),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length "
        "max_target_positions max_source_positions image_size",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
        "moe_shared_expert_intermediate_size n_routed_experts_intermediate_size",
    ),
    (8, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (4, "linear_num_value_heads index_topk index_n_heads"),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts "
        "linear_num_key_heads n_group eos_token_id mamba_n_groups n_groups",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group bos_token_id "
        "first_k_dense_replace",
    ),
    (24, "q_lora_rank"),
    (
        8,
        "kv_lora_rank state_size ssm_state_size mamba_d_state time_step_rank "
        "mamba_dt_rank mamba_n_heads mamba_num_heads patch_size",
    ),
    (0, "pad_token_id"),
    (
        16,
        "sliding_window attention_window hidden_size_per_layer_input lru_width_per_head "
        "index_head_dim",
    ),
)
SIZES = {name: value for value, names in _BY_VALUE for name in names.split()}
# Left alone where the default is "none": setting one would turn a mechanism on.
_OPTIONAL = {"sliding_window", "head_dim", "hidden_size_per_layer_input", "q_lora_rank"}

_LINEAR = ["linear_attention", "full_attention"]
_HYBRID = {"num_hidden_layers": 4, "layer_types": 2 * _LINEAR}
_QWEN4 = {
    **_HYBRID,
    "hc_lowrank": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_GLOBAL = ["sliding_attention", "full_attention"]
_GEMMA4 = {
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": 2 * _GLOBAL,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blt": {
        "patching_threshold": 4.2,  # patches of one byte and of several
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": _GLOBAL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _GLOBAL},
    },
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "ctrl": {"dff": 96},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rate_csa": 2,
        "compress_rate_hca": 2,
        "index_topk": 1,
    },
    "dory": {"initializer_range": 1.0, "layer_types": _GLOBAL},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense", "dense"],
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    # Several chunks in a short text, in place of one that is padded to 256 tokens.
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": 2 * _GLOBAL,
        "num_kv_shared_layers": 0,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_HYBRID, "linear_head_dim": 16, "linear_num_heads": 4},
    # Fewer keys are chosen, and pooled, than a text has.
    "kolibri1_1": {
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "indexed_attention"],
        "head_dim": 16,
        "index_num_heads": 2,
        "index_pool_size": 8,
        "index_compression": 2,
        "index_num_local_tokens": 2,
        "index_num_sink_tokens": 1,
        "mlp_only_intermediate_size": 96,
    },
    "lara_mini": {
        "num_hidden_layers": 6,
        "layer_types": 2 * ["linear_attention", "sliding_attention", "full_attention"],
    },
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": 2 * ["conv", "full_attention"]},
    "lfm3": {
        "num_hidden_layers": 6,
        "layer_types": 2 * ["conv", "full_attention", "sliding_attention"],
    },
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "chunk_size": 8},
    "minimax": {"block_size": 4},  # several blocks in a short text
    "ministral": {"head_dim": 16},
    "nemotron_h": {
        "layers_block_type": 2 * ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "olmo_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _QWEN4,
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen4_exp": {"text_config": _QWEN4},
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
    },
    "rwkv": {"num_hidden_layers": 3},
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 60,
        "shape_embed_dim": 16,
    },
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"tie_word_embeddings": False},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": 2 * ["linear_attention", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": 2 * ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

_SPEECH = "its inputs are codes of sound, not token ids"
NOT_DECODERS: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "a draft head that reads the hidden states of another model",
    "gemma4_unified_assistant": "a draft head that reads the hidden states of another model",
    "musicgen": _SPEECH,
    "musicgen_melody": _SPEECH,
}
"""Types that are registered but are no decoders of text on their own -> why."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny config of a type; raises whatever the config class raises."""
    kind = CONFIG_MAPPING[model_type]
    encodes = model_type in MASKED and not kind().is_encoder_decoder
    decodes = (
        {"is_decoder": True} if encodes and getattr(kind(), "is_decoder", None) is False else {}
    )
    return _shrink(kind, {**decodes, **OVERRIDES.get(model_type, {})})


def _shrink(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    names = set(vars(default)) | set(getattr(kind, "attribute_map", {}))
    values: dict[str, Any] = {}
    for name in names:
        value = _read(default, name)
        if name in SIZES and not (name in _OPTIONAL and value is None):
            values[name] = SIZES[name]
        elif isinstance(value, PreTrainedConfig):
            inner = overrides.get(name, {})
            values[name] = _shrink(type(value), inner if isinstance(inner, dict) else {})
    if values.get("kv_lora_rank"):
        # Latent attention has as many keys as queries.
        values.update({name: HEADS for name in ("num_key_value_heads",) if name in values})
    for name, value in overrides.items():
        if not isinstance(values.get(name), PreTrainedConfig):
            values[name] = value
    for name in [name for name, value in values.items() if value is _ABSENT]:
        del values[name]
    return kind(**values)


def _read(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a setting that differs between layers has no one value
        return vars(config).get(name)


_ABSENT = object()
