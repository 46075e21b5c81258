"""Gives a model's integer attributes an origin for the time of a trace, and restores what it holds.

``functools.lru_cache`` finds a result by the value of its arguments. Two sizes of equal value but
different origin would share one result, so memoised functions compute anew during a trace.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from llm_pruner.models.layers import is_settings
from llm_pruner.tracing.sizes import Expr, TracedInt

_DESCRIPTIVE: dict[str, tuple[tuple[str, int], ...]] = {
    "Linear": (("in_features", 1), ("out_features", 0)),
    "Conv1D": (("nx", 0), ("nf", 1)),
    "Embedding": (("num_embeddings", 0), ("embedding_dim", 1)),
    "PReLU": (("num_parameters", 0),),
}


WEIGHTS = ("parametrizations.weight.original1", "weight_v", "weight")
"""Names of a module's weight: the direction that a weight norm keeps, or the weight itself."""


def descriptions(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return (attribute, axis of the weight) of the sizes that a standard module describes."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return tuple(pair for kind, pairs in _DESCRIPTIVE.items() if kind in names for pair in pairs)


def trace_attributes_(model: nn.Module, on_value: Callable[[Expr], None]) -> dict[Expr, int]:
    """Replace the integer attributes of all modules by traced ones; return attribute -> value.

    Integers in tuples, lists and configs are replaced too. Every module gets its own copy of its
    config, so that the origin names one module.
    """
    found: dict[Expr, int] = {}

    def traced(value: int, module: str, name: str) -> TracedInt:
        expr = ("attr", module, name)
        found[expr] = value
        return TracedInt(value, expr, on_value)

    for path, module in model.named_modules():
        space = vars(module)
        for key, value in list(space.items()):
            if type(value) is int:
                space[key] = traced(value, path, key)
            elif _is_int_sequence(value):
                parts = [traced(item, path, f"{key}.{i}") for i, item in enumerate(value)]
                space[key] = type(value)(parts)
            elif is_settings(key, value):
                space[key] = copy.copy(value)
                for inner, item in list(vars(value).items()):
                    if type(item) is int:
                        vars(space[key])[inner] = traced(item, path, f"{key}.{inner}")
    return found


def spaces_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the dictionaries that hold what modules own."""
    return [
        space
        for module in model.modules()
        for space in (vars(module), module._parameters, module._buffers, module._modules)
        if isinstance(space, dict)
    ]


@contextmanager
def put_back(spaces: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Restore the contents of dictionaries at the end of the context.

    Also those of the containers and the objects of a model's code (such as its config) in them: a
    forward pass may keep state there.
    """
    held = [(one, copy.copy(one)) for one in _within(spaces)]
    try:
        yield
    finally:
        for one, before in held:
            one.clear()
            if isinstance(one, dict | set):
                one.update(before)
            else:
                one.extend(before)


_CONTAINERS = (dict, OrderedDict, defaultdict, set, list, deque)


def _within(spaces: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Yield dictionaries and the containers that can be reached from them, each once."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [*spaces]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if type(one) is not tuple:
            yield one
        if isinstance(one, dict):  # whoever registers a hook removes it
            values = [of for key, of in one.items() if not (type(key) is str and "_hooks" in key)]
        else:
            values = [*one]
        waiting += [of for of in values if type(of) in (*_CONTAINERS, tuple)]
        waiting += [vars(of) for of in values if _is_of_a_model(of)]


def _is_of_a_model(value: Any) -> bool:
    """Whether a value is an object with attributes of a class of the model's own code."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0] not in _OTHERS
        and not issubclass(kind, nn.Module | torch.Tensor | type)
        and isinstance(getattr(value, "__dict__", None), dict)
    )


def _is_int_sequence(value: object) -> bool:
    return (
        type(value) in (tuple, list, torch.Size)
        and len(value) > 0  # type: ignore[arg-type]
        and all(type(item) is int for item in value)  # type: ignore[attr-defined]
    )


_Cached = functools._lru_cache_wrapper

_OTHERS = frozenset(sys.stdlib_module_names) | {"torch", "numpy", __name__.partition(".")[0]}


@contextmanager
def without_memory() -> Iterator[None]:
    """Let memoised functions compute anew whenever they are given traced sizes."""
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
        for owner, name in _memoised():  # modules imported meanwhile have some too
            if id(vars(owner)[name]) not in wrapped:
                vars(owner)[name].cache_clear()


def _memoised() -> list[tuple[Any, str]]:
    """Return (owner, name) of the memoised functions in all modules but those of ``_OTHERS``."""
    loaded = [
        (name, id(module), len(vars(module)))
        for name, module in [*sys.modules.items()]
        if name.partition(".")[0] not in _OTHERS and isinstance(module, ModuleType)
    ]
    return _memoised_in(tuple(loaded))


@functools.lru_cache(maxsize=1)
def _memoised_in(loaded: tuple[tuple[str, int, int], ...]) -> list[tuple[Any, str]]:
    """Search the loaded modules, given as (name, id, number of names) so that changes are seen."""
    found: list[tuple[Any, str]] = []
    for module_name, _, _ in loaded:
        module = sys.modules[module_name]
        for name, value in list(vars(module).items()):
            if isinstance(value, _Cached):
                found.append((module, name))
            elif type(value) is type and value.__module__ == module_name:
                inside = [key for key, item in vars(value).items() if isinstance(item, _Cached)]
                found += [(value, key) for key in inside]
    return found


@functools.cache
def _asking(cached: Any) -> Callable[..., Any]:
    """Return a stand-in for a memoised function that computes anew where sizes are given."""

    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A method may read size attributes of its module.
        method = bool(args) and isinstance(args[0], nn.Module)
        anew = method or _holds_size(args) or _holds_size(kwargs)
        return (cached.__wrapped__ if anew else cached)(*args, **kwargs)

    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _holds_size(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_size, value.values()))
    if isinstance(value, tuple | list | set | frozenset):
        return any(map(_holds_size, value))
    return type(value) is TracedInt
