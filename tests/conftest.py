"""Fixtures that many share; leaves out what no test of a module looks at; prints twins measured."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markupsafe import Markup

DRAWING = {"test_report", "test_report_page", "test_reporting"}
"""Modules whose tests look at the drawings of reports."""

SCENES = {
    "test_experts",
    "test_ghosts",
    "test_synchronized_runs",
    "test_remote_code",
}
"""Modules that run commands and are about the ways in which models are traced and compared."""

gc.disable()  # nothing that is collected goes away, and passes over it would take a third of it


def pytest_collection_finish() -> None:
    """Collect garbage again."""
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no module of slow tests alone where they are left out."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if re.search(r"^pytestmark = \[?pytest\.mark\.slow", text, re.MULTILINE) else None


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Have garbage collections pass over what is there: the million objects of what was imported.

    Training and timing ask for several each.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let commands write reports without drawings, which take longer than most of what is tested.

    Their texts and numbers are as they were; the modules in ``DRAWING`` keep the drawings.
    """
    if not runs_commands(request.module) or request.module.__name__ in DRAWING:
        yield
        return

    def drawn(description: str, *_: Any) -> Markup:
        return Markup('<img class="plot" alt="{}">').format(description)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_pruner.report.figures._drawn", drawn)
        yield


@pytest.fixture(autouse=True, scope="module")
def traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let commands trace a model, and compare the pruned one with its twin, in the first scene.

    The other scenes are what the modules in ``SCENES``, and those without commands, are about;
    single tests of the others put ``scenes_of`` back.
    """
    if not runs_commands(request.module) or request.module.__name__ in SCENES:
        yield
        return

    from llm_pruner.discovery import groups

    every = groups.scenes_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "scenes_of", lambda *given: every(*given)[:1])
        yield


@pytest.fixture(autouse=True, scope="module")
def unsynced(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let nothing wait for the disk, which a command does twenty times; the tests of files do."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "files":
            patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, which no test changes."""
    from command import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``place`` of a module as the current one."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded."""

    def load_model(source: str, **_: object) -> None:
        raise AssertionError(f"{source} was loaded")

    monkeypatch.setattr("llm_pruner.models.load.load_model", load_model)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave families of models other than Llama to the slow tests."""
    from families import FAMILIES

    for item in items:
        values = getattr(item, "callspec", None)
        told = {one for one in values.params.values() if isinstance(one, str)} if values else set()
        if told & FAMILIES.keys() and "llama" not in told:
            item.add_marker("slow")


def runs_commands(module: ModuleType) -> bool:
    """Whether a module of tests runs commands."""
    return any(getattr(value, "__module__", None) == "command" for value in vars(module).values())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the largest difference between pruned models and their masked twins.

    Reads the properties ``twin``, (family, kind, difference), and ``mutations``, (family, members
    shifted, not noticed), of tests: properties reach the main process when tests run in several.
    """
    table: dict[str, dict[str, float]] = {}
    mutations: list[str] = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "mutations":
                    family, tried, missed = value
                    mutations.append(f"{family} {tried - missed} of {tried}")
                elif name == "twin":
                    family, kind, difference = value
                    kinds = table.setdefault(family, {})
                    kinds[kind] = max(kinds.get(kind, 0.0), difference)
    if not table and not mutations:
        return
    terminalreporter.section("pruned model against masked twin: largest difference of logits")
    width = max((len(family) for family in table), default=0)
    for family in sorted(table):
        kinds = table[family]
        parts = "  ".join(f"{kind} {difference:.0e}" for kind, difference in kinds.items())
        terminalreporter.write_line(f"{family:{width}}  max {max(kinds.values()):.1e}  {parts}")
    if mutations:
        terminalreporter.write_line(f"shifted members noticed: {', '.join(sorted(mutations))}")
