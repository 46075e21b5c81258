"""Puts traced integers in place of a model's size attributes, and takes them out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_pruner.discovery.tracing.sizes import Expr, TracedInt

_DESCRIPTIVE: dict[str, tuple[tuple[str, int], ...]] = {
    "Linear": (("in_features", 1), ("out_features", 0)),
    "Conv1D": (("nx", 0), ("nf", 1)),
    "Embedding": (("num_embeddings", 0), ("embedding_dim", 1)),
}


def descriptions(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return (attribute, axis of the weight) of the sizes that a standard module states of itself.

    Its own code does not read them.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    return tuple(pair for kind, pairs in _DESCRIPTIVE.items() if kind in names for pair in pairs)


@contextmanager
def traced_attributes(
    model: nn.Module, on_value: Callable[[Expr], None]
) -> Iterator[dict[Expr, int]]:
    """Replace the integer attributes of all modules for the time of the context.

    Integers in tuples and lists, and those of configuration objects, are replaced as well; every
    module gets its own copy of its configuration, so that the origin names one module. Yields
    attribute -> value.
    """
    found: dict[Expr, int] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def traced(value: int, module: str, name: str) -> TracedInt:
        expr = ("attr", module, name)
        found[expr] = value
        return TracedInt.of(value, expr, on_value)

    try:
        for path, module in model.named_modules():
            space = vars(module)
            for key, value in list(space.items()):
                replaced: Any = None
                if type(value) is int:
                    replaced = traced(value, path, key)
                elif _is_int_sequence(value):
                    parts = [traced(item, path, f"{key}.{i}") for i, item in enumerate(value)]
                    replaced = type(value)(parts)
                elif is_config(key, value):
                    replaced = copy.copy(value)
                    for inner, item in list(vars(replaced).items()):
                        if type(item) is int:
                            vars(replaced)[inner] = traced(item, path, f"{key}.{inner}")
                if replaced is not None:
                    undo.append((space, key, value))
                    space[key] = replaced
        yield found
    finally:
        for space, key, value in reversed(undo):
            space[key] = value


def is_config(key: str, value: object) -> bool:
    """Whether a module attribute is a bag of settings."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | torch.Tensor | type)
        and not callable(value)
        and key.lower().strip("_").endswith(("config", "cfg", "args", "hparams"))
        and key != "generation_config"
    )


def _is_int_sequence(value: object) -> bool:
    return (
        type(value) in (tuple, list, torch.Size)
        and len(value) > 0  # type: ignore[arg-type]
        and all(type(item) is int for item in value)  # type: ignore[attr-defined]
    )
