"""Criteria that look at activations: one file each, found by its name.

A file ``my_rule.py`` that says ``MEASURE = Measure(...)`` is the criterion ``my-rule``: the help,
``llm-pruner prune --criterion``, the table in the docs and the benchmarks know it then.
"""

from __future__ import annotations

from llm_pruner.importance.observation import Measure
from llm_pruner.settings.registry import entry, names_in

_FOLDER = "importance/criteria"

MEASURES: dict[str, Measure] = {name: entry(_FOLDER, name).MEASURE for name in names_in(_FOLDER)}

__all__ = ["MEASURES", "Measure"]
