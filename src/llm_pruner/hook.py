"""Registers the loader of pruned checkpoints once ``transformers`` can load models.

Importing ``transformers`` takes seconds, which ``llm-pruner --help``, or a program that only reads
plans, should not have to wait for. So the registration waits until ``transformers`` is there, which
it is before any model can be loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"
"""Whatever loads a model imports this module."""
_REGISTRATION = "llm_pruner.checkpoints"


class _Watcher(MetaPathFinder):
    """Lets others find the module, and adds the registration to its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TRIGGER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                self._extend(spec)
                return spec
        return None

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_REGISTRATION)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def register() -> None:
    """Register now if ``transformers`` can load models already, else as soon as it can."""
    if _TRIGGER in sys.modules:
        import_module(_REGISTRATION)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
