"""What the children of a module list are given beside the hidden states, compared by value.

A child that is given something by its place in the list (a mask by parity, a scale by index) is
given something else once children before it are gone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llm_pruner.discovery.tracing.marks import Marks
from llm_pruner.discovery.tracing.sizes import plain

_DEPTH = 4
_MANY = 1 << 22

Given = dict[str, Any]
"""Where in the arguments -> a value that is equal if what was given is."""


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden states among a module's arguments: the first, or the first of floats."""
    if args:
        return args[0]
    named = kwargs.get("hidden_states")
    others = (v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next(others, None) if named is None else named


class GivenValues:
    """Keeps what each child of each module list was given at each call.

    Attributes:
        calls: module list -> number of the child -> what it was given, call by call.
        where: module list -> the line of code that calls its children.
    """

    def __init__(self) -> None:
        self.calls: dict[str, dict[int, list[Given]]] = defaultdict(lambda: defaultdict(list))
        self.where: dict[str, str] = {}
        self._digests = Marks()

    def note(self, child: str, where: str, args: Any, kwargs: Any, hidden: Any) -> None:
        """Keep what a child is given; ``hidden`` is left out."""
        path, _, index = child.rpartition(".")
        self.where.setdefault(path, where)
        found = {
            name: self._value(value)
            for name, value in _parts({**dict(enumerate(args)), **kwargs}, "", 0)
            if value is not hidden
        }
        self.calls[path][int(index)].append(found)

    def by_place(self) -> dict[str, str]:
        """Return the module lists whose children are given different things -> what and where."""
        found = {}
        for path, children in self.calls.items():
            first, *others = children.values()
            names = [name for other in others for name in different(first, other)]
            if names:
                found[path] = f"{names[0]} differs from layer to layer ({self.where[path]})"
        return found

    def _value(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return plain(value)
        if value not in self._digests:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                self._digests[value] = _digest(value)
        return self._digests[value]


def different(left: list[Given], right: list[Given]) -> Iterator[str]:
    """Yield what two children were given differently, call by call."""
    for one, other in zip(left, right, strict=False):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                yield f"argument {name}"


def _parts(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of what can be compared; objects that hold states are passed over."""
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, int | float | str):
        yield name, value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif depth < _DEPTH and isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _parts(item, f"{name}.{place}", depth + 1)


def _digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    kind = (str(tensor.dtype), tuple(tensor.shape))
    values = tensor.detach()
    if values.is_meta:
        return kind
    if values.numel() > _MANY:
        values = values[(slice(0, 8),) * values.dim()]
    if values.is_complex():
        values = torch.view_as_real(values)
    data = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (*kind, hashlib.blake2b(data, digest_size=16).hexdigest())
