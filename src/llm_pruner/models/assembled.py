"""Weights that are put together of several that lie in files, each time that they are read.

Mixtures are stored expert by expert, and transformers stacks and joins them when it loads them: so
all experts of a model would lie in memory, however large it is. Inside ``put_together_late`` a
stack of mapped tensors is a note of what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

Ranges = Sequence[tuple[int, int]]


class Assembled(torch.Tensor):
    """A tensor of which only the parts are there; what asks for its values puts it together.

    Attributes:
        parts: tensors, some of which may be such as well.
        axis: along which they follow each other.
        stacked: whether it is one of its own, as of ``torch.stack``; else as of ``torch.cat``.
    """

    parts: tuple[torch.Tensor, ...]
    axis: int
    stacked: bool

    @staticmethod
    def __new__(cls, parts: tuple[torch.Tensor, ...], axis: int, *, stacked: bool) -> Assembled:
        shape = list(parts[0].shape)
        if stacked:
            axis %= len(shape) + 1
            shape.insert(axis, len(parts))
        else:
            axis %= len(shape)
            shape[axis] = sum(part.shape[axis] for part in parts)
        new: Assembled = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=parts[0].dtype, device=parts[0].device
        )
        new.parts, new.axis, new.stacked = parts, axis, stacked
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            one = args[0]
            return Assembled(one.parts, one.axis, stacked=one.stacked)
        args, kwargs = tree_map_only(Assembled, whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values, in one piece of memory and of its shape."""
    if not isinstance(tensor, Assembled):
        return tensor
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for leaf, place in leaves(tensor, found):
        place.copy_(leaf)
    return found


def leaves(tensor: torch.Tensor, into: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tensors that one is made of, each with its place in ``into``, of the same shape."""
    if not isinstance(tensor, Assembled):
        yield tensor, into
        return
    at = 0
    for part in tensor.parts:
        if tensor.stacked:
            place, at = into.select(tensor.axis, at), at + 1
        else:
            length = part.shape[tensor.axis]
            place, at = into.narrow(tensor.axis, at, length), at + length
        yield from leaves(part, place)


def files(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that one is made of."""
    parts = tensor.parts if isinstance(tensor, Assembled) else ()
    for part in parts:
        yield from files(part)
    if not parts:
        yield tensor


def element(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return one element, shape (1,), by its place in the flat tensor; of a note, no other."""
    if not isinstance(tensor, Assembled):
        return tensor.reshape(-1)[index : index + 1]
    place = [int(one) for one in np.unravel_index(index, tensor.shape)]
    if tensor.stacked:
        part = tensor.parts[place.pop(tensor.axis)]
    else:
        ends = np.cumsum([one.shape[tensor.axis] for one in tensor.parts])
        number = int(np.searchsorted(ends, place[tensor.axis], side="right"))
        place[tensor.axis] -= int(ends[number - 1]) if number else 0
        part = tensor.parts[number]
    return element(part, int(np.ravel_multi_index(place, part.shape)))


def are_mapped(tensor: torch.Tensor, ranges: Ranges) -> bool:
    """Whether all values of a tensor lie in ranges of addresses."""
    return all(
        any(
            first <= one.data_ptr() and one.data_ptr() + one.nbytes <= last
            for first, last in ranges
        )
        for one in files(tensor)
    )


class _Late(TorchFunctionMode):
    def __init__(self, mapped: Callable[[], Ranges]) -> None:
        super().__init__()
        self._mapped = mapped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.stack, torch.cat) and self._are_noted(args[0]):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return Assembled(tuple(args[0]), dim, stacked=func is torch.stack)
        return func(*args, **kwargs)

    def _are_noted(self, tensors: Sequence[torch.Tensor]) -> bool:
        ranges = self._mapped()
        return len({one.dtype for one in tensors}) == 1 and all(
            one.ndim > 0 and one.is_contiguous() and are_mapped(one, ranges) for one in tensors
        )


@contextmanager
def put_together_late(mapped: Callable[[], Ranges]) -> Iterator[None]:
    """Inside, what is stacked or joined of weight files alone is ``Assembled``.

    ``mapped`` returns the ranges of addresses, (first, one behind the last), of mapped files.
    """
    with _Late(mapped):
        yield
