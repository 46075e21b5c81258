"""Keeps memoised functions from handing the sizes of one module to another while a model is traced.

``functools.lru_cache`` finds a result by the value of its arguments. Two sizes of equal value with
different origins are one to it, and what was made of the first would stand for the second, in this
model and in the next one that is traced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from llm_pruner.discovery.tracing.sizes import TracedInt

_Cached = functools._lru_cache_wrapper

_known: dict[str, tuple[int, list[tuple[Any, str]]]] = {}
"""Module name -> number of its names when it was looked through, memoised functions in it."""

_OTHERS = frozenset(sys.stdlib_module_names) | {"torch", "numpy", __name__.partition(".")[0]}


@contextmanager
def without_memory() -> Iterator[None]:
    """Let memoised functions of models and libraries compute anew what they are given sizes for."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for owner, name in _memoised():
            cached = vars(owner)[name]
            if isinstance(cached, _Cached):
                setattr(owner, name, _asking(cached))
                undo.append((owner, name, cached))
        yield
    finally:
        for owner, name, cached in undo:
            setattr(owner, name, cached)
        wrapped = {id(cached) for _, _, cached in undo}
        for owner, name in _memoised():
            # Of modules that were imported meanwhile.
            if id(vars(owner)[name]) not in wrapped:
                vars(owner)[name].cache_clear()


def _memoised() -> Iterator[tuple[Any, str]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OTHERS or not isinstance(module, ModuleType):
            continue
        space = vars(module)
        if name not in _known or _known[name][0] != len(space):
            _known[name] = (len(space), list(_found_in(module)))
        yield from _known[name][1]


def _found_in(module: ModuleType) -> Iterator[tuple[Any, str]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, _Cached):
            yield module, name
        elif type(value) is type and value.__module__ == module.__name__:
            yield from (
                (value, inner) for inner, item in vars(value).items() if isinstance(item, _Cached)
            )


def _asking(cached: Any) -> Callable[..., Any]:
    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        traced = _holds_size(args) or _holds_size(kwargs)
        return (cached.__wrapped__ if traced else cached)(*args, **kwargs)

    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _holds_size(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_size, value.values()))
    if isinstance(value, tuple | list | set | frozenset):
        return any(map(_holds_size, value))
    return type(value) is TracedInt
