"""GGUF, the files of llama.cpp; see `gguf_model` and `gguf_tokenizer`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from llm_pruner.errors import UserError
from llm_pruner.export.gguf_model import GgufModel, Tensor, gguf_model
from llm_pruner.export.gguf_tokenizer import copy_tokenizer, read_tokenizer
from llm_pruner.export.llama_cpp import quantize, require_quantizer
from llm_pruner.files.disk import new_file, starts_with
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.progress import track

MAGIC = b"GGUF"
"""What a file begins with."""

_PLAIN = {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in ("f32", "f16", "bf16", "q8_0")}
_FILE_TYPES = {
    kind: gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"]
    for kind in _PLAIN
}
_BY_LLAMA_CPP = ("q4_k_m",)
TYPES = (*_PLAIN, *_BY_LLAMA_CPP)

_BEFORE = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""Type of the weights -> the one from which llama.cpp quantises; else f32."""

_BLOCK = 32
"""Inputs that are quantised together; a matrix with another number of them stays in f16."""


@dataclass(frozen=True)
class GgufFile:
    """What is to be written: ``kind`` is one of ``TYPES``, ``stored`` the type of the weights."""

    kind: str
    model: GgufModel
    tokenizer: Mapping[str, gguf.GGUFValue]
    stored: torch.dtype

    @property
    def facts(self) -> dict[str, object]:
        """What a user may want to know of it."""
        pre = self.tokenizer.get("tokenizer.ggml.pre")
        return {
            "architecture": self.model.architecture,
            "tokenizer": None if pre is None else pre.value,
            "left_in_f16": sum(_is_odd(one) for one in self.model.tensors if self.kind[0] == "q"),
        }

    @property
    def bytes(self) -> int:
        """Room on the disk that writing it takes."""
        if self.kind in _PLAIN:
            return self._size(self.kind)
        return self._size(_BEFORE.get(self.stored, "f32")) + self._size("q8_0")

    def _size(self, kind: str) -> int:
        return sum(_bytes(one, _type_of(one, kind)) for one in self.model.tensors)

    def write(self, out: Path) -> None:
        """Write it; the file is there whole or not at all.

        Raises UserError if a weight is beyond what f16 holds, LLMPrunerError if llama.cpp cannot
        quantise it, OSError if the disk is full.
        """
        with new_file(out) as place:
            if self.kind in _PLAIN:
                self._write(place, self.kind)
            else:
                prefix = f".{out.name}.partial-"
                with tempfile.TemporaryDirectory(dir=out.parent, prefix=prefix) as folder:
                    before = Path(folder) / "before.gguf"
                    self._write(before, _BEFORE.get(self.stored, "f32"))
                    quantize(before, place, self.kind, len(self.model.tensors))

    def _write(self, file: Path, kind: str) -> None:
        with closing(gguf.GGUFWriter(file, self.model.architecture)) as writer:
            writer.add_type(gguf.GGUFType.MODEL)
            for name, value in self.model.values.items():
                getattr(writer, name)(value)
            writer.add_file_type(_FILE_TYPES[kind])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, one in self.tokenizer.items():
                writer.add_key_value(key, one.value, one.type, one.sub_type)
            for tensor in self.model.tensors:
                of = _type_of(tensor, kind)
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, of)
                size = _bytes(tensor, of)
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=of)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in track(self.model.tensors, f"writing {kind}"):
                writer.write_tensor_data(_packed(tensor, _type_of(tensor, kind)))


def require(kind: str, like: Path | None) -> None:
    """Raise UserError if a type cannot be written here, or ``like`` is no such file."""
    if kind not in TYPES:
        raise UserError(f"--type {kind} is unknown; use one of {', '.join(TYPES)}")
    if like is not None and not (like.is_file() and starts_with(like, MAGIC)):
        raise UserError(f"--like {like} is no GGUF file; name one of the model that it was made of")
    if kind in _BY_LLAMA_CPP:
        require_quantizer(kind)


def convert(loaded: LoadedModel, folder: Path, kind: str, like: Path | None) -> GgufFile:
    """Return a model as a GGUF file that is yet to be written; UserError if llama.cpp has no such.

    ``folder`` is where it and its tokenizer lie, or the GGUF file that it was read from; ``kind``
    is one of ``TYPES``; ``like`` a GGUF file whose tokenizer is taken in place of the model's.
    """
    model = gguf_model(loaded.model, loaded.name)
    rows = model.values["add_vocab_size"]
    source = folder if like is None and folder.is_file() else like
    tokenizer = read_tokenizer(folder, rows) if source is None else copy_tokenizer(source, rows)
    return GgufFile(kind, model, tokenizer, loaded.stored_dtype)


def _is_odd(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.shape[-1] % _BLOCK != 0


def _type_of(tensor: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    if len(tensor.shape) < 2:  # norms and biases
        return _PLAIN["f32"]
    return _PLAIN["f16" if kind == "q8_0" and _is_odd(tensor) else kind]


def _bytes(tensor: Tensor, of: gguf.GGMLQuantizationType) -> int:
    return int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, of)))


def _packed(tensor: Tensor, of: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of a tensor."""
    values = np.ascontiguousarray(tensor.read().float().cpu().numpy())
    if of == _PLAIN["f16"] and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"{tensor.name} holds numbers beyond those of f16; use --type bf16 or f32")
    return gguf.quantize(values, of).view(np.uint8)
