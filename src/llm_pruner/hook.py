"""Registers what the package adds to ``transformers`` once ``transformers`` is there.

That is the loader of pruned checkpoints, and the models that ``transformers`` lacks. Importing
``transformers`` takes seconds, which ``llm-pruner --help``, or a program that only reads plans,
should not have to wait for. So each registration waits for the module that it registers with.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRATIONS = {
    "transformers.modeling_utils": "llm_pruner.checkpoints",
    "transformers.quantizers": "llm_pruner.checkpoints",
    "transformers.models.auto.configuration_auto": "llm_pruner.models.chatglm",
}
"""Module of transformers -> module that registers with it on import.

Whatever loads a model imports the first. The second is all that some programs import before they
read what a config says of quantization. Every Auto class imports the third.
"""


class _Watcher(MetaPathFinder):
    """Lets others find one module, and adds the registration to its execution."""

    def __init__(self, trigger: str, registration: str) -> None:
        self.trigger, self.registration = trigger, registration

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.trigger:
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
            if _unfinished(self.registration, self.trigger):
                return  # that one imports this one, and registers when it is done
            try:
                import_module(self.registration)
            except Exception as error:  # a program that loads no pruned model must not suffer
                warnings.warn(
                    f"llm-pruner could not register with transformers ({error}), so checkpoints "
                    "whose layers differ will not load; install versions that fit each other",
                    stacklevel=2,
                )

        loader.exec_module = exec_module  # type: ignore[method-assign]


def register() -> None:
    """Register now where ``transformers`` is ready for it, elsewhere as soon as it is.

    Importing ``llm_pruner`` calls this, and so does PyTorch: it runs the entry points of the group
    ``torch.backends``, of which the package has one. So every program in whose environment the
    package is installed loads pruned checkpoints, whether or not it knows of the package;
    ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches that off.
    """
    watched = {finder.trigger for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for trigger, registration in _REGISTRATIONS.items():
        if trigger in sys.modules:
            if not _unfinished(registration):
                import_module(registration)
        elif trigger not in watched:
            sys.meta_path.insert(0, _Watcher(trigger, registration))


def _unfinished(registration: str, finished: str | None = None) -> bool:
    """Whether a module that this registers with is being imported right now."""
    modules = [
        sys.modules[trigger]
        for trigger, other in _REGISTRATIONS.items()
        if other == registration and trigger != finished and trigger in sys.modules
    ]
    return any(getattr(module.__spec__, "_initializing", False) for module in modules)
