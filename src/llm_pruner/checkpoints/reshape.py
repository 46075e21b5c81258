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
from llm_pruner.files.ranges import format_ranges
from llm_pruner.models.layers import Renaming
from llm_pruner.types import Edits

FORMAT_VERSION = 1

E = TypeVar("E", bound=Edits)

MOST_LAYERS = 4096
"""Modules of a list that a recipe can speak of, and entries of a list in a config."""

_KEYS = {
    "quant_method",
    "format_version",
    "shapes",
    "buffers",
    "attributes",
    "layers",
    "dense_config",
}
_MOST = 2**63 - 1
_MOST_ENTRIES, _MOST_LETTERS, _MOST_POSITIONS = 2**18, 512, 2**20
_SHAPE = re.compile(r"[0-9]{1,10}(x[0-9]{1,10}){0,7}")
_DIM = re.compile(r"[0-7]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_WORD = re.compile(r"[A-Za-z0-9_*+-]{0,64}")


@dataclass(frozen=True)
class Recipe(Edits):
    """Edits in the names of the pruned model, and the dense values of config keys that changed.

    ``dense_config`` has the values that the dense model is built with, by dotted key, such as
    ``layer_types``; config.json itself holds the pruned ones.
    """

    dense_config: Mapping[str, Any] = field(default_factory=dict)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values, without ``quant_method``."""
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
    """Read what ``to_json`` wrote; raise UserError for anything else, or another format version.

    Anybody may have written the file, so entries, lengths, numbers, shapes and ranges are bounded
    before anything is made of them. Whether the names are there is for ``quantizer`` to say.
    """
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"config.json holds a pruning recipe of format version {shown(version)}, and this "
            f"llm-pruner reads version {FORMAT_VERSION}; install the version that wrote it"
        )
    try:
        unknown = data.keys() - _KEYS
        if unknown:
            raise ValueError(f"it has the key {shown(min(unknown, key=str))}, which no recipe has")
        positions = _Positions()
        return Recipe(
            shapes={name: _shape(name, text) for name, text in _section(data, "shapes")},
            buffers={
                name: {_dim(name, dim): positions.read(name, kept) for dim, kept in _inner(dims)}
                for name, dims in _section(data, "buffers")
            },
            attributes={
                name: {path: _attribute(path, value) for path, value in _inner(values)}
                for name, values in _section(data, "attributes")
            },
            layers={
                name: positions.read(name, kept, MOST_LAYERS)
                for name, kept in _section(data, "layers")
            },
            dense_config={
                path: _config_value(path, value) for path, value in _section(data, "dense_config")
            },
        )
    except ValueError as error:
        raise UserError(
            f"the pruning recipe in config.json cannot be read ({error}); "
            "restore the file as llm-pruner wrote it"
        ) from error


def shown(value: object) -> str:
    """Return what a file says as one short line for a message."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value) is int and abs(value) > _MOST:
        return "a number of more than 64 bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _section(data: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    return _inner(data.get(key, {}), key)


def _inner(entries: object, what: str = "an entry") -> Iterator[tuple[str, Any]]:
    if not isinstance(entries, Mapping) or len(entries) > _MOST_ENTRIES:
        raise ValueError(f"{what} is no object of at most {_MOST_ENTRIES:,} entries")
    for name, value in entries.items():
        if not isinstance(name, str) or len(name) > _MOST_LETTERS:
            raise ValueError(f"{what} has the name {shown(name)}")
        if any(part.startswith("__") for part in name.split(".")):
            raise ValueError(f"{what} names {shown(name)}, which belongs to Python")
        yield name, value


def _shape(name: str, text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not _SHAPE.fullmatch(text):
        raise ValueError(f"{shown(name)} has the shape {shown(text)}")
    shape = tuple(int(size) for size in text.split("x"))
    if min(shape) < 1:
        raise ValueError(f"{shown(name)} has the shape {shown(text)}, with a size below 1")
    return shape


def _dim(name: str, text: str) -> int:
    if not _DIM.fullmatch(text):
        raise ValueError(f"{shown(name)} has the dimension {shown(text)}")
    return int(text)


def _attribute(path: str, value: object) -> Any:
    """Return a number or a tuple of numbers: all that modules say of their sizes."""
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > MOST_LAYERS or not all(map(_is_bounded, numbers)):
        raise ValueError(f"{shown(path)} is {shown(value)}, which is no number")
    return tuple(numbers) if isinstance(value, list) else value


def _config_value(path: str, value: object) -> Any:
    """Return a whole number, or a list with at most an entry a layer."""
    if (
        isinstance(value, (list, tuple))
        and len(value) <= MOST_LAYERS
        and all(map(_is_entry, value))
    ):
        return list(value)
    if type(value) is int and _is_bounded(value):
        return value
    raise ValueError(f"{shown(path)} is {shown(value)}, which is no number and no list of such")


def _is_entry(value: object) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    # Pairs such as (0, inf) have as many entries as a model of two layers has layers.
    return value is None or type(value) is bool or _is_bounded(value) or value in (inf, -inf)


def _is_bounded(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= _MOST
    return type(value) is float and isfinite(value)


@dataclass
class _Positions:
    """Reads positions, so many in all and no more."""

    left: int = _MOST_POSITIONS

    def read(self, name: str, text: object, end: int = _MOST_POSITIONS) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise ValueError(f"{shown(name)} has the positions {shown(text)}")
        found = parse_positions(text, min(self.left, end), end)
        self.left -= len(found)
        return found


def parse_positions(
    text: str, most: int = _MOST_POSITIONS, end: int = _MOST_POSITIONS
) -> tuple[int, ...]:
    """Return at most ``most`` positions of ``format_ranges``, below ``end``; or ValueError."""
    positions: list[int] = []
    for part in filter(None, text.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{shown(part)} is no position and no range of positions")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (positions and first <= positions[-1]):
            raise ValueError(f"positions {shown(text)} are not ascending")
        if last >= end or last - first >= most - len(positions):
            raise ValueError(f"positions {shown(text)} are too many or too large")
        positions.extend(range(first, last + 1))
    return tuple(positions)


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
