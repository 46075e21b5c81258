"""Several pruned models side by side: one row per model, one column per thing that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded
from llm_pruner.models.checkpoint_files import name_of
from llm_pruner.report import view
from llm_pruner.report.data import Evaluation, Report, Result, Variant, report_in
from llm_pruner.report.text import count, markdown, megabytes, percent
from llm_pruner.types import Size

Subject = Literal["size", "how", "perplexity", "accuracy", "measured"]


@dataclass(frozen=True)
class Entry:
    """One model that is to be compared: its label, a report, and which model of it is meant."""

    label: str
    report: Report
    variant: Variant


@dataclass(frozen=True)
class Compared:
    """One model of a comparison; ``removed`` is a share of the parameters, if known."""

    label: str
    source: str
    variant: Variant
    size: Size | None
    removed: float | None
    units: str
    chosen_by: str
    found: Evaluation


@dataclass(frozen=True)
class Column:
    """One thing that is compared."""

    subject: Subject
    name: str
    cells: tuple[str, ...]
    settings: str = ""
    text: bool = False


@dataclass(frozen=True)
class Comparison:
    """Models beside each other."""

    models: tuple[Compared, ...]
    format_version: int = 2

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
    """Compare folders with reports, ``DIR`` or ``NAME=DIR``; UserError if one has none."""
    entries = []
    for label, folder in map(_label, named):
        report = report_in(folder)
        entries.append(Entry(label, report, report.final))
    labels = [entry.label for entry in entries]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two models are called {twice[0]!r}; tell them apart with NAME=DIR")
    return compare(entries)


def _label(text: str) -> tuple[str, Path]:
    name, _, folder = text.rpartition("=")
    path = expanded(folder)
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name checkpoints that llm-pruner prune wrote")
    return name or name_of(path), path


def compare(entries: Sequence[Entry]) -> Comparison:
    """Put models beside each other; the dense models that reports know of come first."""
    named = _with_dense(entries)
    found = [one.report.evaluations.get(one.variant, Evaluation()) for one in named]
    by_bits = any(entry.report.tokens for entry in entries) or _tokens_differ(found)
    hidden = "perplexity" if by_bits else "bits"
    return Comparison(
        tuple(
            _compared(entry, tuple(one for one in of.results if one.part != hidden))
            for entry, of in zip(named, found, strict=True)
        )
    )


def _tokens_differ(found: Sequence[Evaluation]) -> bool:
    """Whether one text, read alike, has other tokens for some of the models."""
    texts: set[Any] = set()
    alike: set[Any] = set()
    for bits, of in ((one.of("bits"), one) for one in found):
        names = {one.name for one in bits}
        alike |= {one.key for one in bits}
        texts |= {one.key for one in of.of("perplexity") if one.name in names}
    return len(alike) < len(texts)


def _compared(entry: Entry, results: tuple[Result, ...]) -> Compared:
    report, variant = entry.report, entry.variant
    dense, own, pruned = report.sizes.get("dense"), report.sizes.get(variant), variant != "dense"
    structures = report.settings.get("Where from", {}).get("structures") or ()
    return Compared(
        label=entry.label,
        source=report.source.name,
        variant=variant,
        size=own,
        removed=1 - own.total / dense.total if pruned and own and dense else None,
        units=", ".join(map(view.unit, structures)) if pruned else "",
        chosen_by=report.criterion or "" if pruned else "",
        found=Evaluation(results=results),
    )


def _with_dense(entries: Sequence[Entry]) -> list[Entry]:
    found: dict[Any, Report] = {}
    for entry in entries:
        if "dense" in entry.report.sizes and entry.variant != "dense":
            identity = entry.report.source.name, entry.report.sizes["dense"].total
            known = found.setdefault(identity, entry.report)
            of_dense = entry.report.evaluations.get("dense", Evaluation())
            found[identity] = known.with_evaluation("dense", of_dense)
    alone = len(found) == 1
    dense = [
        Entry("dense" if alone else f"{report.source.name}, dense", report, "dense")
        for report in found.values()
    ]
    return [*dense, *entries]


def _of_the_models(models: Sequence[Compared]) -> Iterator[Column]:
    def column(
        subject: Subject, name: str, cell: Callable[[Compared], Any], *, text: bool = False
    ) -> Column:
        return Column(subject, name, tuple(cell(one) or "" for one in models), text=text)

    yield column("size", "parameters", lambda m: m.size and count(m.size.total))
    yield column("size", "removed", lambda m: m.removed is not None and percent(m.removed))
    yield column("size", "weights", lambda m: m.size and m.size.bytes and megabytes(m.size.bytes))
    yield column("how", "units", lambda m: m.units, text=True)
    yield column("how", "chosen by", lambda m: m.chosen_by, text=True)


def _measured(models: Sequence[Compared]) -> Iterator[Column]:
    by_place = {place: model.found for place, model in enumerate(models)}

    def columns(subject: Subject, *parts: str) -> Iterator[Column]:
        found = view.aligned(by_place, *parts)
        titles = [view.first(by).title for by in found]
        for by in found:
            one = view.first(by)
            alone = titles.count(one.title) == 1
            name, settings = (one.title, one.settings) if alone else (one.label, "")
            cells = tuple(str(by.get(place, "")) for place in by_place)
            yield Column(subject, name, cells, settings)

    yield from columns("perplexity", "perplexity", "bits")
    yield from columns("accuracy", "tasks")
    means = view.task_means(by_place)
    cells = tuple(f"{100 * means[place]:.1f}" if place in means else "" for place in by_place)
    yield Column("accuracy", "mean", cells, "of those of LLM-Pruner")
    yield from columns("measured", "measured")


def render_markdown(found: Comparison) -> str:
    """Return one table; the settings are listed below it."""
    columns = found.columns
    names = [("perplexity, " if c.subject == "perplexity" else "") + c.name for c in columns]
    lines = [
        ["model", *map(markdown, names)],
        ["---", *("---" if column.text else "---:" for column in columns)],
        *(
            [markdown(label), *(markdown(column.cells[place]) or "–" for column in columns)]
            for place, label in enumerate(found.labels)
        ),
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    below = "".join(f"- {markdown(note)}\n" for note in found.notes)
    return f"{table}\n{below}" if below else table
