"""From what a run did to its report, and from what was measured since."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import rewrite
from llm_pruner.report.data import CARD_FILE, HTML_FILE, JSON_FILE, Report, Variant, read_report
from llm_pruner.report.measured import Data, as_evaluation
from llm_pruner.report.render import digest, files


def write_report(folder: Path, report: Report) -> None:
    """Write page, data and model card into a folder.

    A drawing that fails costs the report, never the checkpoint, which may be hours of work: what
    went wrong becomes a warning.
    """
    try:
        written = files(report)
    except Exception as error:  # whatever a drawing library may raise
        warnings.warn(
            f"no report was written ({type(error).__name__}: {error}); the checkpoint is complete",
            stacklevel=2,
        )
        return
    rewrite(folder, written)


def add_evaluations(folder: Path, found: Mapping[Variant, Data]) -> None:
    """Add what was measured to the report of a folder, and draw it anew.

    A model card that was edited since it was written stays as it is.

    Args:
        folder: output of ``prune``.
        found: model -> data; see ``as_evaluation``.

    Raises:
        UserError: the folder has no report that can be read.
    """
    report = report_in(folder)
    for variant, data in found.items():
        report = report.with_evaluation(variant, as_evaluation(data))
    card = folder / CARD_FILE
    try:
        ours = not card.exists() or digest(card.read_text(encoding="utf-8")) == report.card_digest
    except ValueError:  # not UTF-8, so not ours
        ours = False
    # The data comes last: what was drawn can be drawn again from it.
    drawn = files(report, card=ours).items()
    rewrite(folder, dict(sorted(drawn, key=lambda file: file[0] == JSON_FILE)))


def report_in(folder: Path) -> Report:
    """Return the report of a folder.

    Raises:
        UserError: there is none that can be read.
    """
    file = folder / JSON_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {JSON_FILE}; name a folder that llm-pruner prune wrote")
    return read_report(file)


def page_in(folder: Path) -> Path | None:
    """Return the page in a folder; None if none could be drawn."""
    page = folder / HTML_FILE
    return page if page.is_file() else None


def variant_of(folder: Path, report: Report, model: str, parameters: int) -> Variant:
    """Return which model of the report was measured.

    Args:
        folder: where the report is.
        report: the report there.
        model: what was named for measuring.
        parameters: how many the measured model has.

    Raises:
        UserError: it is neither the model in the folder nor of the size of the dense one.
    """
    if Path(model).expanduser().exists() and Path(model).expanduser().resolve() == folder.resolve():
        return report.final
    dense = report.sizes.get("dense")
    if dense is not None and dense.total == parameters:
        return "dense"
    raise UserError(
        f"{model} has {parameters:,} parameters and is neither the model in {folder} nor "
        f"{report.source.name}, of which it was made; nothing was added to the report; "
        "name one of the two, or leave --report out"
    )
