"""Read pruned checkpoints as rows of a comparison; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_pruner.errors import UserError
from llm_pruner.models.stored import stored_size
from llm_pruner.planning import read_plan
from llm_pruner.report.compare import Comparison, Entry, compare
from llm_pruner.report.data import JSON_FILE, Report, Source, read_report
from llm_pruner.report.facts import criterion_in_words, settings_of
from llm_pruner.types import Size

_PLAN, _CONFIG = "plan.json", "config.json"


def compare_folders(named: Sequence[str]) -> Comparison:
    """Return a comparison of checkpoints.

    A folder that ``prune`` wrote brings its report. Of any other checkpoint the size is read from
    the headers of its weights, and how it was pruned from ``plan.json``, if there is one.

    Args:
        named: folders, each as ``DIR`` or ``NAME=DIR``.

    Raises:
        UserError: one is no checkpoint, or two have the same name.
    """
    entries = [_entry(*_label(text)) for text in named]
    labels = [entry.label for entry in entries]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"two models are called {twice!r}; tell them apart with NAME=DIR")
    return compare(entries)


def _label(text: str) -> tuple[str, Path]:
    """Return the name and the folder; a folder whose own name has an equals sign is a folder."""
    name, sign, folder = text.partition("=")
    path = Path(text).expanduser()
    if sign and name and not path.is_dir():
        path = Path(folder).expanduser()
    else:
        name = path.resolve().name
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name checkpoints that llm-pruner prune wrote")
    return name, path


def _entry(label: str, folder: Path) -> Entry:
    if (folder / JSON_FILE).is_file():
        report = read_report(folder / JSON_FILE)
        return Entry(label, report, report.final)
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"{folder} has neither {JSON_FILE} nor {_CONFIG}, so it is no checkpoint; "
            "name folders that llm-pruner prune wrote"
        )
    stored = stored_size(str(folder), None, "auto")
    if stored is None:
        raise UserError(f"{folder} has no safetensors; name folders that llm-pruner prune wrote")
    size = Size(total=stored[0] or 0, bytes=stored[1])
    if not (folder / _PLAN).is_file():
        name = folder.resolve().name
        return Entry(label, Report(source=Source(name=name), sizes={"dense": size}), "dense")
    plan = read_plan(folder / _PLAN)
    report = Report(
        source=Source(name=plan.model.name, revision=plan.model.revision),
        sizes={"dense": Size(total=plan.model.parameters), "pruned": size},
        criterion=criterion_in_words(plan),
        settings=settings_of(plan, {}),
    )
    return Entry(label, report, "pruned")
