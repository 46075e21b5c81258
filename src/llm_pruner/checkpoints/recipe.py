"""The recipe: what turns a freshly built dense model into the pruned one, as JSON in config.json.

Positions are written as ranges (``"0-31,40"``) and shapes as ``"576x1536"``, which keeps the file
short enough to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any, TypeVar

from llm_pruner.errors import UserError
from llm_pruner.files.ranges import format_ranges, parse_ranges
from llm_pruner.models.layers import Renaming
from llm_pruner.types import Edits

FORMAT_VERSION = 1

E = TypeVar("E", bound=Edits)

_KEYS = {"format_version", "shapes", "buffers", "attributes", "layers", "dense_config"}
_SHAPE = re.compile(r"[1-9][0-9]{0,9}(x[1-9][0-9]{0,9}){0,7}")
_WORD = re.compile(r"[A-Za-z0-9_*+-]{0,64}")


@dataclass(frozen=True)
class Recipe(Edits):
    """Edits in the names of the pruned model, and config values that build the dense one.

    ``dense_config`` has them by dotted key, such as ``layer_types``; config.json holds the pruned
    ones.
    """

    dense_config: Mapping[str, Any] = field(default_factory=dict)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        "shapes": {name: "x".join(map(str, shape)) for name, shape in recipe.shapes.items()},
        "buffers": {
            name: {str(dim): format_ranges(kept) for dim, kept in dims.items()}
            for name, dims in recipe.buffers.items()
        },
        "attributes": {
            name: {attribute: _plain(value) for attribute, value in values.items()}
            for name, values in recipe.attributes.items()
        },
        "layers": {name: format_ranges(kept) for name, kept in recipe.layers.items()},
        "dense_config": dict(recipe.dense_config),
    }


def from_json(data: Mapping[str, Any]) -> Recipe:
    """Read what ``to_json`` wrote; UserError if it is no recipe, or of another format version.

    Anybody may have written the file, so names, numbers, shapes and ranges are checked here, and
    in ``apply_recipe`` whether the model has what they name.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"config.json holds a pruning recipe of format version {shown(version)}, and this "
            f"llm-pruner reads version {FORMAT_VERSION}; install the version that wrote it"
        )
    try:
        if unknown := data.keys() - _KEYS:
            raise ValueError(f"it has the key {shown(min(unknown, key=str))}, which no recipe has")
        return Recipe(
            shapes={name: _shape(name, text) for name, text in _entries(data, "shapes")},
            buffers={
                name: {
                    int(dim): _positions(name, kept)
                    for dim, kept in _entries(data["buffers"], name)
                }
                for name, _ in _entries(data, "buffers")
            },
            attributes={
                name: {
                    path: _attribute(path, value)
                    for path, value in _entries(data["attributes"], name)
                }
                for name, _ in _entries(data, "attributes")
            },
            layers={name: _positions(name, kept) for name, kept in _entries(data, "layers")},
            dense_config={
                path: _config_value(path, value) for path, value in _entries(data, "dense_config")
            },
        )
    except (ValueError, UserError) as error:
        raise UserError(
            f"the pruning recipe in config.json cannot be read ({error}); "
            "restore the file as llm-pruner wrote it"
        ) from error


def shown(value: object) -> str:
    """Return what a file says as one short line for a message."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _entries(data: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """Yield the (name, value) pairs of one section."""
    section = data.get(key, {})
    if not isinstance(section, Mapping):
        raise ValueError(f"{shown(key)} is no object")
    for name, value in section.items():
        if not isinstance(name, str) or any(part.startswith("__") for part in name.split(".")):
            raise ValueError(f"{shown(key)} names {shown(name)}")
        yield name, value


def _shape(name: str, text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not _SHAPE.fullmatch(text):
        raise ValueError(f"{shown(name)} has the shape {shown(text)}")
    return tuple(map(int, text.split("x")))


def _attribute(path: str, value: object) -> Any:
    """Return a number or a tuple of numbers: all that modules say of their sizes."""
    numbers = value if isinstance(value, list) else [value]
    if not all(map(_is_number, numbers)):
        raise ValueError(f"{shown(path)} is {shown(value)}, which is no number")
    return tuple(numbers) if isinstance(value, list) else value


def _config_value(path: str, value: object) -> Any:
    """Return a whole number, or a list with at most an entry a layer."""
    if type(value) is int:
        return value
    if isinstance(value, (list, tuple)) and all(map(_is_entry, value)):
        return list(value)
    raise ValueError(f"{shown(path)} is {shown(value)}, which is no number and no list of such")


def _is_entry(value: object) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    # Pairs such as (0, inf) have as many entries as a model of two layers has layers.
    return value is None or type(value) is bool or _is_number(value) or value in (inf, -inf)


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and isfinite(value))


def _positions(name: str, text: object) -> tuple[int, ...]:
    if not isinstance(text, str):
        raise ValueError(f"{shown(name)} has the positions {shown(text)}")
    return tuple(map(int, parse_ranges(text)))


def compose(first: E, second: Edits) -> E:
    """Return the edits that do what ``first`` does and then ``second``.

    ``second`` counts positions and layers in the model that ``first`` gives. The ``dense_config``
    of a recipe stays that of ``first``, whose model is the one that gets built.
    """
    shapes = _rename(first.shapes, second.layers) | dict(second.shapes)
    old = _rename(first.attributes, second.layers)
    attributes = {
        name: {**old.get(name, {}), **second.attributes.get(name, {})}
        for name in old | dict(second.attributes)
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
    return replace(first, shapes=shapes, buffers=buffers, attributes=attributes, layers=layers)


def _rename(values: Mapping[str, Any], layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return ``values`` with names as they are once only ``layers`` are kept."""
    rename = Renaming(layers)
    return {new: value for name, value in values.items() if (new := rename(name)) is not None}


def _select(values: Sequence[int], positions: Iterable[int]) -> tuple[int, ...]:
    return tuple(values[position] for position in positions)


def _plain(value: Any) -> Any:
    """Return a value that JSON knows: numpy's integers and tuples are not among them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
