"""Whatever is in a registry is in the help, in the docs and in the benchmarks."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from command import done
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion
from llm_pruner.importance.criteria import MEASURES, Measure
from llm_pruner.settings.prune import PlanSettings
from llm_pruner.settings.recover import TrainingSettings
from llm_pruner.settings.registry import COMPENSATIONS, CRITERIA, METHODS, entry, names_in

ROOT = Path(__file__).parents[2]
FOLDER = "importance/criteria"


def helps(command: str) -> set[str]:
    """Return the words of a command's help; names that were broken at a hyphen are whole."""
    text = re.sub(r"-\n\s+", "-", done(command, "-h").out)
    return set(re.findall(r"[\w-]+", text))


def test_the_help_names_all_that_is_in_a_registry():
    assert {*CRITERIA, *MEASURES, *COMPENSATIONS, *PlanSettings.presets} <= helps("prune")
    assert {*METHODS, *TrainingSettings.presets} <= helps("recover")


def test_the_benchmark_offers_each_criterion_and_preset(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    least_damage = importlib.import_module("least_damage")
    assert {run.criterion for run in least_damage.runs("table")} == set(CRITERIA)
    assert {run.preset for run in least_damage.runs("presets")} == set(PlanSettings.presets)


def test_a_file_in_the_folder_is_a_criterion():
    files = (ROOT / "src/llm_pruner" / FOLDER).glob("[!_]*.py")
    names = {file.stem.replace("_", "-") for file in files}
    assert names
    assert set(names_in(FOLDER)) == set(MEASURES) == names
    for name in names:
        measure = entry(FOLDER, name).MEASURE
        assert isinstance(measure, Measure)
        assert MEASURES[name] is measure
        assert name in CRITERIA
        assert Criterion(name).reads_text


def test_what_is_in_no_file_is_no_criterion():
    with pytest.raises(ImportError):
        entry(FOLDER, "no-such-rule")
    with pytest.raises(UserError, match="no-such-rule"):
        PlanSettings(ratio=0.2, criterion="no-such-rule")
