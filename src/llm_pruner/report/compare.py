"""Several pruned models side by side: one row per model, one column per thing that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from markupsafe import Markup
from pydantic import BaseModel

from llm_pruner.report import figures, view
from llm_pruner.report.data import Evaluation, Report, Variant
from llm_pruner.report.text import count, markdown, megabytes, percent
from llm_pruner.report.write import page
from llm_pruner.types import Size

Subject = Literal["size", "how", "perplexity", "accuracy", "measured"]


@dataclass(frozen=True)
class Entry:
    """One model that is to be compared: its label, a report, and which model of it is meant."""

    label: str
    report: Report
    variant: Variant


class Compared(Evaluation):
    """One model of a comparison, with all that was measured of it.

    Attributes:
        label: what it is called in the comparison.
        source: name of the dense model.
        variant: which model of its report it is.
        size: None if it is not known.
        removed: share of the parameters that was removed, if known.
        units: what was removed, in words; None of the dense model.
        chosen_by: how units were chosen, in words; None of the dense model.
    """

    label: str
    source: str
    variant: Variant
    size: Size | None
    removed: float | None
    units: str | None
    chosen_by: str | None


@dataclass(frozen=True)
class Column:
    """One thing that is compared.

    Attributes:
        subject: columns of one subject stand together.
        name: heading.
        cells: one text per model, empty where it is not known.
        settings: what a reader needs to compare the numbers, empty if nothing.
        text: whether the cells are words.
    """

    subject: Subject
    name: str
    cells: tuple[str, ...]
    settings: str = ""
    text: bool = False


class Comparison(BaseModel):
    """Models beside each other."""

    format_version: Literal[1] = 1
    models: tuple[Compared, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the rows."""
        return tuple(model.label for model in self.models)

    @property
    def columns(self) -> list[Column]:
        """The columns that hold something."""
        models = self.models

        def column(
            subject: Subject, name: str, cell: Callable[[Compared], Any], *, text: bool = False
        ) -> Column:
            return Column(subject, name, tuple(cell(one) or "" for one in models), text=text)

        columns = [
            column("size", "parameters", lambda m: m.size and count(m.size.total)),
            column("size", "removed", lambda m: m.removed is not None and percent(m.removed)),
            column(
                "size", "weights", lambda m: m.size and m.size.bytes and megabytes(m.size.bytes)
            ),
            column("how", "units", lambda m: m.units, text=True),
            column("how", "chosen by", lambda m: m.chosen_by, text=True),
            *_perplexities(models),
            *_tasks(models),
            *(
                Column("measured", first.label, _cells(row))
                for first, row in _aligned(models, "measurements")
            ),
        ]
        return [column for column in columns if any(column.cells)]

    @property
    def notes(self) -> tuple[str, ...]:
        """The settings of the columns, each once."""
        lines = [f"{column.name}: {column.settings}" for column in self.columns if column.settings]
        return tuple(dict.fromkeys(lines))


def compare(entries: Sequence[Entry]) -> Comparison:
    """Put models beside each other; the dense models that reports know of come first."""
    return Comparison(models=tuple(_compared(entry) for entry in _with_dense(entries)))


def _compared(entry: Entry) -> Compared:
    report, variant = entry.report, entry.variant
    dense, own, pruned = report.sizes.get("dense"), report.sizes.get(variant), variant != "dense"
    structures = report.settings.get("Where from", {}).get("structures") or ()
    units = ", ".join(view.unit(str(name)) for name in structures)
    return Compared(
        label=entry.label,
        source=report.source.name,
        variant=variant,
        size=own,
        removed=1 - own.total / dense.total if pruned and own and dense else None,
        units=units or None if pruned else None,
        chosen_by=report.criterion if pruned else None,
        **dict(report.evaluations.get(variant, Evaluation())),
    )


def _with_dense(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Add the dense models of the reports, with all that the reports know of each."""
    found: dict[tuple[str, int], Report] = {}
    for report in (entry.report for entry in entries if "dense" in entry.report.sizes):
        known = found.setdefault(_identity(report), report)
        if known is not report and "dense" in report.evaluations:
            known = known.with_evaluation("dense", report.evaluations["dense"])
            found[_identity(report)] = known
    asked = {_identity(entry.report) for entry in entries if entry.variant == "dense"}
    added = [
        Entry("dense" if len(found) == 1 else f"{report.source.name}, dense", report, "dense")
        for identity, report in found.items()
        if identity not in asked
    ]
    return (
        *added,
        *(
            replace(entry, report=found[_identity(entry.report)])
            if entry.variant == "dense"
            else entry
            for entry in entries
        ),
    )


def _identity(report: Report) -> tuple[str, int]:
    """Return what tells dense models apart."""
    return report.source.name, report.sizes["dense"].total


def _aligned(models: Sequence[Compared], part: str) -> list[tuple[Any, list[Any]]]:
    """Return (one of the results, result of each model or None) for all that may be compared."""
    found = view.aligned(dict(enumerate(models)), part)
    return [(view.first(by), [by.get(place) for place in range(len(models))]) for by in found]


def _cells(row: Sequence[Any]) -> tuple[str, ...]:
    return tuple("" if result is None else str(result) for result in row)


def _perplexities(models: Sequence[Compared]) -> list[Column]:
    found = _aligned(models, "perplexity")
    names = [first.name for first, _ in found]
    return [
        Column("perplexity", first.name, _cells(row), first.settings)
        if names.count(first.name) == 1
        else Column("perplexity", first.label, _cells(row))
        for first, row in found
    ]


def _tasks(models: Sequence[Compared]) -> list[Column]:
    found = [(first, row) for first, row in _aligned(models, "tasks") if first.in_mean]
    columns = []
    for first, row in found:
        items = "" if first.items is None else f", {first.items:,} items"
        settings = f"{first.metric} in percent{items}"
        columns.append(Column("accuracy", first.task, _cells(row), settings))
    if found:
        means = [_mean([row[place] for _, row in found]) for place in range(len(models))]
        columns.append(Column("accuracy", "mean", tuple(means), "of the tasks above"))
    return columns


def _mean(scores: Sequence[Any]) -> str:
    """Return the mean in percent; nothing if a task is missing, since means would not compare."""
    if any(score is None for score in scores):
        return ""
    return f"{100 * sum(score.value for score in scores) / len(scores):.1f}"


def render_markdown(found: Comparison) -> str:
    """Return one table; what is the same for all pruned models is said below it."""
    columns, notes = [], list(found.notes)
    for column in found.columns:
        values = {cell for cell in column.cells if cell}
        if column.text and len(values) == 1:
            notes.append(f"{column.name}: {values.pop()}")
        else:
            columns.append(column)
    head = ["model", *(markdown(_heading(column)) for column in columns)]
    marks = ["---", *("---" if column.text else "---:" for column in columns)]
    lines = [head, marks]
    for place, label in enumerate(found.labels):
        lines.append(
            [markdown(label), *(markdown(column.cells[place]) or "–" for column in columns)]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    below = "\n".join(f"- {markdown(note)}" for note in notes)
    return f"{table}\n\n{below}\n" if below else f"{table}\n"


def _heading(column: Column) -> str:
    """Return a heading that stands alone."""
    return f"perplexity, {column.name}" if column.subject == "perplexity" else column.name


def render_html(found: Comparison) -> str:
    """Return one page that needs nothing else."""
    plots = []
    for number, (first, row) in enumerate(_aligned(found.models, "perplexity")):
        rows: list[tuple[str, figures.Series]] = [
            (model.label, [(model.variant, r.perplexity, r.stderr)])
            for model, r in zip(found.models, row, strict=True)
            if r is not None and math.isfinite(r.perplexity)
        ]
        if rows:
            title = f"perplexity, {first.name}"
            drawing = figures.dots(f"perplexity{number}", title, rows, share=False)
            plots.append((title, Markup(drawing)))
    subjects: dict[str, list[Column]] = {}
    for column in found.columns:
        subjects.setdefault(column.subject, []).append(column)
    return page(
        "compare.html",
        title=f"{len(found.models)} models compared",
        labels=found.labels,
        subjects=subjects,
        plots=plots,
        notes=found.notes,
    )
