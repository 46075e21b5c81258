"""Several pruned models side by side: one row per model, one column per thing that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from markupsafe import Markup

from llm_pruner.report import figures, view
from llm_pruner.report.data import (
    Evaluation,
    Report,
    Variant,
    measurement_key,
    perplexity_key,
    task_key,
)
from llm_pruner.report.text import count, markdown, measured, megabytes, percent
from llm_pruner.report.write import page
from llm_pruner.types import Size

Subject = Literal["size", "how", "perplexity", "accuracy", "measured"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        label: what it is called in the comparison.
        report: where its numbers are.
        variant: which model of the report it is.
    """

    label: str
    report: Report
    variant: Variant

    @property
    def size(self) -> Size | None:
        """Return its size, if known."""
        return self.report.sizes.get(self.variant)

    @property
    def evaluation(self) -> Evaluation:
        """Return what was measured of it."""
        return self.report.evaluations.get(self.variant, Evaluation())

    @property
    def removed(self) -> float | None:
        """Return the share of parameters that was removed, if known."""
        dense, own = self.report.sizes.get("dense"), self.size
        if self.variant == "dense" or dense is None or own is None:
            return None
        return 1 - own.total / dense.total


@dataclass(frozen=True)
class Column:
    """One thing that is compared.

    Attributes:
        subject: columns of one subject stand together.
        name: heading.
        cells: one text per entry, empty where it is not known.
        settings: what a reader needs to compare the numbers, empty if nothing.
        text: whether the cells are words.
    """

    subject: Subject
    name: str
    cells: tuple[str, ...]
    settings: str = ""
    text: bool = False


@dataclass(frozen=True)
class Comparison:
    """Entries and columns; of the columns, only those that hold something."""

    entries: tuple[Entry, ...]
    columns: tuple[Column, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels of the rows."""
        return tuple(entry.label for entry in self.entries)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the settings of the columns, each once."""
        lines = [f"{column.name}: {column.settings}" for column in self.columns if column.settings]
        return tuple(dict.fromkeys(lines))


def compare(entries: Sequence[Entry]) -> Comparison:
    """Put models beside each other; the dense models that reports know of come first."""
    entries = _with_dense(entries)

    def removed(entry: Entry) -> str | None:
        return None if entry.removed is None else percent(entry.removed)

    def weights(entry: Entry) -> str | None:
        return megabytes(entry.size.bytes) if entry.size and entry.size.bytes else None

    columns = [
        _column("size", "parameters", entries, lambda e: e.size and count(e.size.total)),
        _column("size", "removed", entries, removed),
        _column("size", "weights", entries, weights),
        _column("how", "units", entries, _structures, text=True),
        _column("how", "chosen by", entries, _criterion, text=True),
        *_perplexities(entries),
        *_tasks(entries),
        *_measurements(entries),
    ]
    return Comparison(entries, tuple(column for column in columns if any(column.cells)))


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


def _column(
    subject: Subject,
    name: str,
    entries: Sequence[Entry],
    cell: Callable[[Entry], Any],
    *,
    text: bool = False,
) -> Column:
    cells = tuple(str(cell(entry) or "") for entry in entries)
    return Column(subject, name, cells, text=text)


def _structures(entry: Entry) -> str:
    if entry.variant == "dense":
        return ""
    # In reports of earlier versions under another heading.
    settings = entry.report.settings
    where = settings.get("Where from") or settings.get("Selection", {})
    chosen = where.get("structures") or ()
    return ", ".join(view.unit(str(name)) for name in chosen)


def _criterion(entry: Entry) -> str:
    return "" if entry.variant == "dense" else entry.report.criterion or ""


def _results(
    entries: Sequence[Entry], part: str, key: Callable[[Any], Any]
) -> list[tuple[Any, list[Any]]]:
    """Return (one of the results, result of each entry or None) for all that may be compared."""
    tables = [{key(r): r for r in getattr(entry.evaluation, part)} for entry in entries]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [[table.get(key) for table in tables] for key in keys]
    return [(next(r for r in row if r is not None), row) for row in rows]


def _perplexities(entries: Sequence[Entry]) -> list[Column]:
    found = _results(entries, "perplexity", perplexity_key)
    corpora = [view.perplexity_label(first) for first, _ in found]
    columns = []
    for corpus, (first, row) in zip(corpora, found, strict=True):
        settings = view.perplexity_settings(first)
        alone = corpora.count(corpus) == 1
        columns.append(
            Column(
                "perplexity",
                corpus if alone else f"{corpus} ({settings})",
                tuple("" if r is None else measured(r.perplexity, r.stderr) for r in row),
                settings if alone else "",
            )
        )
    return columns


def _tasks(entries: Sequence[Entry]) -> list[Column]:
    found = [(first, row) for first, row in _results(entries, "tasks", task_key) if first.in_mean]
    columns = []
    for first, row in found:
        cells = [
            ""
            if r is None
            else measured(100 * r.value, None if r.stderr is None else 100 * r.stderr, ".1f")
            for r in row
        ]
        items = "" if first.items is None else f", {first.items:,} items"
        columns.append(
            Column("accuracy", first.task, tuple(cells), f"{first.metric} in percent{items}")
        )
    if found:
        means = [_mean([row[place] for _, row in found]) for place in range(len(entries))]
        columns.append(Column("accuracy", "mean", tuple(means), "of the tasks above"))
    return columns


def _mean(scores: Sequence[Any]) -> str:
    """Return the mean in percent; nothing if a task is missing, since means would not compare."""
    if any(score is None for score in scores):
        return ""
    return f"{100 * sum(score.value for score in scores) / len(scores):.1f}"


def _measurements(entries: Sequence[Entry]) -> list[Column]:
    return [
        Column(
            "measured",
            view.measurement_label(first),
            tuple("" if r is None else view.quantity(r) for r in row),
        )
        for first, row in _results(entries, "measurements", measurement_key)
    ]


def as_data(found: Comparison) -> dict[str, Any]:
    """Return the numbers for scripts."""
    return {
        "format_version": FORMAT_VERSION,
        "models": [
            {
                "label": entry.label,
                "source": entry.report.source.name,
                "variant": entry.variant,
                "size": None if entry.size is None else asdict(entry.size),
                "removed": entry.removed,
                "units": _structures(entry) or None,
                "chosen_by": _criterion(entry) or None,
                **entry.evaluation.model_dump(mode="json"),
            }
            for entry in found.entries
        ],
    }


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
    for number, (first, row) in enumerate(_results(found.entries, "perplexity", perplexity_key)):
        rows: list[tuple[str, figures.Series]] = [
            (entry.label, [(entry.variant, r.perplexity, r.stderr)])
            for entry, r in zip(found.entries, row, strict=True)
            if r is not None and math.isfinite(r.perplexity)
        ]
        if rows:
            title = f"perplexity, {view.perplexity_label(first)}"
            drawing = figures.dots(f"perplexity{number}", title, rows, share=False)
            plots.append((title, Markup(drawing)))
    subjects: dict[str, list[Column]] = {}
    for column in found.columns:
        subjects.setdefault(column.subject, []).append(column)
    return page(
        "compare.html",
        title=f"{len(found.entries)} models compared",
        labels=found.labels,
        subjects=subjects,
        plots=plots,
        notes=found.notes,
    )
