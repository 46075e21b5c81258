"""The licence of a model, as the files at hand state it; nothing is fetched for it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from llm_pruner.models.load import DEFAULT, default_gguf
from llm_pruner.report.data import CARD_FILE

_KEY = "general.license"
_STRING, _ARRAY = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value in GGUF -> its bytes, where they are fixed."""


def licence_of(model: str, revision: str | None) -> str | None:
    """Return the identifier of a model's licence, or None if no file at hand states it.

    Args:
        model: hub id, local folder, ``.gguf`` file, or ``default``.
        revision: commit on the hub, if it came from there.
    """
    try:
        if model == DEFAULT or model.endswith(".gguf"):
            return gguf_licence(default_gguf() if model == DEFAULT else Path(model).expanduser())
        if Path(model).expanduser().exists():
            return card_licence(Path(model).expanduser() / CARD_FILE)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, CARD_FILE, revision=revision)
        return card_licence(Path(cached)) if isinstance(cached, str) else None
    except Exception:  # readers raise anything, and what cannot be read is not known
        return None


def card_licence(file: Path) -> str | None:
    """Return what the front matter of a model card says."""
    from huggingface_hub import ModelCard

    found = ModelCard.load(file).data.license if file.is_file() else None
    return found if isinstance(found, str) else None


def gguf_licence(file: Path) -> str | None:
    """Return what a GGUF file says among its general entries, which come first.

    The reader of the ``gguf`` package reads the whole vocabulary before, which takes seconds.
    """
    with file.open("rb") as stream:
        stream.seek(16)  # magic, version, number of tensors
        (entries,) = struct.unpack("<Q", stream.read(8))
        for _ in range(entries):
            key, kind = _string(stream), _number(stream)
            if key == _KEY and kind == _STRING:
                return _string(stream)
            if not key.startswith("general."):
                return None
            _skip(stream, kind)
    return None


def _string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    return stream.read(min(length, 1 << 16)).decode("utf-8", "replace")


def _number(stream: BinaryIO) -> int:
    return int(struct.unpack("<I", stream.read(4))[0])


def _skip(stream: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        (length,) = struct.unpack("<Q", stream.read(8))
        stream.seek(length, 1)
    elif kind == _ARRAY:
        inner = _number(stream)
        (length,) = struct.unpack("<Q", stream.read(8))
        for _ in range(length):
            _skip(stream, inner)
    else:
        stream.seek(_BYTES[kind], 1)
