"""Results on disk under the hash of all that they depend on, and text that flatters them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version
from transformers.utils.hub import cached_file

from llm_pruner.data.text import name_of_part
from llm_pruner.files.disk import json_object
from llm_pruner.files.outputs import RECOVERY_FILE, write_output
from llm_pruner.models.checkpoint_files import local_path, name_of, records_of, weight_names
from llm_pruner.settings.common import CALIBRATION, ModelSettings
from llm_pruner.version import __version__

_FORMAT = 4
_CONTENT = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_RECORDS = ("plan.json", "report.json")


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is, without loading it: its name, and a hash of its files or its commit."""

    name: str
    content: str


def identify(model: ModelSettings) -> ModelIdentity | None:
    """Return the identity of a model; None if it cannot be had, which loading it will explain."""
    try:
        path = local_path(model.model)
        if path.is_dir():
            beside = {*path.iterdir()} - {path / name for name in _RECORDS}
            # Code and weights may lie deeper.
            deeper = {*path.rglob("*.py"), *(path / name for name in weight_names(path))}
            files = sorted(one for one in beside | deeper if one.suffix in _CONTENT)
            return ModelIdentity(name_of(path), _hash(path, filter(Path.is_file, files)))
        if path.is_file():
            return ModelIdentity(path.stem, _hash(path.parent, [path]))
        config = cached_file(model.model, "config.json", revision=model.revision)
        return ModelIdentity(model.model, f"{model.model}@{Path(config).parent.name}")
    except Exception:  # the hub, its client and file systems raise anything; loading says it better
        return None


def key(identity: ModelIdentity, model: ModelSettings, **settings: Any) -> str:
    """Return the hash that names a result of this model under these settings."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if model.device == "auto" else model.device.partition(":")[0]
    parts = {
        "format": _FORMAT,
        "model": identity.content,
        "dtype": model.dtype,
        "code": model.trust_remote_code,
        "device": device,
        "llm_pruner": __version__,
        "torch": str(torch.__version__),
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
    return json_object(folder() / f"{name}.json") or None


def write(name: str, data: dict[str, Any]) -> None:
    """Store a result; where the folder cannot be written, the result is not kept."""
    with suppress(OSError):
        write_output(folder() / f"{name}.json", json.dumps(data, ensure_ascii=False))


def _hash(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


_FAMILY = re.compile("(?:^|/)(wikitext|ptb|penn[_-]treebank|c4|bookcorpus)")


def calibration_sources(folder: Path) -> list[str]:
    """Return what a model was calibrated on, by its plan and, of a replay's refit, its report."""
    settings = (
        json_object(folder / "plan.json").get("settings", {}),
        json_object(folder / "report.json").get("settings", {}).get(CALIBRATION, {}),
    )
    found = [part for one in settings for part in str(one.get("calibration") or "").split(",")]
    return list(dict.fromkeys(filter(None, found)))


def training_sources(folder: Path) -> list[str]:
    """Return the names of what the model in a recovered folder was trained on."""
    recovery = json_object(folder / RECOVERY_FILE)
    return [str(one["name"]) for one in recovery.get("sources", ()) if recovery["gained"]]


def shared_corpora(model: str, sources: Collection[str], revision: str | None = None) -> list[str]:
    """Return a warning for each source of a corpus that the model was calibrated or trained on.

    Sources are of one corpus if they have the same file name, or both names are of one family
    (WikiText, Penn Treebank, C4, BookCorpus), whatever the split.
    """
    if not sources:
        return []
    folder = records_of(model, revision)
    parts = map(name_of_part, calibration_sources(folder))
    used = [("calibrated", "calibrate", part) for part in parts]
    used += [("trained", "train", name) for name in training_sources(folder)]
    return [
        f"{model} was {done} on {part} and is measured on {source}, which is of the same corpus: "
        f"the result flatters it; {do} on other text to compare"
        for source in sources
        for done, do, part in used
        if Path(source).name == Path(part).name or _family(source) & _family(part)
    ]


def _family(source: str) -> set[str]:
    name = Path(source).name.lower() if Path(source).suffix else source.lower()
    return {"ptb" if found.startswith("penn") else found for found in _FAMILY.findall(name)}
