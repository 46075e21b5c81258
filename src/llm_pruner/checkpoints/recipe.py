"""The recipe: what turns a freshly built dense model into the pruned one, as JSON in config.json.

Positions are written as ranges (``"0-31,40"``) and shapes as ``"576x1536"``, which keeps the file
short enough to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_pruner.errors import UserError
from llm_pruner.types import Edits

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Edits in the names of the pruned model, and the dense values of config keys that changed.

    Attributes:
        shapes: new shape of every parameter that changes.
        buffers: buffer -> {dim: kept positions, in dense numbering}.
        attributes: module -> {attribute: value}; dotted ones belong to the module's own copy.
        layers: module list -> kept indices, in dense numbering.
        dense_config: dotted config key -> value that the dense model is built with, such as
            ``num_hidden_layers`` or ``layer_types``; config.json itself holds the pruned values.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dense_config: Mapping[str, Any] = field(default_factory=dict)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values, without ``quant_method``."""
    return {
        "format_version": FORMAT_VERSION,
        "shapes": {name: "x".join(map(str, shape)) for name, shape in recipe.shapes.items()},
        "buffers": {
            name: {str(dim): format_positions(kept) for dim, kept in dims.items()}
            for name, dims in recipe.buffers.items()
        },
        "attributes": {
            name: {attribute: _plain(value) for attribute, value in values.items()}
            for name, values in recipe.attributes.items()
        },
        "layers": {name: format_positions(kept) for name, kept in recipe.layers.items()},
        "dense_config": dict(recipe.dense_config),
    }


def from_json(data: Mapping[str, Any]) -> Recipe:
    """Read what ``to_json`` wrote.

    Raises:
        UserError: another format version, or a value that is not what the format says.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"config.json holds a pruning recipe of format version {version!r}, and this "
            f"llm-pruner reads version {FORMAT_VERSION}; install the version that wrote it"
        )
    try:
        return Recipe(
            shapes={name: _shape(text) for name, text in data.get("shapes", {}).items()},
            buffers={
                name: {int(dim): parse_positions(kept) for dim, kept in dims.items()}
                for name, dims in data.get("buffers", {}).items()
            },
            attributes={
                name: {
                    attribute: tuple(value) if isinstance(value, list) else value
                    for attribute, value in values.items()
                }
                for name, values in data.get("attributes", {}).items()
            },
            layers={name: parse_positions(kept) for name, kept in data.get("layers", {}).items()},
            dense_config=dict(data.get("dense_config", {})),
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"the pruning recipe in config.json cannot be read ({error}); "
            "restore the file as llm-pruner wrote it"
        ) from error


def format_positions(positions: Iterable[int]) -> str:
    """Return sorted positions as ranges: ``(0, 1, 2, 7)`` -> ``"0-2,7"``."""
    parts: list[list[int]] = []
    for position in positions:
        if parts and position == parts[-1][1] + 1:
            parts[-1][1] = int(position)
        else:
            parts.append([int(position), int(position)])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def parse_positions(text: str) -> tuple[int, ...]:
    """Return the positions of ``format_positions``; ValueError if they are not ascending."""
    positions: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        positions.extend(range(int(first), int(last or first) + 1))
    if positions != sorted(set(positions)):
        raise ValueError(f"positions {text!r} are not ascending")
    return tuple(positions)


def from_edits(edits: Edits) -> Recipe:
    """Return the recipe of edits that were made to a model as its config builds it."""
    return Recipe(edits.shapes, edits.buffers, edits.attributes, edits.layers)


def compose(first: Recipe, second: Recipe) -> Recipe:
    """Return the recipe that does what ``first`` does and then ``second``.

    ``second`` counts positions and layers in the model that ``first`` gives. ``dense_config`` is
    left to ``first``, whose model is the one that gets built.
    """
    shapes = _rename(first.shapes, second.layers) | dict(second.shapes)
    old = _rename(first.attributes, second.layers)
    attributes = {
        name: {**old.get(name, {}), **second.attributes.get(name, {})}
        for name in [*old, *(name for name in second.attributes if name not in old)]
    }
    buffers: dict[str, Mapping[int, tuple[int, ...]]] = dict(_rename(first.buffers, second.layers))
    for name, dims in second.buffers.items():
        merged = dict(buffers.get(name, {}))
        for dim, kept in dims.items():
            merged[dim] = _select(merged[dim], kept) if dim in merged else kept
        buffers[name] = merged
    layers = dict(first.layers)
    for name, kept in second.layers.items():
        layers[name] = _select(layers[name], kept) if name in layers else kept
    return Recipe(
        shapes=shapes,
        buffers=buffers,
        attributes=attributes,
        layers=layers,
        dense_config=first.dense_config,
    )


def _rename(values: Mapping[str, Any], layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return ``values`` with names as they are once only ``layers`` are kept."""
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        new: str | None = name
        for path, kept in layers.items():
            if not name.startswith(f"{path}."):
                continue
            index, dot, rest = name[len(path) + 1 :].partition(".")
            new = f"{path}.{kept.index(int(index))}{dot}{rest}" if int(index) in kept else None
            break
        if new is not None:
            renamed[new] = value
    return renamed


def _select(values: Sequence[int], positions: Iterable[int]) -> tuple[int, ...]:
    return tuple(values[position] for position in positions)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if min(shape) < 1:
        raise ValueError(f"shape {text!r} has a size below 1")
    return shape


def _plain(value: Any) -> Any:
    """Return a value that JSON knows: numpy's integers and tuples are not among them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
