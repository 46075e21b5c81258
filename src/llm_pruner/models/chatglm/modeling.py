"""ChatGLM-6B on the interfaces of current ``transformers``.

With LN the layer norms and alpha = ``residual_scale``, a block computes

    a = LN1(x),  y = alpha a + Attention(a),  b = LN2(y),  z = alpha b + FFN(b)

so the residual stream passes through every norm. Queries, keys and values come from one matrix,
whose rows are ordered (head, [query, key, value], channel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llm_pruner.models.chatglm.configuration import ChatGLMConfig

if TYPE_CHECKING:
    from typing_extensions import Self

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
"""Output field that holds the cache; earlier releases of transformers call it past_key_values."""
_BASE = 10000.0
"""Base of the rotary frequencies; the published config has no key for it."""

Rotations = list[tuple[torch.Tensor, torch.Tensor]]
"""Cosine and sine for each kind of position, each of shape (batch, 1, sequence, channels)."""


class ChatGLMRotaryEmbedding(nn.Module):
    """Rotary frequencies; each block has its own, so that its channels can be pruned alone."""

    inv_freq: torch.Tensor

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move with the model, and stay float32 whatever the model is cast to."""
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != before.dtype:
            # In bfloat16 a channel would turn wrong by more than a radian at position 1000.
            self.inv_freq = before.to(self.inv_freq.device)
        return self

    def forward(self, places: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Rotations:
        """Return the rotations of positions, each of shape (batch, sequence)."""
        rotations = []
        for place in places:
            angles = place[:, None, :, None] * self.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            rotations.append((angles.cos().to(dtype), angles.sin().to(dtype)))
        return rotations


def inverse_frequencies(config: ChatGLMConfig) -> torch.Tensor:
    """Return base^(-2 i / d) for i < d / 2, d being half a head, rounded to half precision.

    So the published model has them; exact ones differ by a tenth of a radian at position 1000.
    """
    rotated = config.head_dim // 2
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    return (1.0 / _BASE**exponents).half().float()


def rotate(states: torch.Tensor, rotations: Rotations) -> torch.Tensor:
    """Rotate the two halves of each head, (batch, heads, sequence, channels), by two positions.

    In a half of d channels, channel i and channel i + d / 2 form a pair.
    """
    parts = []
    for part, (cos, sin) in zip(states.chunk(len(rotations), dim=-1), rotations, strict=True):
        first, second = part.chunk(2, dim=-1)
        parts.append(part * cos + torch.cat((-second, first), dim=-1) * sin)
    return torch.cat(parts, dim=-1)


def eager_attention(
    module: nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (batch, sequence, heads, channels) and the weights, with scores in float32."""
    scores = (query.float() * scaling) @ key.float().transpose(-2, -1)
    scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch are read: ``padding context [gMASK] <sop> answer``; shape (batch,).

    Attributes:
        padding: number of padding tokens on the left.
        context: number of tokens before the first ``<sop>``, without padding. They see each other
            both ways, and every later token sees them all.
        mask_position: place of the first [gMASK], or else [MASK], without padding.
    """

    padding: torch.Tensor
    context: torch.Tensor
    mask_position: torch.Tensor


def read_layout(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    bos_token_id: int | None,
    mask_token_id: int,
    gmask_token_id: int,
) -> Layout:
    """Find context and mask token of each row of ids, (batch, sequence), or of embeddings.

    A row without ``<sop>``, or of embeddings, is plain text: an answer to an empty context. In a
    row with ``<sop>`` and no mask token the last token of the context stands for it.
    """
    zero = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    padding = zero if attention_mask is None else _first(attention_mask != 0)
    if tokens.dim() > 2:
        return Layout(padding, zero, zero)
    starts = tokens == (-1 if bos_token_id is None else bos_token_id)
    gmasks, masks = tokens == gmask_token_id, tokens == mask_token_id
    has_start, has_gmask, has_mask = (hit.any(dim=1) for hit in (starts, gmasks, masks))
    context = torch.where(has_start, _first(starts) - padding, 0)
    mask_position = torch.where(
        has_gmask,
        _first(gmasks) - padding,
        torch.where(has_mask, _first(masks) - padding, (context - 1).clamp(min=0)),
    )
    mask_position = torch.where(has_start, mask_position, 0)
    return Layout(padding, context, mask_position)


def positions(layout: Layout, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and block positions of tokens ``start`` to ``start + length``.

    Both (batch, length). A token of the context has its place as position and 0 as block position;
    one of the answer has the mask token's position, and block positions from 1 at ``<sop>``.
    """
    place = torch.arange(start, start + length, device=layout.padding.device)
    place = (place[None] - layout.padding[:, None]).clamp(min=0)
    context, mask_position = layout.context[:, None], layout.mask_position[:, None]
    in_answer = place >= context
    return (
        torch.where(in_answer, mask_position, place),
        torch.where(in_answer, place - context + 1, 0),
    )


def visible(
    layout: Layout, start: int, queries: int, keys: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return which keys each query sees, bool of shape (batch, 1, queries, keys).

    A query sees the context of its row, all tokens before it, and itself; nothing sees padding but
    padding itself, so that no row of the softmax is empty. The first query stands at ``start``.
    """
    key = torch.arange(keys, device=layout.padding.device)[None, None]
    query = torch.arange(start, start + queries, device=layout.padding.device)[None, :, None]
    padding, context = layout.padding[:, None, None], layout.context[:, None, None]
    seen = (key <= query) | (key < padding + context)
    seen = seen & (key >= padding)
    if attention_mask is not None:
        real = attention_mask.bool()
        # A cache of fixed size has places that are not filled yet; they come after every query.
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]), value=True)
        seen = seen & real[:, None]
    return (seen | (key == query))[:, None]


def _first(hits: torch.Tensor) -> torch.Tensor:
    """Return the place of the first True in each row, 0 where there is none."""
    return hits.long().argmax(dim=1)


class ChatGLMAttention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # the mask says everything
        inner = config.num_attention_heads * config.head_dim
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * inner)
        self.dense = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        places: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, shape (batch, sequence, hidden_size), and the weights if known."""
        rows = hidden_states.shape[:-1]
        fused = self.query_key_value(hidden_states).view(*rows, -1, 3 * self.head_dim)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        rotations = self.rotary_emb(places, query.dtype)
        query, key = rotate(query, rotations), rotate(key, rotations)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return self.dense(output.reshape(*rows, -1)), weights


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer; see the module's formula."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.layernorm_epsilon
        self.residual_scale = config.residual_scale
        self.input_layernorm = nn.LayerNorm(size, eps=epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=epsilon)
        self.mlp = GPTNeoXMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        places: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map (batch, sequence, hidden_size) to the same shape."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, places, attention_mask, cache, **kwargs)
        hidden_states = normed * self.residual_scale + attended
        normed = self.post_attention_layernorm(hidden_states)
        return normed * self.residual_scale + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What both models share: how they are initialised and loaded."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ChatGLMBlock",)
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_attention_backend = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ChatGLMBlock,
        "attentions": ChatGLMAttention,
    }
    # Published checkpoints hold the frequencies of every block; they follow from the config.
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            initialization.copy_(module.inv_freq, inverse_frequencies(self.config))


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The embedding and the blocks, without the output layer."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; arguments are those of models of transformers.

        Positions and the mask follow from where ``<sop>`` and [gMASK] stand in ``input_ids`` (see
        ``Layout``), which the cache remembers for later tokens. Embeddings without ids are read as
        plain text.

        Raises:
            ValueError: neither or both of ids and embeddings, positions from outside, or a cache
                that another model filled.
        """
        earlier = kwargs.pop("past_key_values", None)
        cache = cache if earlier is None else earlier
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("ChatGLM finds positions from the tokens; leave position_ids out")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = inputs_embeds if input_ids is None else input_ids
        layout = self._layout(tokens, attention_mask, cache, past)
        length = inputs_embeds.shape[1]
        keys = past + length if cache is None else cache.get_mask_sizes(length, 0)[0]
        places = positions(layout, past, length)
        mask = visible(layout, past, length, keys, attention_mask)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, places, mask, cache, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states),
            **{_CACHE: cache if use_cache else None},
        )

    def _layout(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any, past: int
    ) -> Layout:
        """Return how rows are read, of ids or embeddings, shape (batch, sequence, ...)."""
        if past:
            layout: Layout | None = getattr(cache, "chatglm_layout", None)
            if layout is None or len(layout.padding) != len(tokens):
                raise ValueError("the cache is of other rows; use one that this model filled")
            return layout
        layout = read_layout(
            tokens,
            attention_mask,
            bos_token_id=self.config.bos_token_id,
            mask_token_id=self.config.mask_token_id,
            gmask_token_id=self.config.gmask_token_id,
        )
        if cache is not None:
            cache.chatglm_layout = layout
        return layout


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer, under the name of the published class."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "transformer.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor | None:
        """Leave padding masks as they are: the prefix is seen in ``forward`` alone."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, shape (batch, sequence, vocab_size), and the loss if there are labels."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: getattr(outputs, _CACHE)},
        )
