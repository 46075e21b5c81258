"""Results on disk under the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version
from transformers.utils.hub import cached_file

from llm_pruner import __version__
from llm_pruner.checkpoints import atomic_write_text
from llm_pruner.files.json import read_json
from llm_pruner.models.load import DEFAULT, default_gguf
from llm_pruner.settings.common import ModelSettings

_FORMAT = 1
_CONTENT = (
    ".safetensors",
    ".gguf",
    ".json",
    ".jinja",
    ".model",
    ".py",
    ".tiktoken",
    ".txt",
)
_RECORDS = ("plan.json", "report.json")
_BLOCK = 2**20


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is, without loading it.

    Attributes:
        name: as ``sources.LoadedModel`` has it.
        content: hash of its files, or its commit on the hub.
    """

    name: str
    content: str


def identify(model: ModelSettings) -> ModelIdentity | None:
    """Return the identity of a model; None if it cannot be had, which loading it will explain."""
    try:
        source = str(default_gguf()) if model.source == DEFAULT else model.source
        path = Path(source).expanduser()
        if path.is_dir():
            files = [
                file
                for file in sorted(path.iterdir())
                if file.suffix in _CONTENT and file.name not in _RECORDS and file.is_file()
            ]
            return ModelIdentity(path.resolve().name, _hash(files))
        if path.is_file():
            return ModelIdentity(path.stem, _hash([path]))
        config = cached_file(source, "config.json", revision=model.revision)
        if config is None:
            return None
        return ModelIdentity(source, f"{source}@{Path(config).parent.name}")
    except Exception:  # the hub, its client and file systems raise anything; loading says it better
        return None


def key(identity: ModelIdentity, model: ModelSettings, **settings: Any) -> str:
    """Return the hash that names a result of this model under these settings."""
    parts = {
        "format": _FORMAT,
        "model": identity.content,
        "dtype": model.dtype,
        "llm_pruner": __version__,
        "transformers": transformers_version,
        **settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder() -> Path:
    """Return the folder of results: ``llm-pruner/results`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return home / "llm-pruner" / "results"


def read(name: str) -> dict[str, Any] | None:
    """Return what was stored under a key; None if there is nothing that can be read."""
    try:
        data = read_json(folder() / f"{name}.json")
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write(name: str, data: dict[str, Any]) -> None:
    """Store a result; where the folder cannot be written, the result is not kept."""
    try:
        atomic_write_text(folder() / f"{name}.json", json.dumps(data, ensure_ascii=False))
    except OSError:
        return


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
