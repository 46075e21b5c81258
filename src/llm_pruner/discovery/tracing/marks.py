"""What is known of tensors, for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch


class _Key(weakref.ref[torch.Tensor]):
    __slots__ = ("number",)
    number: int


class Marks:
    """A dictionary by the identity of tensors, which it does not keep alive.

    A run looks tensors up many times for each operation, so nothing is made to look one up:
    entries are kept by ``id``, and go with their tensor, before another can have it.
    """

    def __init__(self) -> None:
        found: dict[int, tuple[_Key, Any]] = {}

        def forget(key: _Key) -> None:
            found.pop(key.number, None)

        self._found = found
        self._forget: Any = forget

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._found

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        return self._found[id(tensor)][1]

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> None:
        number = id(tensor)
        known = self._found.get(number)
        if known is not None:
            self._found[number] = known[0], value
            return
        key = _Key(tensor, self._forget)
        key.number = number
        self._found[number] = key, value

    def get(self, tensor: torch.Tensor) -> Any:
        """Return the value of a tensor, or None."""
        known = self._found.get(id(tensor))
        if known is not None:
            return known[1]
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{type(tensor).__name__} is no tensor")
        return None

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all of these tensors are in it."""
        found = self._found
        for tensor in tensors:  # noqa: SIM110
            if id(tensor) not in found:
                return False
        return True

    def setdefault(self, tensor: torch.Tensor, value: Any) -> Any:
        """Give a tensor a value unless it has one; return what it has."""
        if tensor not in self:
            self[tensor] = value
        return self[tensor]
