"""Names of what people add to: one file in a folder each.

The file ``importance/criteria/fisher_obs.py`` is the criterion ``fisher-obs``. Names are read from
the folders without importing anything, so that the help needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from typing import Any


def names_in(folder: str) -> tuple[str, ...]:
    """Return the names of all entries in a folder of the package, such as ``recovery/methods``."""
    found = (entry.name for entry in files("llm_pruner").joinpath(folder).iterdir())
    return tuple(
        sorted(
            name.removesuffix(".py").replace("_", "-")
            for name in found
            if name.endswith(".py") and not name.startswith("_")
        )
    )


def entry(folder: str, name: str) -> Any:
    """Return the module of an entry; raises ImportError if there is none."""
    package = folder.replace("/", ".")
    return import_module(f"llm_pruner.{package}.{name.replace('-', '_')}")


CRITERIA = ("random", "l1", "l2", "taylor", *names_in("importance/criteria"))
METHODS = names_in("recovery/methods")
FORMATS = names_in("export/formats")
COMPENSATIONS = ("none", "least-squares")
