"""Several pruned models side by side: one row per model, one column per thing that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from pydantic import BaseModel

from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.disk import expanded, json_object
from llm_pruner.models.checkpoint_files import name_of, stored_size
from llm_pruner.models.load import load_model
from llm_pruner.planning import read_plan
from llm_pruner.report import figures, view
from llm_pruner.report.data import JSON_FILE, Evaluation, Report, Source, Variant, read_report
from llm_pruner.report.facts import criterion_in_words, settings_of
from llm_pruner.report.text import count, markdown, megabytes, percent
from llm_pruner.report.write import page
from llm_pruner.types import Size

Subject = Literal["size", "how", "perplexity", "accuracy", "measured"]

_PLAN, _CONFIG = "plan.json", "config.json"


@dataclass(frozen=True)
class Entry:
    """One model that is to be compared: its label, a report, and which model of it is meant."""

    label: str
    report: Report
    variant: Variant

    @property
    def found(self) -> Evaluation:
        """What was measured of it."""
        return self.report.evaluations.get(self.variant, Evaluation())


class Compared(Evaluation):
    """One model of a comparison, with all that was measured of it.

    Attributes:
        source: name of the dense model.
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
        columns = [*_of_the_models(self.models), *_measured(self.models)]
        return [column for column in columns if any(column.cells)]

    @property
    def notes(self) -> tuple[str, ...]:
        """The settings of the columns, each once."""
        lines = [f"{column.name}: {column.settings}" for column in self.columns if column.settings]
        return tuple(dict.fromkeys(lines))


def compare_folders(named: Sequence[str]) -> Comparison:
    """Return a comparison of checkpoints, ``DIR`` or ``NAME=DIR``; UserError if one is none.

    A folder that ``prune`` wrote brings its report. Of others the bytes are read from the headers
    of weights, and how it was pruned from ``plan.json``, if there is one.
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
    path = expanded(text)
    if sign and name and not path.is_dir():
        path = expanded(folder)
    else:
        name = name_of(path)
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
    size = Size(total=_parameters(folder, stored[0] or 0), bytes=stored[1])
    if not (folder / _PLAN).is_file():
        name = name_of(folder)
        return Entry(label, Report(source=Source(name=name), sizes={"dense": size}), "dense")
    plan = read_plan(folder / _PLAN)
    report = Report(
        source=Source(name=plan.model.name, revision=plan.model.revision),
        sizes={"dense": Size(total=plan.model.parameters), "pruned": size},
        criterion=criterion_in_words(plan),
        settings=settings_of(plan, {}, {}, plan.text),
    )
    return Entry(label, report, "pruned")


def _parameters(folder: Path, stored: int) -> int:
    """Return the parameters of a checkpoint, tied ones once; 0 of packed ones, not known."""
    config = json_object(folder / _CONFIG)
    how = config.get("quantization_config")
    ours = "pruned" in config or (isinstance(how, dict) and how.get("quant_method") == "llm_pruner")
    if ours or how is not None:
        return stored if ours else 0
    try:
        loaded = load_model(str(folder), weights=False, tokenizer_required=False)
    except UserError:  # such as one with code of its own, which does not run here
        return stored
    return model_size(loaded.model).total


def compare(entries: Sequence[Entry]) -> Comparison:
    """Put models beside each other; the dense models that reports know of come first."""
    named = _with_dense(entries)
    tokens_differ = any(entry.report.tokens for entry in entries) or _tokens_differ(named)
    return Comparison(models=tuple(_compared(entry, tokens_differ) for entry in named))


def _tokens_differ(entries: Sequence[Entry]) -> bool:
    """Whether one text, read alike, has other tokens for some of the models."""
    texts = {
        (text.text_digest, text.protocol, text.window, text.max_tokens, text.ids_digest)
        for entry in entries
        for text in entry.found.perplexity
        if text.text_digest is not None
    }
    return len({text[:-1] for text in texts}) < len(texts)


def _compared(entry: Entry, tokens_differ: bool) -> Compared:
    report, variant = entry.report, entry.variant
    dense, own, pruned = report.sizes.get("dense"), report.sizes.get(variant), variant != "dense"
    structures = report.settings.get("Where from", {}).get("structures") or ()
    units = ", ".join(view.unit(str(name)) for name in structures)
    found = entry.found
    return Compared(
        label=entry.label,
        source=report.source.name,
        variant=variant,
        size=own,
        removed=1 - own.total / dense.total if pruned and own and own.total and dense else None,
        units=units or None if pruned else None,
        chosen_by=report.criterion if pruned else None,
        **dict(found.per_byte() if tokens_differ else found),
    )


def _with_dense(entries: Sequence[Entry]) -> list[Entry]:
    """Add the dense models of the reports, with all that the reports know of each."""
    found: dict[tuple[str, int], Report] = {}
    for report in (entry.report for entry in entries if "dense" in entry.report.sizes):
        known = found.setdefault(_identity(report), report)
        of_dense = report.evaluations.get("dense", Evaluation())
        found[_identity(report)] = known.with_evaluation("dense", of_dense)
    named = [
        replace(one, report=found[_identity(one.report)]) if _is_dense(one) else one
        for one in entries
    ]
    asked = {_identity(one.report) for one in named if _is_dense(one)}
    added = [
        Entry("dense" if len(found) == 1 else f"{report.source.name}, dense", report, "dense")
        for identity, report in found.items()
        if identity not in asked
    ]
    return [*added, *named]


def _is_dense(one: Entry) -> bool:
    return one.variant == "dense" and "dense" in one.report.sizes  # earlier reports may lack it


def _identity(report: Report) -> tuple[str, int]:
    """Return what tells dense models apart."""
    return report.source.name, report.sizes["dense"].total


def _of_the_models(models: Sequence[Compared]) -> Iterator[Column]:
    def column(
        subject: Subject, name: str, cell: Callable[[Compared], Any], *, text: bool = False
    ) -> Column:
        return Column(subject, name, tuple(cell(one) or "" for one in models), text=text)

    yield column("size", "parameters", lambda m: m.size and m.size.total and count(m.size.total))
    yield column("size", "removed", lambda m: m.removed is not None and percent(m.removed))
    yield column("size", "weights", lambda m: m.size and m.size.bytes and megabytes(m.size.bytes))
    yield column("how", "units", lambda m: m.units, text=True)
    yield column("how", "chosen by", lambda m: m.chosen_by, text=True)


def _measured(models: Sequence[Compared]) -> Iterator[Column]:
    by_place = dict(enumerate(models))

    def aligned(part: str) -> list[tuple[Any, tuple[str, ...]]]:
        return [
            (view.first(by), tuple(str(by.get(place, "")) for place in by_place))
            for by in view.aligned(by_place, part)
        ]

    def columns(subject: Subject, found: list[tuple[Any, tuple[str, ...]]]) -> Iterator[Column]:
        names = [one.name for one, _ in found]
        for one, cells in found:
            alone = names.count(one.name) == 1
            name, settings = (one.name, one.settings) if alone else (one.label, "")
            yield Column(subject, name, cells, settings)

    yield from columns("perplexity", aligned("perplexity"))
    scores = aligned("tasks")
    counted = {score.task for score, _ in scores if score.in_mean}
    shown = [each for each in scores if each[0].in_mean or each[0].task not in counted]
    yield from columns("accuracy", shown)
    means = view.task_means(by_place)
    cells = tuple(f"{100 * means[place]:.1f}" if place in means else "" for place in by_place)
    others = any(not score.in_mean for score, _ in shown)
    of = "those of LLM-Pruner" if others else "the tasks above"
    if sum(score.in_mean for score, _ in scores) > len(counted):
        of = view.mean_takes(by_place)
    yield Column("accuracy", "mean", cells, f"of {of}")
    for measurement, cells in aligned("measurements"):
        yield Column("measured", measurement.label, cells)


def render_markdown(found: Comparison) -> str:
    """Return one table; what is the same for all pruned models is said below it."""
    columns, notes = [], list(found.notes)
    for column in found.columns:
        values = {cell for cell in column.cells if cell}
        if column.text and len(values) == 1:
            notes.append(f"{column.name}: {values.pop()}")
        else:
            columns.append(column)
    names = [("perplexity, " if c.subject == "perplexity" else "") + c.name for c in columns]
    head = ["model", *map(markdown, names)]
    marks = ["---", *("---" if column.text else "---:" for column in columns)]
    rows = [
        [markdown(label), *(markdown(column.cells[place]) or "–" for column in columns)]
        for place, label in enumerate(found.labels)
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *rows))
    below = "\n".join(f"- {markdown(note)}" for note in notes)
    return f"{table}\n\n{below}\n" if below else f"{table}\n"


def render_html(found: Comparison) -> str:
    """Return one page that needs nothing else."""
    plots, models = [], found.models
    for number, by in enumerate(view.aligned(dict(enumerate(models)), "perplexity")):
        rows: list[tuple[str, figures.Series]] = [
            (models[place].label, [(models[place].variant, text.perplexity, text.stderr)])
            for place, text in by.items()
            if math.isfinite(text.perplexity)
        ]
        if rows:
            title = f"perplexity, {view.first(by).name}"
            drawing = figures.dots(f"perplexity{number}", title, rows, share=False)
            plots.append((title, Markup(drawing)))
    subjects: dict[str, list[Column]] = {}
    for column in found.columns:
        subjects.setdefault(column.subject, []).append(column)
    return page(
        "compare.html",
        title=f"{len(models)} models compared",
        labels=found.labels,
        subjects=subjects,
        plots=plots,
        notes=found.notes,
    )
