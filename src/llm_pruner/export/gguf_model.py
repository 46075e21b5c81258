"""What a model is in llama.cpp: an architecture, its settings, and tensors under other names.

All that surgery may have changed is read from the modules. Few of llama.cpp's architectures read
sizes per layer: ``deci`` computes what Llama and Qwen2 do, and ``openelm`` what Qwen3 does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gguf
import torch

from llm_pruner.checkpoints.remote_code import is_of_transformers, stock_class
from llm_pruner.errors import UserError

FAMILIES = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
}
"""``model_type`` -> architecture for equal layers, and for unequal ones."""

_PAIRED = ("llama", "deci")
"""Architectures that rotate neighbours, not halves of a head, and read a factor per frequency."""

_BIASES = {
    "llama": "self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj",
    "deci": "self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj",
    "qwen2": "self_attn.[qkv]_proj",
}
"""Linear modules whose bias an architecture reads; others read none."""

_LINEAR = ("default", "linear")
_STATIC = (*_LINEAR, "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not depend on the length of the text."""

_ARCHITECTURES = {name: of for of, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file; its shape is (outputs, inputs), as in PyTorch."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class _Sizes(NamedTuple):
    heads: int
    key_value_heads: int
    width: int


@dataclass(frozen=True)
class GgufModel:
    """A model as llama.cpp reads it; ``values``: method of ``GGUFWriter`` -> what it adds."""

    architecture: str
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]


def gguf_model(model: Any, name: str) -> GgufModel:
    """Return a model in llama.cpp's terms, weights to be read later; UserError if it has none."""
    config = model.config
    own_code = not is_of_transformers(stock_class(type(model)))
    silu = getattr(config, "hidden_act", None) in ("silu", "swish")
    if config.model_type not in FAMILIES or own_code or not silu:
        raise UserError(
            f"{name} is a {type(model).__name__} of the type {config.model_type}, which is not "
            f"exported to GGUF; known are {', '.join(FAMILIES)} with silu and transformers' own "
            "code. If its layers are equal (prune --uniform), llama.cpp's own "
            "convert_hf_to_gguf.py may read the folder"
        )
    layers = model.base_model.layers
    head_dim = _head_dim(layers, name)
    sizes = tuple(_sizes(layer, head_dim) for layer in layers)
    rope = _Rope.of(model, head_dim, name)
    architecture = _architecture(model, sizes, head_dim, rope, name)
    tensors = tuple(_tensors(model, architecture, head_dim, rope, name))
    per_layer = map(list, zip(*sizes, strict=True))
    equal = len(set(sizes)) == 1
    heads, key_value_heads, widths = (values[0] if equal else values for values in per_layer)
    values = {
        # By this very name transformers takes a Llama for something that it cannot read.
        "add_name": "Mistral" if name == "mistral" else name,
        "add_vocab_size": model.get_input_embeddings().weight.shape[0],
        "add_context_length": _context(config),
        "add_embedding_length": model.get_input_embeddings().weight.shape[1],
        "add_block_count": len(layers),
        "add_feed_forward_length": widths,
        "add_head_count": heads,
        "add_head_count_kv": key_value_heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_layer_norm_rms_eps": model.base_model.norm.variance_epsilon,
        "add_rope_dimension_count": head_dim,
        "add_rope_freq_base": rope.theta,
    }
    if rope.linear != 1:
        values["add_rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        values["add_rope_scaling_factor"] = rope.linear
    return GgufModel(architecture, values, tensors)


def _head_dim(layers: Any, name: str) -> int:
    found = set()
    for attention in (layer.self_attn for layer in layers):
        size = attention.head_dim
        heads = attention.q_proj.out_features // size
        groups = attention.k_proj.out_features // size
        values = attention.v_proj.out_features // groups
        found |= {size, attention.o_proj.in_features // heads, values}
    if len(found) > 1:
        raise UserError(
            f"the heads of {name} have sizes {', '.join(map(str, sorted(found)))}, and llama.cpp "
            "takes one for all; prune with --uniform, or no head_dim"
        )
    return int(found.pop())


def _sizes(layer: Any, head_dim: int) -> _Sizes:
    attention = layer.self_attn
    return _Sizes(
        attention.q_proj.out_features // head_dim,
        attention.k_proj.out_features // head_dim,
        # llama.cpp leaves the attention out, too, where a layer has no FFN: one of zeros instead.
        max(1, layer.mlp.gate_proj.out_features),
    )


def _architecture(
    model: Any, sizes: tuple[_Sizes, ...], head_dim: int, rope: _Rope, name: str
) -> str:
    """Return the first architecture of the family that holds the model."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    biases = [path for path, _ in model.named_parameters() if path.endswith(".bias")]
    equal = len(set(sizes)) == 1
    own, unequal = FAMILIES[model.config.model_type]

    def wants(one: str) -> Iterator[str]:
        """Yield what an architecture takes and the model is not."""
        if one == own and not equal:
            yield "layers of one size"
        if one == "qwen2" and sizes[0].heads * head_dim != embeddings.shape[1]:
            yield "queries as wide as the hidden state"
        if one == "openelm" and head is not embeddings:
            yield "one matrix for embeddings and output"
        if one not in _PAIRED and rope.factors is not None:
            yield f"rotary embeddings of the type {' or '.join(_LINEAR)}"
        unread = [path for path in biases if not re.fullmatch(_BIASES.get(one, ""), _module(path))]
        if unread:
            yield f"no {unread[0]}"

    wanted = {one: list(wants(one)) for one in (own, unequal)}
    for one, missing in wanted.items():
        if not missing:
            return one
    said = "; ".join(f"{one} takes {' and '.join(missing)}" for one, missing in wanted.items())
    way = "export a model without these" if equal else "prune with --uniform, for equal layers"
    raise UserError(f"llama.cpp has no architecture for {name} ({said}); {way}")


def _module(path: str) -> str:
    """Return the path of a parameter's module inside its layer."""
    return re.sub(r".*layers\.\d+\.", "", path.rpartition(".")[0])


def _context(config: Any) -> int:
    """Return the longest text; within a window all attention is the same as without one."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    slides = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if window is not None and (slides or config.model_type == "mistral"):
        return min(longest, int(window))
    return longest


@dataclass(frozen=True)
class _Rope:
    """Rotary embeddings: frequency i is ``theta ** (-2 i / head_dim) / linear / factors[i]``.

    Attributes:
        scale: of queries, by which yarn makes all scores larger.
    """

    theta: float
    linear: float
    factors: torch.Tensor | None
    scale: float

    @classmethod
    def of(cls, model: Any, head_dim: int, name: str) -> _Rope:
        config, rotary = model.config, model.base_model.rotary_emb
        said = getattr(config, "rope_parameters", None) or {}
        kind = said.get("rope_type", "default")
        frequencies = rotary.inv_freq.detach().double().cpu()
        if kind not in _STATIC or 2 * len(frequencies) != head_dim:
            raise UserError(
                f"{name} has rotary embeddings of the type {kind} over {2 * len(frequencies)} of "
                f"{head_dim} channels, which is not exported to GGUF; known are "
                f"{', '.join(_STATIC)} over all channels"
            )
        theta = float(said.get("rope_theta") or config.rope_theta)
        usual = theta ** (
            -torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        )
        factors = usual / frequencies
        scale = float(getattr(rotary, "attention_scaling", 1.0)) ** 2
        if not torch.allclose(factors, factors.mean(), rtol=1e-5):
            return cls(theta, 1.0, factors.float(), scale)
        linear = 1.0 if abs(factors.mean() - 1) < 1e-5 else float(factors.mean())
        return cls(theta, linear, None, scale)


def _tensors(
    model: Any, architecture: str, head_dim: int, rope: _Rope, name: str
) -> Iterator[Tensor]:
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], len(model.base_model.layers))
    if (factors := rope.factors) is not None:
        yield Tensor("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for path, parameter in model.named_parameters():  # tied ones once
        owner, _, what = path.rpartition(".")
        module = _module(path)
        found = names.get_name(owner)
        if architecture == "openelm" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            continue  # with the values, in one matrix
        parts = [parameter]
        if architecture == "openelm" and module == "self_attn.v_proj":
            attention = model.get_submodule(owner.rpartition(".")[0])
            parts = [attention.q_proj.weight, attention.k_proj.weight, parameter]
            found = names.get_name(f"{owner.rpartition('.')[0]}.qkv_proj")
        if found is None:
            raise UserError(
                f"{name} has {path}, which llama.cpp does not read in the architecture "
                f"{architecture}; export the model without it"
            )
        change = _change(model, module, owner, architecture, head_dim, rope)
        rows = sum(len(part) for part in parts)
        shape = tuple(max(1, size) for size in (rows, *parameter.shape[1:]))
        yield Tensor(f"{found}.{what}", shape, partial(_read, parts, change, shape))


def _read(
    parts: list[torch.Tensor],
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    value = parts[0].detach() if len(parts) == 1 else torch.cat([one.detach() for one in parts])
    value = value.new_zeros(shape) if value.numel() == 0 else value
    return value if change is None else change(value)


def _change(
    model: Any, module: str, owner: str, architecture: str, head_dim: int, rope: _Rope
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what is done to a weight; None: nothing."""
    if not module.startswith("self_attn"):
        return None
    attention = model.get_submodule(owner.rpartition(".")[0])
    normed = hasattr(attention, "q_norm")
    # llama.cpp divides scores by the root of the head size, whatever it was before pruning.
    scale = attention.scaling * head_dim**0.5 * rope.scale
    scaled = abs(scale - 1) > 1e-6 and module == (
        "self_attn.q_norm" if normed else "self_attn.q_proj"
    )
    paired = architecture in _PAIRED and module in ("self_attn.q_proj", "self_attn.k_proj")
    if not scaled and not paired:
        return None

    def changed(value: torch.Tensor) -> torch.Tensor:
        value = value.float() * scale if scaled else value
        return neighbours(value, head_dim) if paired else value

    return changed


def neighbours(value: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rows of queries or keys, (heads * head_dim, ...), with rotary pairs side by side.

    In transformers, row i of a head makes a pair with row ``i + head_dim / 2``.
    """
    halves = value.reshape(-1, 2, head_dim // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)
