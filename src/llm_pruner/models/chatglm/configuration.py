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
        position_encoding_2d: half of a head's channels are rotated by the position in the context,
            half by the position in the answer; if false, all by one position.
        head_dim: channels of a head; ``hidden_size // num_attention_heads`` if 0. The published
            code has no such key: it is there for models that lost heads or hidden channels.
        residual_scale: factor alpha of the residual connections; ``sqrt(2 * num_layers)`` if 0.
            Kept as a number, because a model that lost layers still needs the alpha it was trained
            with. No such key in the published code either.
        tie_word_embeddings: the output layer shares the weight of the embedding.
        quantization_bit, pre_seq_len, prefix_projection: keys of quantized and prompt-tuned
            variants, which are not supported: 0, None and False.

    Raises:
        UserError: the values are those of such a variant, or of ChatGLM2 or later; or the sizes do
            not fit together.
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
        later = [key for key in _LATER_KEYS if key in kwargs]
        if later:
            raise UserError(
                f"this 'chatglm' config has {later[0]}, so it is ChatGLM2 or later, another "
                "architecture under the same model type; only ChatGLM-6B is known here: use a "
                "checkpoint in the format of transformers' own 'glm' models"
            )
        # The code that a published checkpoint points to is replaced by this package.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        if self.quantization_bit:
            raise UserError(
                f"quantization_bit={self.quantization_bit}: the weights are packed integers, which "
                "cannot be read here; name the float16 checkpoint"
            )
        if self.pre_seq_len is not None or self.prefix_projection:
            raise UserError(
                f"pre_seq_len={self.pre_seq_len}: the checkpoint has a tuned prefix, which cannot "
                "be read here; name the checkpoint without it"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size={self.hidden_size} is no multiple of num_attention_heads="
                    f"{self.num_attention_heads}; set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        pairs = 4 if self.position_encoding_2d else 2
        if self.head_dim % pairs:
            raise UserError(
                f"head_dim={self.head_dim} is no multiple of {pairs}, so its channels cannot be "
                "rotated in pairs; change it, hidden_size or num_attention_heads"
            )
        if not self.residual_scale:
            self.residual_scale = math.sqrt(2 * self.num_layers)
