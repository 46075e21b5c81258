"""Facts about a run, its model and what was measured of it, as parts of its report."""

from __future__ import annotations

import os
import platform
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from llm_pruner.models.stored import DEFAULT, local_path
from llm_pruner.planning import Plan
from llm_pruner.report.data import (
    CARD_FILE,
    Evaluation,
    ImportanceMap,
    ImportanceRow,
    Measurement,
    Perplexity,
    Source,
    TaskScore,
)
from llm_pruner.settings.common import CALIBRATION
from llm_pruner.settings.options import option_of
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.types import Discovery, FloatArray, Group, Layer, Removal, Scores

BINS = 24
"""Most bins of an importance map; a group with fewer units has a bin for each."""

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
_NAMES = {"fisher": "Fisher", "taylor": "Taylor", "wanda": "Wanda"}
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def importance_maps(
    discovery: Discovery, scores: Scores, removal: Removal, rows: Sequence[Layer] = ()
) -> tuple[ImportanceMap, ...]:
    """Return the importance of all scored groups by kind, in the order of the layers.

    Groups of one kind in one layer, such as those of its experts, are taken together.

    Args:
        discovery: of the dense model.
        scores: the first estimate, on the dense model.
        removal: all that was removed.
        rows: what is left; says which layers went whole, with all units in them.
    """
    gone = {row.layer for row in rows if row.removed}
    found: dict[str, dict[int | None, list[Group]]] = {}
    for group in discovery.groups:
        # What follows another kind is removed with it, whatever its own importance.
        if group.name in scores and group.frozen is None and group.kind != "value_dim":
            found.setdefault(group.kind, {}).setdefault(group.layer, []).append(group)
    return tuple(
        ImportanceMap(
            kind=kind,
            rows=tuple(
                ImportanceRow(
                    layer=layer,
                    units=sum(group.size for group in groups),
                    removed=sum(
                        group.size if layer in gone else len(removal.get(group.name, ()))
                        for group in groups
                    ),
                    bins=_bins(np.concatenate([scores[group.name] for group in groups])),
                )
                for layer, groups in layers.items()
            ),
        )
        for kind, layers in found.items()
    )


def _bins(scores: FloatArray) -> tuple[float | None, ...]:
    parts = np.array_split(np.sort(scores), min(BINS, len(scores)) or 1)
    means = [float(part.mean()) if part.size else np.nan for part in parts]
    return tuple(float(f"{mean:.4g}") if np.isfinite(mean) else None for mean in means)


def layers_of(rows: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return what is left of each layer as a part of a report.

    Groups whose names differ by a number alone, such as those of experts, are added up.
    """
    layers = []
    for row in rows:
        sizes: dict[str, tuple[int, int]] = {}
        for name, (kept, dense) in row.sizes.items():
            shown = _NUMBER.sub("*", name)
            before = sizes.get(shown, (0, 0))
            sizes[shown] = (before[0] + kept, before[1] + dense)
        layers.append(Layer(layer=row.layer, removed=row.removed, sizes=sizes))
    return tuple(layers)


def source_of(model: str, name: str, revision: str | None, network: Any) -> Source:
    """Return where a model came from.

    Args:
        model: what the user named.
        name: its short name.
        revision: commit on the hub, if it came from there.
        network: the model.
    """
    local = model == DEFAULT or model.endswith(".gguf") or Path(model).expanduser().exists()
    return Source(
        name=name,
        hub_id=None if local else model,
        revision=revision,
        architecture=type(network).__name__,
        license=licence_of(model, revision),
    )


def criterion_in_words(plan: Plan) -> str | None:
    """Return how units were chosen, in words that follow "chosen by"."""
    said_by = plan.settings
    name = str(said_by.get("criterion", ""))
    if not name:
        return None
    chosen = {key: said_by[key] for key in ("order", "reduction", "aggregate") if key in said_by}
    if name == "random":
        return "chance"
    said = f"{name.upper() if len(name) <= 3 else _NAMES.get(name, name)} importance"
    if chosen:
        said += f" ({', '.join(f'{key} {value}' for key, value in chosen.items())})"
    if "samples" in said_by:
        own = "text that it wrote itself"
        sources = str(said_by["calibration"]).split(",")
        where = " and ".join(own if part == "self" else part for part in sources)
        said += f" on {said_by['samples']:,} × {said_by['seq_len']:,} tokens of {where}"
    return said


def settings_of(plan: Plan, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all settings of a run by heading: that of the option in the help.

    Args:
        plan: what was made or replayed.
        model: how the model was loaded.
    """
    sections: dict[str, dict[str, Any]] = {"Model": {**plan.model.model_dump(), **model}}
    for name, value in plan.settings.items():
        field = PruneSettings.model_fields.get(name)
        panel = None if field is None else option_of(field).panel
        heading = (panel or "Plan").partition(" (")[0]
        sections.setdefault(heading, {})[name] = value
    if plan.text is not None:
        sections.setdefault(CALIBRATION, {})["digest"] = plan.text
    return {
        heading: {name.replace("_", " "): value for name, value in values.items()}
        for heading, values in sections.items()
    }


def versions() -> dict[str, str]:
    """Return versions of the package, of libraries and of the machine."""
    found = {"llm-pruner": _version("llm-pruner"), "Python": platform.python_version()}
    found |= {name: _version(name) for name in _LIBRARIES}
    cores = f"{os.cpu_count()} cores, PyTorch with {torch.get_num_threads()} threads"
    return {**found, "machine": f"{platform.system()} {platform.machine()}, {cores}"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


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
            return gguf_licence(local_path(model))
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


Data = Mapping[str, Any]

_COUNTS = {
    "bytes": ("size on disk", "B"),
    "bytes_on_disk": ("size on disk", "B"),
    "macs": ("one forward pass over 64 tokens", "MACs"),
    "macs_per_token": ("one token after 64 others", "MACs"),
    "bytes_read_per_token": ("read for one token after 64 others", "B"),
    "kv_cache_bytes_per_token": ("cache per token", "B"),
}
"""Field -> name and unit of what it counts; less is better."""


def as_evaluation(data: Data) -> Evaluation:
    """Return what was measured of one model.

    Args:
        data: of one model, as ``evaluate --json`` or ``bench --json`` writes it; what is absent was
            not measured.
    """
    fields = Perplexity.model_fields.keys()
    return Evaluation(
        perplexity=tuple(
            Perplexity(**{key: value for key, value in result.items() if key in fields})
            for result in data.get("perplexity") or ()
        ),
        tasks=tuple(_tasks((data.get("zero_shot") or {}).get("tasks") or ())),
        measurements=tuple(_measurements(data)),
        samples=data.get("samples") or {},
    )


def _tasks(results: Any) -> Iterator[TaskScore]:
    """Yield the metrics of each task that are shares of which more is better, such as ``acc``."""
    for result in results:
        for name, metric in result["metrics"].items():
            if metric.get("higher_is_better") is not False and 0 <= metric["value"] <= 1:
                yield TaskScore(
                    task=result["task"],
                    metric=name,
                    value=metric["value"],
                    stderr=metric.get("stderr"),
                    items=result.get("documents"),
                    in_mean=name == result.get("paper_metric"),
                )


def _measurements(data: Data) -> Iterator[Measurement]:
    for field, (name, unit) in _COUNTS.items():
        if data.get(field):
            yield Measurement(name=name, unit=unit, value=data[field], better="lower")
    for peak in data.get("memory") or ():
        for stage in ("prefill", "decode"):
            name = f"peak memory of {stage} ({_settings(peak, stage)})"
            yield Measurement(name=name, unit="B", value=peak[stage], better="lower")
    speeds = data.get("speed") or ()
    for speed in [speeds] if isinstance(speeds, Mapping) else speeds:
        for stage in ("prefill", "decode"):
            if f"{stage}_tokens_per_second" in speed:
                yield _speed(speed, stage)


def _speed(speed: Data, stage: str) -> Measurement:
    """Return tokens per second, with the slowest and the fastest round where rounds are known."""
    rate = speed[f"{stage}_tokens_per_second"]
    rounds = speed.get(f"{stage}_seconds") or ()
    tokens = speed.get(_TOKENS[stage], 0) * speed.get("batch_size", 1)
    return Measurement(
        name=f"{stage} ({_settings(speed, stage)})",
        unit="tokens/s",
        value=rate,
        low=tokens / max(rounds) if len(rounds) > 1 else None,
        high=tokens / min(rounds) if len(rounds) > 1 else None,
        better="higher",
    )


_TOKENS = {"prefill": "prompt_tokens", "decode": "new_tokens"}


def _settings(found: Data, stage: str) -> str:
    return f"{found.get(_TOKENS[stage], '?')} tokens, batch {found.get('batch_size', '?')}"
