"""What surgery and verification need of a trace, beside the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llm_pruner.discovery.tracing.lengths import Deleted, SizeSystem
from llm_pruner.discovery.tracing.scenes import Scene
from llm_pruner.discovery.tracing.tracer import Trace
from llm_pruner.types import IntArray, Removal


@dataclass(frozen=True)
class Graph:
    """A settled trace.

    Attributes:
        trace: atoms and the axes of every tensor.
        system: solves for attributes.
        unit_atoms: group name -> representative atom of each unit.
        scenes: the ways in which the model was run.
        left_out: names of those that it could not be run in.
        own_numbers: (module list, module inside a layer, attribute) of numbers of layers that are
            calculated with, so that a layer keeps its own.
    """

    trace: Trace
    system: SizeSystem
    unit_atoms: Mapping[str, IntArray]
    scenes: tuple[Scene, ...]
    left_out: tuple[str, ...] = ()
    own_numbers: frozenset[tuple[str, str, str]] = frozenset()

    def deleted(self, removal: Removal) -> Deleted:
        """Return by atom whether the removal deletes it."""
        flags = np.zeros(len(self.trace.atoms), dtype=bool)
        for name, units in removal.items():
            if name in self.unit_atoms and len(units):
                flags[self.unit_atoms[name][units]] = True
        return flags
