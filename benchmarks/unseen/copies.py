"""A copy of a model whose modules' functions are its own as well."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any

from torch import nn


def own_copy(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy whose modules' functions are its own as well.

    ``copy.deepcopy`` takes a function as it is, so one that a module holds, such as
    ``lambda x: x @ self.embedding.weight.T``, would go on reading the modules of the original.

    Args:
        memo: see ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in [*vars(module).items()]:
            if isinstance(value, FunctionType) and value.__closure__:
                vars(module)[name] = _bound_anew(value, memo)
    return copied


def _bound_anew(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    """Return a function that reads copies in place of modules that were copied."""
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            if isinstance(cell.cell_contents, nn.Module):
                cell = CellType(memo.get(id(cell.cell_contents), cell.cell_contents))
        cells.append(cell)
    bound = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    vars(bound).update(vars(function))
    return bound
