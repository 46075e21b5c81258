"""What transformers leaves out, and adds, when it reads a GGUF file."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_pruner.errors import UserError

_MOST_HEADER = 2**26
"""Bytes in which the header of a file is looked for: names, numbers and the vocabulary."""

_TEXT = 8
_NUMBERS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q"}
"""Kinds of values in a header, those of numbers with their form; lists are of another kind."""

_WEIGHT = re.compile(rb"\0{7}(blk\.\d+\.[\w.]+|(?!rope_)\w+\.(?:weight|bias))[\1-\4]\0{3}")
"""A tensor in a header: its name behind the length of that, and how many dimensions it has."""

_SIZES = {
    "gpt2": {"context_length": "n_positions"},
    "nemotron": {"attention.key_length": "head_dim"},
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
"""Architecture -> key of a size that transformers leaves out -> its name in the config."""

_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Architecture -> layers of its 27B, whose attention llama.cpp scales by the hidden size."""

_SIGNS = (b".rope.scal", b"rope_freqs", b"rope_factors")

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all published models of this kind have; only the factor differs."""


def require_all_read(model: Any, file: Path) -> None:
    """Raise UserError if a file has weights that the model was built without, and so not read."""
    start = _header(file)
    from transformers.integrations import gguf
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = str(_said(start, "general.architecture"))
    if architecture in getattr(gguf, "GGUF_ARCHS", ()):
        return  # another reader, which says itself what it leaves out
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    read = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    names = {name[1].decode() for name in _WEIGHT.finditer(start)}
    # Those of experts lie in one tensor there, whose name ends earlier.
    left = {one for one in names if one.replace("_exps.weight", "_exps") not in read}
    if left:
        raise UserError(
            f"{file} has {len(left)} weights, {min(left)} first, that transformers does not read "
            f"into a {type(model).__name__}; name the folder that it was made of"
        )


def weights_in(file: Path) -> int:
    """Return how many numbers the weights of a file are, by its header."""
    start = _header(file)
    sizes = (
        struct.unpack_from(f"<{start[one.end() - 4]}Q", start, one.end())
        for one in _WEIGHT.finditer(start)
    )
    return sum(map(math.prod, sizes))


def _said(start: bytes, key: str) -> Any:
    """Return what the header of a file says under a key; None if that is no number and no text."""
    name = struct.pack("<Q", len(key)) + key.encode()
    place = start.find(name) + len(name)
    if place < len(name):
        return None
    (kind,) = struct.unpack_from("<I", start, place)
    if kind == _TEXT:
        (length,) = struct.unpack_from("<Q", start, place + 4)
        return start[place + 12 : place + 12 + length].decode(errors="replace")
    return struct.unpack_from(_NUMBERS[kind], start, place + 4)[0] if kind in _NUMBERS else None


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_MOST_HEADER)


def complete_from_gguf_(config: Any, file: Path) -> None:
    """Give a config the sizes, attention scale and rotary base that transformers does not read.

    Raises UserError if the file does not say in full how rotary embeddings are scaled, or has norms
    that transformers leaves out.
    """
    start = _header(file)
    architecture = str(_said(start, "general.architecture"))
    if _said(start, f"{architecture}.ssm.dt_b_c_rms"):
        raise UserError(
            f"{file} is of a FalconMamba, which transformers reads from a .gguf as a Mamba without "
            "its norms; name the folder that it was made of"
        )
    for key, name in _SIZES.get(architecture, {}).items():
        if (size := _said(start, f"{architecture}.{key}")) is not None:
            setattr(config, name, size)
    if architecture in _LARGEST:
        largest = config.num_hidden_layers == _LARGEST[architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if largest else config.head_dim
        )
    _scale_rotary_(config, file, start)


def _scale_rotary_(config: Any, file: Path, start: bytes) -> None:
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in rotary.values() if isinstance(one, dict)}
    rotary = rotary.get("full_attention", rotary)  # what llama.cpp scales where kinds differ
    base = _said(start, f"{_said(start, 'general.architecture')}.rope.freq_base")
    if base is not None and "rope_theta" in rotary:
        rotary["rope_theta"] = base
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
    usual = rotary.get("rope_type", "default") == "default"
    if not (scaled or factors) or not (usual or kinds):
        return
    if usual and "rope_theta" in rotary and scaled and kind == "linear" and not factors:
        rotary |= {"rope_type": "linear", "factor": factor}
    elif "rope_theta" in rotary and not (scaled or kinds) and _is_llama3(text, factors[0]):
        rotary |= _LLAMA3 | {"factor": float(factors[0].max())}
    else:
        raise UserError(
            f"{file} has rotary embeddings that are scaled "
            f"({kind if scaled else tensors[0].name}), and does not say all that makes them up; "
            "name the folder or the hub id of the model that it was made of"
        )


def _is_llama3(config: PreTrainedConfig, factors: Any) -> bool:
    """Whether factors of frequencies, (head size / 2,), are those of Llama 3."""
    trial = type(config).from_dict(config.to_dict())
    usual = trial.rope_parameters
    trial.rope_parameters = usual | _LLAMA3 | {"factor": float(factors.max())}
    found = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))[0].double()
    size = 2 * len(found)
    plain = usual["rope_theta"] ** (
        -torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
    )
    expected = (plain / found).numpy()
    return factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4)


def split_as_said_(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Have text split before merging as a file says, by a name of llama.cpp's known here."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None:
        split_as_named_(backend, _said(_header(file), "tokenizer.ggml.pre"))


def drop_tokens_beyond_(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Take the added tokens, such as transformers', that have no row out of a tokenizer."""
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


# ------------------------------------------------------------- how text is split before merging

Rules: TypeAlias = tuple[object, ...]
"""Whether whole tokens need no merges, and the rules in order.

A rule is ``ByteLevel`` for GPT-2's own expression, ``Digits`` for single digits, or an expression.
"""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_TAIL = r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES

NAMES: dict[Rules, str] = {
    (False, "ByteLevel"): "gpt-2",
    (False, "Digits", "ByteLevel"): "smollm",
    (False, _WORDS % r"\p{N}"): "qwen2",
    (False, _WORDS % r"\p{N}{1,3}"): "smaug-bpe",
    (True, _WORDS % r"\p{N}{1,3}"): "llama-bpe",
    (True, _CASED % ("", "") + _TAIL % r"\p{N}"): "tekken",
    (False, _CASED % ((f"{_CONTRACTIONS}?",) * 2) + _TAIL % r"\p{N}{1,3}"): "gpt-4o",
}
"""Rules -> llama.cpp's name."""


def rules_of(data: dict[str, Any]) -> Rules:
    """Return the rules in the JSON of a tokenizer of the library ``tokenizers``."""
    rules = map(_rule, steps_of(data.get("pre_tokenizer")))
    return (bool(data["model"].get("ignore_merges")), *filter(None, rules))


def steps_of(one: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or of what splits text, one in the other or not."""
    if one is not None and one["type"] == "Sequence":
        for step in one.get("normalizers") or one.get("pretokenizers") or ():
            yield from steps_of(step)
    elif one is not None:
        yield one


def split_as_named_(tokenizer: Tokenizer, name: object) -> None:
    """Have a tokenizer of bytes split text by the rules of a name; another changes nothing."""
    known = next((rules for rules, one in NAMES.items() if one == name), None)
    data = json.loads(tokenizer.to_str())
    bytewise = any(step["type"] == "ByteLevel" for step in steps_of(data.get("pre_tokenizer")))
    if known is None or data["model"]["type"] != "BPE" or not bytewise or rules_of(data) == known:
        return
    whole, *rules = known
    steps: list[Any] = [_step(str(rule)) for rule in rules]
    if rules[-1] != "ByteLevel":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model.ignore_merges = whole


def _step(rule: str) -> pre_tokenizers.PreTokenizer:
    """Return a rule as a step that `_rule` reads as it."""
    if rule == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if rule == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Split(Regex(rule), "isolated")


def _rule(step: dict[str, Any]) -> str | None:
    """Return a step as `Rules` have it; None for the one that only writes bytes as letters."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    if step["type"] == "Digits" and step["individual_digits"]:
        return "Digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel" if step.get("use_regex", True) else None
    return json.dumps(step, sort_keys=True)
