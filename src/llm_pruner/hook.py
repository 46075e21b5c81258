"""Has ``transformers`` know what this package adds: the loader of pruned checkpoints, and ChatGLM.

Whatever imports PyTorch runs ``register``, so it must cost nothing and break nothing. What it puts
into the tables of ``transformers`` are stand-ins: the code behind them is imported, and fails if it
does, when a checkpoint asks for it. This module needs the standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class StandIn:
    """Stands in a table for a class of this package until that is used.

    It is said to be one of transformers, so that ``trust_remote_code=True`` runs a folder's own
    code, as where this package is not installed.
    """

    def __init__(self, home: str, name: str) -> None:
        self._home, self.__name__, self.__module__ = home, name, f"transformers.{home}"

    def _original(self) -> Any:
        return getattr(import_module(self._home), self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked of every object, as by ``copy``
            raise AttributeError(name)
        return getattr(self._original(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original()(*args, **kwargs)


def _add_chatglm(auto: ModuleType) -> None:
    stand_in = StandIn("llm_pruner.models.chatglm", "ChatGLMConfig")
    auto.CONFIG_MAPPING.register("chatglm", stand_in, exist_ok=True)


def _add_pruned_models(modeling: ModuleType) -> None:
    """Have a config with a recipe build the class that cuts, whichever class of its is called."""
    base = modeling.PreTrainedModel

    def build(cls: Any, /, *args: Any, **named: Any) -> Any:
        config = named.get("config", args[0] if args else None)
        if isinstance(getattr(config, "pruned", None), dict):
            cls = import_module("llm_pruner.checkpoints.remote_code").pruned_class(cls)
        return super(base, cls).__new__(cls)

    base.__new__ = build


_ADDITIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _add_chatglm,
    "transformers.modeling_utils": _add_pruned_models,
}
"""Module of transformers that holds a table or a class -> what adds to it."""


class _Finder(MetaPathFinder):
    """Lets others find the modules that hold tables, and adds to these once they are there."""

    def __init__(self) -> None:
        self.awaited = set(_ADDITIONS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        self.add_to_made()
        if name in self.awaited:
            with suppress(Exception):  # which the one that raised it will raise again
                for finder in sys.meta_path:
                    spec = None if finder is self else finder.find_spec(name, path, target)
                    if spec is not None:
                        self._extend(spec)
                        return spec
        return None

    def add_to_made(self) -> None:
        """Add to modules that are complete: PyTorch may be imported in the middle of one."""
        for name in [*self.awaited]:
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._add(module, name)

    def _add(self, module: ModuleType, name: str) -> None:
        self.awaited.discard(name)
        with suppress(Exception):  # another release of transformers may have no such table
            _ADDITIONS[name](module)

    def _extend(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._add(module, spec.name)
            if not self.awaited and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module


def register() -> None:
    """Add to the tables of ``transformers`` now, or as soon as they are there; raises nothing.

    Importing ``llm_pruner`` calls this, and so does PyTorch, as an entry point of the group
    ``torch.backends``. So every program in whose environment the package is installed loads pruned
    checkpoints, whether or not it knows of the package. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` in the
    environment keeps PyTorch from it.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    finder.add_to_made()
    if finder.awaited:
        sys.meta_path.insert(0, finder)
