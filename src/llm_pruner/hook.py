"""Has ``transformers`` load pruned checkpoints whose layers differ.

Whatever imports PyTorch runs ``register``, so it must cost nothing and break nothing. The loader is
imported, and fails if it does, when a checkpoint asks for it. This module needs the standard
library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AWAITED = "transformers.modeling_utils"


def _add_pruned_models(modeling: ModuleType) -> None:
    """Have a config with a recipe build the class that cuts, whichever class of its is called."""
    base = modeling.PreTrainedModel

    def build(cls: Any, /, *args: Any, **named: Any) -> Any:
        config = named.get("config", args[0] if args else None)
        if isinstance(getattr(config, "pruned", None), dict):
            cls = import_module("llm_pruner.checkpoints.remote_code").pruned_class(cls)
        return super(base, cls).__new__(cls)

    base.__new__ = build


class _Finder(MetaPathFinder):
    """Leaves the search for the awaited module to other finders, and adds to it once it is made."""

    def __init__(self) -> None:
        self.waits = True

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        self.add_if_made()
        if name == _AWAITED:
            with suppress(Exception):  # which the one that raised it will raise again
                for finder in sys.meta_path:
                    spec = None if finder is self else finder.find_spec(name, path, target)
                    if spec is not None:
                        self._extend(spec)
                        return spec
        return None

    def add_if_made(self) -> None:
        """Add to the module if it is complete: PyTorch may be imported in the middle of it."""
        module = sys.modules.get(_AWAITED)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            self._add(module)

    def _add(self, module: ModuleType) -> None:
        if self.waits:
            self.waits = False
            with suppress(Exception):  # another release of transformers may have no such class
                _add_pruned_models(module)

    def _extend(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._add(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module


def register() -> None:
    """Have ``transformers`` load pruned checkpoints, now or once it is imported; raises nothing.

    Importing ``llm_pruner`` calls this, and so does PyTorch, as an entry point of the group
    ``torch.backends``. So every program in whose environment the package is installed loads pruned
    checkpoints, whether or not it knows of the package. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` in the
    environment keeps PyTorch from it.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    finder.add_if_made()
    if finder.waits:
        sys.meta_path.insert(0, finder)
