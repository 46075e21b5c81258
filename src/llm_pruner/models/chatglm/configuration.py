"""Configuration of ChatGLM-6B, with the keys of the published ``config.json``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from llm_pruner.errors import UserError

_LATER_KEYS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size")
"""Keys of ChatGLM2 and later, which share the model type and nothing else."""


class ChatGLMConfig(PreTrainedConfig):
    """Sizes and token ids; the defaults are those of ChatGLM-6B.

    Attributes:
        inner_hidden_size: width of a feed-forward network.
        max_sequence_length: longest input that the model was trained on.
        head_dim: channels of a head; ``hidden_size // num_attention_heads`` if 0. The published
            code has no such key: models that lost heads or hidden channels need it.
        residual_scale: factor alpha of the residual connections; ``sqrt(2 * num_layers)`` if 0.
            A model that lost layers keeps the alpha it was trained with. Not in the published code.
        tie_word_embeddings: the output layer shares the weight of the embedding.
        quantization_bit, pre_seq_len, position_encoding_2d: keys of variants that are refused.

    Raises:
        UserError: the values are those of such a variant, or of ChatGLM2 or later.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    hidden_act: ClassVar[str] = "gelu_pytorch_tanh"

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    layernorm_epsilon: float = 1e-5
    head_dim: int = 0
    residual_scale: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    quantization_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        later = next((key for key in _LATER_KEYS if key in kwargs), None)
        # The code that a published checkpoint points to is replaced by this package.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        known = {"quantization_bit": 0, "pre_seq_len": None, "position_encoding_2d": True}
        other = [later] if later else [k for k, value in known.items() if vars(self)[k] != value]
        if other:
            raise UserError(
                f"this config has another {other[0]} than ChatGLM-6B, the one chatglm that is "
                "known; name its float16 checkpoint, or one of transformers' own 'glm' models"
            )
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.residual_scale = self.residual_scale or math.sqrt(2 * self.num_layers)
