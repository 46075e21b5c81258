"""A tiny valid config for every causal language model that transformers registers.

Sizes are set by the names that configs use for them; the few types for which that gives no valid
config have an entry in ``OVERRIDES``.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
        "mamba_head_dim mamba_d_head attention_hidden_size_per_head",
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
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
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
        "kv_lora_rank qk_rope_head_dim state_size ssm_state_size mamba_d_state time_step_rank "
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

OVERRIDES: dict[str, dict[str, Any]] = {}

NOT_DECODERS: dict[str, str] = {}
"""Types that are registered but are no decoders of text on their own -> why."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny config of a type; raises whatever the config class raises."""
    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _shrink(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    names = set(vars(default)) | set(getattr(kind, "attribute_map", {}))
    values: dict[str, Any] = {}
    for name in names:
        value = getattr(default, name, None)
        if name in SIZES and not (name in _OPTIONAL and value is None):
            values[name] = SIZES[name]
        elif isinstance(value, PreTrainedConfig):
            inner = overrides.get(name, {})
            values[name] = _shrink(type(value), inner if isinstance(inner, dict) else {})
    for name, value in overrides.items():
        if not isinstance(values.get(name), PreTrainedConfig):
            values[name] = value
    for name in [name for name, value in values.items() if value is _ABSENT]:
        del values[name]
    return kind(**values)


_ABSENT = object()
