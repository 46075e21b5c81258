"""Facts about a run, as parts of its report."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_pruner.evaluation.size import model_size
from llm_pruner.models.load import DEFAULT
from llm_pruner.planning import Plan, Row
from llm_pruner.report.data import ImportanceMap, ImportanceRow, Layer, Size, Source
from llm_pruner.report.licence import licence_of
from llm_pruner.types import Discovery, FloatArray, Group, Removal, Scores

BINS = 24
"""Most bins of an importance map; a group with fewer units has a bin for each."""

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
_NAMES = {"fisher": "Fisher", "taylor": "Taylor", "wanda": "Wanda"}
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def importance_maps(
    discovery: Discovery, scores: Scores, removal: Removal, rows: Sequence[Row] = ()
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


def layers_of(rows: Sequence[Row]) -> tuple[Layer, ...]:
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


def size_of(model: Any) -> Size:
    """Return parameters and bytes of a model."""
    found = model_size(model)
    return Size(
        total=found.total, embedding=found.embedding, blocks=found.blocks, bytes=found.bytes
    )


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
    if plan.criterion is None:
        return None
    chosen = {k: v for k, v in plan.criterion.model_dump().items() if v is not None}
    name = str(chosen.pop("name"))
    if name == "random":
        return "chance"
    said = f"{name.upper() if len(name) <= 3 else _NAMES.get(name, name)} importance"
    if chosen:
        said += f" ({', '.join(f'{key} {value}' for key, value in chosen.items())})"
    if plan.calibration is not None:
        text = plan.calibration
        own = "text that it wrote itself"
        where = " and ".join(own if part == "self" else part for part in text.source.split(","))
        said += f" on {text.samples:,} × {text.seq_len:,} tokens of {where}"
    return said


def settings_of(plan: Plan, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all settings of a run by heading.

    Args:
        plan: what was made or replayed.
        model: how the model was loaded.
    """
    data = json.loads(plan.to_json())
    sections = {"Model": {**data.pop("model"), **model}, "Plan": {}}
    for name in ("groups", "format_version", "package_version"):
        data.pop(name)
    for name, value in data.items():
        if isinstance(value, dict):
            sections[name.capitalize()] = value
        else:
            sections["Plan"][name.replace("_", " ")] = value
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
