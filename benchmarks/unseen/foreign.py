"""Tiny models of packages on PyPI; each is imported when it is built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from unseen.spec import VOCABULARY, Positions, add


def given(path: str, **arguments: Any) -> Any:
    """Return what builds ``module:Class`` with these arguments."""

    def build() -> nn.Module:
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)(**arguments)

    return build


# ------------------------------------------------------------------------------------- litgpt


def litgpt(**changes: Any) -> Any:
    def build() -> nn.Module:
        from litgpt import GPT, Config

        settings: dict[str, Any] = {
            "name": "tiny",
            "block_size": 320,
            "n_layer": 3,
            "n_embd": 32,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "padding_multiple": 1,
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
            "intermediate_size": 48,
            "bias": False,
        }
        return GPT(Config(**(settings | changes)))

    return build


def litgpt_cached(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.set_kv_cache(batch_size=len(tokens), dtype=torch.float64)  # type: ignore[operator]
    seen = [model(tokens, torch.arange(tokens.shape[1]))[:, -1]]
    for place in range(tokens.shape[1], tokens.shape[1] + 8):
        step = seen[-1].argmax(-1, keepdim=True)
        seen.append(model(step, torch.tensor([place]))[:, -1])
    model.clear_kv_cache()  # type: ignore[operator]
    return seen


_NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "bias": True}
for name, changes in {
    "llama": {},
    "llama GQA": {"n_query_groups": 2},
    "falcon MQA, one norm, parallel": {
        **_NEOX,
        "n_query_groups": 1,
        "parallel_residual": True,
        "shared_attention_norm": True,
    },
    "pythia, partial rotation": {**_NEOX, "parallel_residual": True, "rotary_percentage": 0.25},
    "gemma2, window, softcap": {
        "mlp_class_name": "GemmaMLP",
        "n_query_groups": 2,
        "head_size": 12,
        "scale_embeddings": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "sliding_window_size": 16,
        "sliding_window_indices": [1, 0, 1],
        "attention_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_scores_scalar": 12,
    },
    "gemma3, two rotations": {
        "mlp_class_name": "GemmaMLP",
        "n_query_groups": 2,
        "norm_qk": True,
        "scale_embeddings": True,
        "sliding_window_size": 16,
        "sliding_window_indices": [1, 1, 0],
        "rope_local_base_freq": 500.0,
        "rope_indices": [1, 1, 0],
    },
    "olmo2, norms of whole queries": {
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "norm_1": False,
        "norm_2": False,
        "post_attention_norm": True,
        "post_mlp_norm": True,
    },
    "qwen3, norms of heads": {"norm_qk": True, "n_query_groups": 2, "head_size": 10},
    "mixtral": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "deepseek, latent, grouped experts": {
        "mlp_class_name": "LLaMAMoE",
        "moe_intermediate_size": 24,
        "n_expert": 8,
        "n_shared_expert": 1,
        "n_expert_groups": 2,
        "n_topk_groups": 1,
        "n_topk_scores_per_group": 2,
        "n_expert_per_token": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "latent_attention": {
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
        },
    },
    "stablelm, biases of attention": {**_NEOX, "attn_bias": True, "mlp_class_name": "LLaMAMLP"},
    "phi, bias of the head": {**_NEOX, "parallel_residual": True, "lm_head_bias": True},
}.items():
    add(f"litgpt {name}", "litgpt", litgpt(**changes), generate=litgpt_cached)


# ------------------------------------------------------------------------------------- ibm-fms


def fms(module: str, model: str, config: str, **changes: Any) -> Any:
    def build() -> nn.Module:
        home = import_module(f"fms.models.{module}")
        settings: dict[str, Any] = {
            "src_vocab_size": VOCABULARY,
            "emb_dim": 32,
            "nheads": 4,
            "nlayers": 3,
            "max_expected_seq_len": 320,
            "multiple_of": 8,
            "pad_id": -1,
        }
        fields = getattr(home, config).__dataclass_fields__
        settings = {key: value for key, value in (settings | changes).items() if key in fields}
        net = getattr(home, model)(getattr(home, config)(**settings))
        net.reset_parameters()
        net.post_init()
        return net

    return build


def fms_masked(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    seen = causal & mask.bool()[:, None] | torch.eye(tokens.shape[1], dtype=torch.bool)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    seen = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
    return model(tokens, position_ids=places, mask=seen)


def fms_cached(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    out, cache = model(tokens, use_cache=True)
    seen = [out[:, -1]]
    for place in range(tokens.shape[1], tokens.shape[1] + 8):
        step = seen[-1].argmax(-1, keepdim=True)
        places = torch.full((len(tokens), 1), place)
        out, cache = model(step, position_ids=places, past_key_value_states=cache, use_cache=True)
        seen.append(out[:, -1])
    return seen


for name, module, model, config, changes in (
    ("llama, fused", "llama", "LLaMA", "LLaMAConfig", {}),
    ("llama GQA, not fused, biases", "llama", "LLaMA", "LLaMAConfig",
     {"kvheads": 2, "fused_weights": False, "attn_bias": True, "mlp_bias": True}),
    ("llama tied, MQA", "llama", "LLaMA", "LLaMAConfig", {"kvheads": 1, "tie_heads": True}),
    ("granite", "granite", "Granite", "GraniteConfig",
     {"kvheads": 2, "head_dim": 8, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
      "logits_scaling": 2.0, "attention_multiplier": 0.2}),
    ("gpt-bigcode MQA, tied", "gpt_bigcode", "GPTBigCode", "GPTBigCodeConfig", {}),
    ("gpt-bigcode heads", "gpt_bigcode", "GPTBigCode", "GPTBigCodeConfig",
     {"multiquery_attn": False, "tie_heads": False}),
    ("mistral", "mistral", "Mistral", "MistralConfig",
     {"kvheads": 2, "head_dim": 8, "sliding_window": 16}),
    ("mixtral", "mixtral", "Mixtral", "MixtralConfig",
     {"dim": 32, "kvheads": 2, "hidden_dim": 48, "num_experts": 4}),
    ("qwen3", "qwen3", "Qwen3", "Qwen3Config", {"kvheads": 2, "head_dim": 8}),
):  # fmt: skip
    add(
        f"fms {name}",
        "ibm-fms",
        fms(module, model, config, **changes),
        masked=fms_masked,
        generate=fms_cached,
    )

# ----------------------------------------------------------------------------------- torchtune


def torchtune_masked(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    seen = causal & mask.bool()[:, None] | torch.eye(tokens.shape[1], dtype=torch.bool)
    return model(tokens, mask=seen, input_pos=(mask.cumsum(1) - 1).clamp(min=0))


def torchtune_cached(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    length = tokens.shape[1] + 8
    model.setup_caches(len(tokens), torch.float64, decoder_max_seq_len=length)  # type: ignore[operator]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None].expand(len(tokens), -1, -1)
    seen: list[torch.Tensor] = []
    places = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    for _ in range(8):
        out = model(tokens, mask=mask[:, places[0]], input_pos=places)
        seen.append(out[:, -1])
        tokens, places = seen[-1].argmax(-1, keepdim=True), places[:, -1:] + 1
    return seen


_TUNE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32,
    "max_seq_len": 320, "intermediate_dim": 48,
}  # fmt: skip
for name, path, changes in (
    ("llama2", "llama2:llama2", {}),
    ("llama3.1, MQA", "llama3_1:llama3_1", {"num_kv_heads": 1}),
    ("mistral", "mistral:mistral", {"num_kv_heads": 4}),
    ("gemma", "gemma:gemma", {"head_dim": 8}),
    ("gemma2", "gemma2:gemma2", {"head_dim": 12, "sliding_window_size": 16}),
    ("phi3", "phi3:phi3", {}),
    ("qwen2", "qwen2:qwen2", {}),
    ("qwen2 tied", "qwen2:qwen2", {"tie_word_embeddings": True}),
):
    add(
        f"torchtune {name}",
        "torchtune",
        given(f"torchtune.models.{path}", **(_TUNE | changes)),
        masked=torchtune_masked,
        generate=None if name == "gemma2" else torchtune_cached,
    )

# ------------------------------------------------------------------------------- x-transformers


def x_transformers(wrapper: dict[str, Any] | None = None, **layers: Any) -> Any:
    def build() -> nn.Module:
        from x_transformers import Decoder, TransformerWrapper

        settings = {"dim": 32, "depth": 3, "heads": 4, "attn_dim_head": 8, "ff_mult": 2} | layers
        return TransformerWrapper(
            num_tokens=VOCABULARY,
            max_seq_len=320,
            attn_layers=Decoder(**settings),
            **(wrapper or {}),
        )

    return build


def x_cached(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    out, cache = model(tokens, return_intermediates=True)
    seen = [out[:, -1]]
    for _ in range(8):
        tokens = torch.cat([tokens, seen[-1].argmax(-1, keepdim=True)], dim=1)
        out, cache = model(tokens, cache=cache, return_intermediates=True)
        seen.append(out[:, -1])
    return seen


for name, build in {
    "plain": x_transformers(),
    "rotary, SwiGLU, RMSNorm": x_transformers(
        rotary_pos_emb=True, ff_swish=True, ff_glu=True, use_rmsnorm=True
    ),
    "GQA, ALiBi, no bias": x_transformers(
        attn_kv_heads=2, alibi_pos_bias=True, alibi_num_heads=2, ff_no_bias=True
    ),
    "MQA, T5 bias": x_transformers(attn_one_kv_head=True, rel_pos_bias=True),
    "norms of queries and keys": x_transformers(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "sandwich norm, dynamic bias": x_transformers(sandwich_norm=True, dynamic_pos_bias=True),
    "post-norm, residual attention": x_transformers(pre_norm=False, residual_attn=True),
    "talking heads, gated values": x_transformers(
        attn_pre_talking_heads=True, attn_post_talking_heads=True, attn_gate_values=True
    ),
    "memory keys, null keys": x_transformers(attn_num_mem_kv=3, rotary_pos_emb=True),
    "macaron, ReLU squared": x_transformers(macaron=True, ff_relu_squared=True),
    "tied, scaled norm": x_transformers({"tie_embedding": True}, use_scalenorm=True),
    "memory tokens, shifted tokens": x_transformers({"num_memory_tokens": 4}, shift_tokens=1),
    "value residual, gated residual": x_transformers(
        add_value_residual=True, gate_residual=True, rotary_pos_emb=True
    ),
    "hyper-connections": x_transformers(num_residual_streams=2),
}.items():
    add(
        f"x-transformers {name}",
        "x-transformers",
        build,
        masked=lambda model, tokens, mask: model(tokens, mask=mask.bool()),
        generate=x_cached if name in ("plain", "rotary, SwiGLU, RMSNorm") else None,
    )

# --------------------------------------------------------------------------------------- mambapy


def mambapy(**changes: Any) -> Any:
    def build() -> nn.Module:
        # Its own language model imports CUDA kernels.
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        return nn.Sequential(
            nn.Embedding(VOCABULARY, 32),
            Mamba(MambaConfig(d_model=32, n_layers=3, d_state=8, **changes)),
            RMSNorm(32),
            nn.Linear(32, VOCABULARY),
        )

    return build


def jamba(**changes: Any) -> Any:
    def build() -> nn.Module:
        from mambapy.jamba import JambaLM, JambaLMConfig

        settings: dict[str, Any] = {
            "d_model": 32, "n_layers": 4, "mlp_size": 48, "d_state": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_experts": 4, "attn_layer_offset": 1,
            "attn_layer_period": 2, "vocab_size": VOCABULARY,
        }  # fmt: skip
        return JambaLM(JambaLMConfig(**(settings | changes)))

    return build


add("mambapy mamba", "mambapy", mambapy())
add("mambapy mamba, inner norms, sequential", "mambapy",
    mambapy(inner_layernorms=True, pscan=False, bias=True))  # fmt: skip
add("mambapy jamba", "mambapy", jamba())
add("mambapy jamba untied, one expert a token", "mambapy",
    jamba(tie_lm_weights=False, num_experts_per_tok=1))  # fmt: skip

# ------------------------------------------------------------------ smaller packages, one by one


def _without_slots(model: nn.Module, gone: Positions) -> set[tuple[str, int]]:
    """Leave slots of a recurrent state out.

    Each block fills all slots again, removed ones as well, so that zeroed ones are no longer zero.
    """
    cut: set[tuple[str, int]] = set()
    for path, module in model.named_modules():
        positions = gone.get((f"{path}.init_state", 0))
        if positions is not None:
            kept = np.setdiff1d(np.arange(module.init_state.shape[0]), positions)
            for name in ("init_state", "state_pos_ids"):
                slots = getattr(module, name)
                setattr(module, name, nn.Parameter(slots.detach()[torch.from_numpy(kept)]))
                cut.add((f"{path}.{name}", 0))
    return cut


_SMALL: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": 32, "depth": 3}
_HEADED = _SMALL | {"heads": 4, "dim_head": 8}

for name, changes in {
    "rotary": {},
    "xpos, one stream": {"use_xpos": True, "num_residual_streams": 1},
    "dynamic bias": {"use_dynamic_pos_bias": True, "num_residual_streams": 1},
}.items():
    add(
        f"local-attention {name}",
        "local-attention",
        given(
            "local_attention:LocalTransformer",
            **(_HEADED | {"max_seq_len": 320, "local_attn_window_size": 16} | changes),
        ),
    )
for name, changes in {
    "minGRU": {},
    "minLSTM": {"use_lstm": True},
    "minGRU with convolutions": {"enable_conv": True, "expansion": 1.0},
}.items():
    add(name, "minGRU-pytorch", given("minGRU_pytorch.minLM:minLM", **(_SMALL | changes)))


def llms_from_scratch(path: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "context_length": 320, "emb_dim": 32, "n_heads": 4, "n_layers": 3,
        "drop_rate": 0.0, "qkv_bias": False, "hidden_dim": 48, "n_kv_groups": 2, "head_dim": 8,
        "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32, "qk_norm": True,
    }  # fmt: skip
    return given(f"llms_from_scratch.{path}", cfg=settings | changes)


for name, build in {
    "GPT-2": llms_from_scratch("ch04:GPTModel", qkv_bias=True),
    "GPT-2, fast": llms_from_scratch("ch04:GPTModelFast"),
    "Llama 3": llms_from_scratch("llama3:Llama3Model"),
    "Llama 3, fast": llms_from_scratch("llama3:Llama3ModelFast"),
    "Qwen3": llms_from_scratch("qwen3:Qwen3Model", num_experts=0),
    "Qwen3 of experts": llms_from_scratch(
        "qwen3:Qwen3Model", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}.items():
    add(f"llms-from-scratch {name}", "llms-from-scratch", build)


def toyllm(bias: bool) -> Any:
    def build() -> nn.Module:
        from toyllm.model.config import GPTModelConfig
        from toyllm.model.gpt import GPTModel

        return GPTModel(GPTModelConfig(VOCABULARY, 320, 32, 4, 3, 0.0, bias))

    return build


add("toyllm GPT-2", "toyllm", toyllm(False))
add(
    "picogpt, heads as modules",
    "picogpt",
    given("picogpt.model:TinyGPT", V=VOCABULARY, n_embd=32, n_head=4, n_layer=3, block_size=320,
          dropout=0.0, rope_base=10000.0),
)  # fmt: skip

for name, path, package, arguments, rest in (
    ("PaLM", "palm_rlhf_pytorch:PaLM", "palm-rlhf-pytorch", _HEADED, {}),
    ("PaLM, norms of queries and keys", "palm_rlhf_pytorch:PaLM", "palm-rlhf-pytorch",
     {**_HEADED, "qk_rmsnorm": True}, {}),
    ("MEGABYTE", "MEGABYTE_pytorch:MEGABYTE", "megabyte-pytorch",
     {"num_tokens": VOCABULARY, "dim": (32, 24), "depth": (2, 2), "max_seq_len": (80, 4),
      "heads": 4, "dim_head": 8}, {}),
    ("linear attention, rotary", "linear_attention_transformer:LinearAttentionTransformerLM",
     "linear-attention-transformer",
     {**_HEADED, "max_seq_len": 320, "causal": True, "use_axial_pos_emb": False,
      "use_rotary_emb": True}, {}),
    ("linear and local attention, GLU", "linear_attention_transformer:LinearAttentionTransformerLM",
     "linear-attention-transformer",
     {**_HEADED, "max_seq_len": 320, "causal": True, "use_axial_pos_emb": False,
      "n_local_attn_heads": 2, "local_attn_window_size": 8, "ff_glu": True},
     {"lengths": (8, 40, 296)}),
    ("routing transformer", "routing_transformer:RoutingTransformerLM", "routing-transformer",
     {**_HEADED, "max_seq_len": 320, "causal": True, "window_size": 8}, {}),
    ("reformer, full attention", "reformer_pytorch:ReformerLM", "reformer-pytorch",
     {**_HEADED, "max_seq_len": 320, "causal": True, "use_full_attn": True, "ff_chunks": 1}, {}),
    ("reformer, GLU, rezero, axial", "reformer_pytorch:ReformerLM", "reformer-pytorch",
     {**_HEADED, "max_seq_len": 320, "causal": True, "use_full_attn": True, "ff_chunks": 2,
      "ff_glu": True, "use_rezero": True, "axial_position_emb": True,
      "axial_position_shape": (20, 16)}, {}),
    ("performer", "performer_pytorch:PerformerLM", "performer-pytorch",
     {**_HEADED, "max_seq_len": 320, "causal": True, "nb_features": 16,
      "auto_check_redraw": False}, {}),
    ("performer, ReLU kernel, GLU", "performer_pytorch:PerformerLM", "performer-pytorch",
     {**_HEADED, "max_seq_len": 320, "causal": True, "generalized_attention": True,
      "no_projection": True, "auto_check_redraw": False, "ff_glu": True, "tie_embed": True}, {}),
    ("recurrent memory transformer",
     "recurrent_memory_transformer_pytorch:RecurrentMemoryTransformer",
     "recurrent-memory-transformer-pytorch",
     {**_HEADED, "num_memory_tokens": 4, "seq_len": 320}, {}),
    ("block recurrent transformer", "block_recurrent_transformer_pytorch:BlockRecurrentTransformer",
     "block-recurrent-transformer-pytorch",
     {**_HEADED, "max_seq_len": 320, "block_width": 16}, {"by_hand": _without_slots}),
    ("mega", "mega_pytorch:Mega", "mega-pytorch",
     {**_SMALL, "ema_heads": 4, "attn_dim_qk": 8, "attn_dim_value": 48, "causal": True}, {}),
    ("mega, pre-norm", "mega_pytorch:Mega", "mega-pytorch",
     {**_SMALL, "ema_heads": 4, "attn_dim_qk": 8, "attn_dim_value": 48, "causal": True,
      "laplacian_attn_fn": True, "pre_norm": True}, {}),
    ("H-transformer", "h_transformer_1d:HTransformer1D", "h-transformer-1d",
     {**_HEADED, "max_seq_len": 512, "causal": True, "block_size": 8}, {}),
    ("FLASH, gated attention units", "flash_pytorch:FLASHTransformer", "flash-pytorch",
     {**_SMALL, "causal": True, "group_size": 16, "query_key_dim": 8}, {}),
    ("FLASH, LayerNorm, Laplacian", "flash_pytorch:FLASHTransformer", "flash-pytorch",
     {**_SMALL, "causal": True, "group_size": 16, "query_key_dim": 8, "norm_type": "layernorm",
      "shift_tokens": False, "laplace_attn_fn": True}, {}),
    ("gate loop", "gateloop_transformer:Transformer", "gateloop-transformer", _HEADED, {}),
    ("gate loop, softmax attention", "gateloop_transformer:Transformer", "gateloop-transformer",
     {**_HEADED, "use_gate_looped_attn": False, "rotary_emb": True}, {}),
    ("gated state spaces", "gated_state_spaces_pytorch:GatedStateSpacesLM",
     "gated-state-spaces-pytorch", {**_SMALL, "dss_kernel_N": 16, "dss_kernel_H": 8}, {}),
    ("hourglass transformer", "hourglass_transformer_pytorch:HourglassTransformerLM",
     "hourglass-transformer-pytorch",
     {"num_tokens": VOCABULARY, "dim": 32, "max_seq_len": 320, "depth": (1, 2, 1),
      "shorten_factor": 2, "heads": 4, "dim_head": 8}, {}),
    ("feedback transformer", "feedback_transformer_pytorch:FeedbackTransformer",
     "feedback-transformer-pytorch", {**_HEADED, "depth": 2, "mem_len": 8},
     {"lengths": (8, 40, 100)}),
    ("sinkhorn transformer", "sinkhorn_transformer:SinkhornTransformerLM", "sinkhorn-transformer",
     {**_SMALL, "heads": 4, "max_seq_len": 320, "bucket_size": 8, "causal": True},
     {"lengths": (8, 40, 296)}),
    ("perceiver AR", "perceiver_ar_pytorch:PerceiverAR", "perceiver-ar-pytorch",
     {**_SMALL, "heads": 4, "dim_head": 32, "max_seq_len": 320, "cross_attn_seq_len": 4}, {}),
    ("titans, memory as context", "titans_pytorch:MemoryAsContextTransformer", "titans-pytorch",
     {**_HEADED, "segment_len": 8, "num_persist_mem_tokens": 2, "num_longterm_mem_tokens": 2,
      "use_flex_attn": False, "neural_memory_layers": ()}, {"lengths": (8, 40, 104)}),
    ("RWKV-6", "rwkv_simple:RWKV", "rwkv-simple",
     {"d_model": 32, "d_head": 8, "n_layer": 3, "vocab_size": VOCABULARY}, {}),
):  # fmt: skip
    add(name, package, given(path, **arguments), **rest)

add(
    "RetNet",
    "yet-another-retnet",
    given(
        "yet_another_retnet.retnet:RetNet", num_tokens=VOCABULARY, d_model=32, nhead=4,
        num_layers=3, dim_feedforward=48, dropout=0.0,
    ),
    call=lambda model, tokens: model.forward_parallel(tokens),
)  # fmt: skip


def torchscale(kind: str, **changes: Any) -> Any:
    def build() -> nn.Module:
        from torchscale.architecture import config, decoder, retnet
        from torchscale.component.embedding import PositionalEmbedding

        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY, "decoder_embed_dim": 32, "decoder_attention_heads": 4,
            "decoder_ffn_embed_dim": 48, "decoder_layers": 3, "max_target_positions": 320,
            "decoder_value_embed_dim": 64, "decoder_retention_heads": 4,
        }  # fmt: skip
        embedding = nn.Embedding(VOCABULARY, 32)
        if kind == "retnet":
            return retnet.RetNetDecoder(config.RetNetConfig(**settings, **changes), embedding)
        made = config.DecoderConfig(**settings, **changes)
        places = None if made.xpos_rel_pos or made.rel_pos_buckets else PositionalEmbedding(330, 32)
        return decoder.Decoder(made, embedding, places)

    return build


for name, build in {
    "decoder, norms inside": torchscale("decoder"),
    "decoder, xpos": torchscale("decoder", xpos_rel_pos=True, subln=False),
    "decoder, deepnorm, T5 bias, tied": torchscale(
        "decoder", deepnorm=True, rel_pos_buckets=32, max_rel_pos=128,
        share_decoder_input_output_embed=True,
    ),
    "RetNet": torchscale("retnet"),
}.items():  # fmt: skip
    add(f"torchscale {name}", "torchscale", build)


def curated(kind: str, **changes: Any) -> Any:
    def build() -> nn.Module:
        home = import_module("curated_transformers.models")
        settings: dict[str, Any] = {
            "hidden_width": 32, "n_hidden_layers": 3, "n_pieces": VOCABULARY,
            "dtype": torch.float32,
        }  # fmt: skip
        if kind != "MPT":
            settings["rotary_embedding_fraction"] = 1.0
        config = getattr(home, f"{kind}Config")(**settings, **changes)
        return getattr(home, f"{kind}CausalLM")(config)

    return build


def curated_call(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    from curated_transformers.layers import AttentionMask

    seen = torch.ones_like(tokens) if mask is None else mask
    return model(tokens, AttentionMask(seen.bool()))


for name, build in {
    "Llama": curated("Llama", intermediate_width=48, n_query_heads=4, n_key_value_heads=2),
    "Falcon MQA": curated("Falcon", n_query_heads=4, n_key_value_heads=1),
    "Falcon, new": curated(
        "Falcon", new_decoder_architecture=True, n_query_heads=4, n_key_value_heads=2, use_bias=True
    ),
    "Falcon, ALiBi": curated(
        "Falcon", n_query_heads=4, n_key_value_heads=4, use_alibi=True, use_parallel_attention=False
    ),
    "GPT-NeoX": curated("GPTNeoX", intermediate_width=48, n_attention_heads=4),
    "MPT": curated("MPT", n_attention_heads=4, intermediate_width_multiplier=2),
}.items():
    add(f"curated {name}", "curated-transformers", build, call=curated_call, masked=curated_call)

# ------------------------------------------------------- parts of packages in a decoder of ours


class First(nn.Module):
    """Returns the first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        out = self.module(x)
        return out if isinstance(out, torch.Tensor) else out[0]


def within(role: str, path: str, **arguments: Any) -> Any:
    def build() -> nn.Module:
        from unseen.own import Block, Net

        def block() -> nn.Module:
            part = First(given(path, **arguments)())
            return Block(part, None) if role == "attention" else Block(None, part)

        return Net(block, depth=2)

    return build


_PART = {"dim": 32, "heads": 4, "dim_head": 8}
for name, package, build, rest in (
    ("Taylor series attention", "taylor-series-linear-attention",
     within("attention", "taylor_series_linear_attention:TaylorSeriesLinearAttn", **_PART), {}),
    ("Taylor series attention, one KV head, gated", "taylor-series-linear-attention",
     within("attention", "taylor_series_linear_attention:TaylorSeriesLinearAttn", **_PART,
            one_headed_kv=True, gate_value_heads=True), {}),
    ("agent attention, talking heads", "agent-attention-pytorch",
     within("attention", "agent_attention_pytorch:AgentSelfAttention", **_PART,
            num_agent_tokens=6), {}),
    ("mixture of experts, GShard", "mixture-of-experts",
     within("ffn", "mixture_of_experts:MoE", dim=32, num_experts=4, hidden_dim=48,
            second_policy_eval="all", second_policy_train="all"), {}),
    ("soft mixture of experts", "soft-moe-pytorch",
     within("ffn", "soft_moe_pytorch:SoftMoE", dim=32, num_experts=4, num_slots=2,
            expert_mult=2), {}),
    ("ST mixture of experts", "st-moe-pytorch",
     within("ffn", "st_moe_pytorch:MoE", dim=32, num_experts=4, expert_hidden_mult=2,
            threshold_eval=0.0), {}),
    ("gate loop layer as attention", "gateloop-transformer",
     within("attention", "gateloop_transformer.simplified_gate_loop:SimpleGateLoopLayer", dim=32),
     {}),
):  # fmt: skip
    add(name, package, build, **rest)


class _Rotated(nn.Module):
    """Attention with grouped heads that rotates by a package's module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from rotary_embedding_torch import RotaryEmbedding

        self.heads, self.groups = 4, 2
        self.qkv, self.o = nn.Linear(32, 8 * (4 + 2 * 2)), nn.Linear(32, 32)
        self.rotary = RotaryEmbedding(**settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (
            part.unflatten(-1, (-1, 8)).transpose(1, 2)
            for part in self.qkv(x).split([32, 16, 16], dim=-1)
        )
        q, k = self.rotary.rotate_queries_or_keys(q), self.rotary.rotate_queries_or_keys(k)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=0.3
        )
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


def rotated(**settings: Any) -> Any:
    def build() -> nn.Module:
        from unseen.own import Block, Net

        return Net(lambda: Block(_Rotated(**settings)), depth=3)

    return build


add("rotary embedding, fused GQA", "rotary-embedding-torch", rotated(dim=8))
add("rotary embedding, half rotated", "rotary-embedding-torch", rotated(dim=4, theta=500))


def hyper_connected(**settings: Any) -> Any:
    def build() -> nn.Module:
        from hyper_connections import HyperConnections

        from unseen.own import Attention, FeedForward, Net

        start, expand, reduce = HyperConnections.get_init_and_expand_reduce_stream_functions(3)

        class Streams(Net):
            def __init__(self) -> None:
                super().__init__(lambda: nn.Identity(), 0)
                self.expand, self.reduce = expand, reduce
                self.layers = nn.ModuleList(
                    start(dim=32, branch=nn.Sequential(nn.LayerNorm(32), part()), **settings)
                    for _ in range(2)
                    for part in (Attention, FeedForward)
                )

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                x = self.expand(self.embedding(ids))
                for layer in self.layers:
                    x = layer(x)
                return self.head(self.norm(self.reduce(x)))

        return Streams()

    return build


add("hyper-connections, three streams", "hyper-connections", hyper_connected())
add("hyper-connections, no tanh", "hyper-connections", hyper_connected(tanh=False))


class _LabmlBlock(nn.Module):
    """A layer of labml over (tokens, batch, channels) and its mask."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        from labml_nn.transformers.feed_forward import FeedForward
        from labml_nn.transformers.mha import MultiHeadAttention
        from labml_nn.transformers.models import TransformerLayer

        self.layer = TransformerLayer(
            d_model=32,
            self_attn=MultiHeadAttention(4, 32, 0.0),
            feed_forward=FeedForward(32, 48, 0.0, nn.SiLU(), gated),
            dropout_prob=0.0,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool).tril()[:, :, None]
        return self.layer(x=x.transpose(0, 1), mask=mask).transpose(0, 1)


def labml(gated: bool) -> Any:
    def build() -> nn.Module:
        from unseen.own import Net

        return Net(lambda: _LabmlBlock(gated), depth=3)

    return build


add("labml transformer", "labml-nn", labml(False))
add("labml transformer, gated", "labml-nn", labml(True))


def xlstm(**settings: Any) -> Any:
    def build() -> nn.Module:
        import xlstm

        mlstm = xlstm.mLSTMBlockConfig(
            mlstm=xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
        )
        return xlstm.xLSTMLMModel(
            xlstm.xLSTMLMModelConfig(
                vocab_size=VOCABULARY, embedding_dim=32, num_blocks=3, context_length=320,
                mlstm_block=mlstm, **settings,
            )
        )  # fmt: skip

    return build


add("xlstm", "xlstm", xlstm())
add("xlstm tied", "xlstm", xlstm(tie_weights=True))
