"""What transformers leaves out, and adds, when it reads a GGUF file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_pruner.errors import UserError

_MOST_HEADER = 2**26
"""Bytes in which the header of a file is looked for: names, numbers and the vocabulary."""

_SIGNS = (b".rope.scal", b"rope_freqs", b"rope_factors")

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all published models of this kind have; only the factor differs."""


def require_biases(model: Any, file: Path) -> None:
    """Raise UserError if a file has biases that the model was built without, and so not read."""
    start = _header(file)
    found = {name.decode() for name in re.findall(rb"blk\.\d+\.\w+\.bias", start)}
    if not found:
        return
    from transformers.integrations import gguf
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = _architecture(start)
    if architecture in getattr(gguf, "GGUF_ARCHS", ()):
        return  # another reader, which says itself what it leaves out
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    read = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    if left := sorted(found - read.keys()):
        raise UserError(
            f"{file} has biases, {left[0]} first, that transformers does not read into a "
            f"{type(model).__name__}; name the folder that it was made of"
        )


def _architecture(start: bytes) -> str:
    """Return what the header of a file says of its kind; nothing if it says nothing."""
    key = b"general.architecture" + struct.pack("<I", 8)  # a text: its length, and its bytes
    place = start.find(key) + len(key)
    if place < len(key):
        return ""
    (length,) = struct.unpack_from("<Q", start, place)
    return start[place + 8 : place + 8 + length].decode(errors="replace")


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_MOST_HEADER)


def scale_rotary_(config: Any, file: Path) -> None:
    """Give a config the base and the scaling of rotary embeddings that its file has.

    Raises:
        UserError: there is a scaling that the file does not tell in full.
    """
    start = _header(file)
    base = re.search(rb"\.rope\.freq_base\x06\0\0\0(.{4})", start, re.DOTALL)  # 6: a float
    rotary = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if base is not None and "rope_theta" in rotary:
        rotary["rope_theta"] = struct.unpack("<f", base[1])[0]
    if not any(sign in start for sign in _SIGNS):
        return  # to parse the header takes seconds
    from gguf import GGUFReader

    reader = GGUFReader(file)
    said = {
        key.partition(".rope.")[2]: field.contents()
        for key, field in reader.fields.items()
        if ".rope." in key
    }
    tensors = [one for one in reader.tensors if one.name.startswith(("rope_freqs", "rope_factors"))]
    factors = [np.asarray(one.data, np.float64) for one in tensors if not (one.data == 1).all()]
    factor = float(said.get("scaling.factor") or said.get("scale_linear") or 1)
    kind = str(said.get("scaling.type", "none" if factor == 1 else "linear"))
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor != 1)
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    if not (scaled or factors) or rotary.get("rope_type", "default") != "default":
        return
    kinds = {one.get("rope_type") for one in rotary.values() if isinstance(one, dict)}
    if not scaled and "proportional" in kinds and all(_leaves_out(one) for one in factors):
        return
    if "rope_theta" in rotary and scaled and kind == "linear" and not factors:
        rotary |= {"rope_type": "linear", "factor": factor}
    elif "rope_theta" in rotary and not scaled and _is_llama3(text, factors[0]):
        rotary |= _LLAMA3 | {"factor": float(factors[0].max())}
    else:
        raise UserError(
            f"{file} has rotary embeddings that are scaled "
            f"({kind if scaled else tensors[0].name}), and does not say all that makes them up; "
            "name the folder or the hub id of the model that it was made of"
        )


def _leaves_out(factors: Any) -> bool:
    """Whether factors of frequencies leave some as they are, and turn the others not at all."""
    return bool(((factors == 1) | (factors > 1e29)).all())


def _is_llama3(config: PreTrainedConfig, factors: Any) -> bool:
    """Whether factors of frequencies, (head size / 2,), are those of Llama 3."""
    trial = type(config).from_dict(config.to_dict())
    usual = trial.rope_parameters
    trial.rope_parameters = usual | _LLAMA3 | {"factor": float(factors.max())}
    found = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))[0].double()
    size = 2 * len(found)
    plain = usual["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    expected = (plain / found).numpy()
    return factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4)


def drop_tokens_beyond_(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Take the added tokens out of a tokenizer that have no row in the embedding.

    transformers adds such to the tokenizer of a file that lacks a token by which it knows its kind.

    Args:
        rows: of the embedding.
    """
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    added = [] if backend is None else [*backend.get_added_tokens_decoder().items()]
    gone = {str(token) for index, token in added if index >= rows}
    if not gone:
        return
    data = json.loads(backend.to_str())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["id"] < rows]
    for name, token in tokenizer.special_tokens_map.items():
        if token in gone:
            setattr(tokenizer, name, None)
    extra = getattr(tokenizer, "extra_special_tokens", [])
    tokenizer.extra_special_tokens = [one for one in extra if str(one) not in gone]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(data))
