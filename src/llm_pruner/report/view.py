"""A report in words and rows: what the page and the model card show, still without markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llm_pruner.report.data import VARIANTS, Evaluation, Report, Result, Variant
from llm_pruner.report.text import count, megabytes, number, percent, points
from llm_pruner.types import Layer

_K = TypeVar("_K")

UNITS = {
    "query_heads": "query heads",
    "ffn": "FFN channels",
    "hidden": "hidden channels",
    "head_dim": "head channels",
    "value_dim": "value channels",
}
"""Kind or short name of a group -> what its units are called, where that is another word."""

_LIST = re.compile(r"layers(?:_\d+)?")
"""Names of the groups whose units are layers, one for each list of them."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    cells: tuple[str, ...]
    change: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Table:
    """Rows by model; ``models`` heads the columns."""

    models: tuple[Variant, ...]
    rows: tuple[Row, ...]


def unit(name: str, report: Report | None = None) -> str:
    """Return what units are called; ``heads`` are key-value heads where query heads share them."""
    if name == "heads" and report is not None:
        shared = any("query_heads" in layer.sizes for layer in report.layers)
        return "key-value heads" if shared else "heads"
    return UNITS.get(name, name)


def decoder_layers(report: Report) -> list[Layer]:
    """Return the rows that are layers."""
    return [layer for layer in report.layers if layer.layer is not None]


def changed_units(report: Report) -> list[str]:
    """Return the names in ``Layer.sizes`` to show for decoder layers: heads, FFN, what changed."""
    layers = decoder_layers(report)
    names = dict.fromkeys(name for layer in layers for name in layer.sizes)
    names.pop("value_dim", None)  # follows head_dim
    usual = [name for name in ("heads", "ffn") if name in names]
    lost = [name for name in names if _narrowed(layers, name)]
    if "query_heads" in lost and "heads" in names:
        pairs = [(one.sizes.get("query_heads"), one.sizes.get("heads")) for one in layers]
        if all(a and b and a[0] * b[1] == b[0] * a[1] for a, b in pairs):
            lost.remove("query_heads")  # gone with their key-value heads, which say it already
    return list(dict.fromkeys([*usual, *lost]))


def _narrowed(layers: Sequence[Layer], name: str) -> bool:
    sizes = [layer.sizes.get(name, (0, 0)) for layer in layers if not layer.removed]
    return any(kept < dense for kept, dense in sizes)


def title(report: Report) -> str:
    """Return the name of the model and what became of it."""
    return f"{report.source.name}, {'pruned' if report.was_pruned else report.final}"


def sentence(report: Report) -> str:
    """Say in a few sentences what was done."""
    dense, after = report.sizes.get("dense"), report.sizes.get(report.final)
    name, training = report.source.name, _training(report)
    if not report.was_pruned:
        return f"{name} was {training}." if training else name
    said = f"{name} was pruned"
    if dense is not None and after is not None:
        said += (
            f" from {count(dense.total)} to {count(after.total)} parameters "
            f"({percent(1 - after.total / dense.total)} removed)"
        )
    if kept := _kept(report):
        said += f"; it keeps {' and '.join(filter(None, (', '.join(kept[:-1]), kept[-1])))}"
    if report.criterion:
        said += f", chosen by {report.criterion}"
    said += "."
    if report.tokens:
        said += " First, all but {1:,} of its {0:,} tokens were taken out.".format(*report.tokens)
    if report.compensation:
        said += f" What reads the pruned axes was refitted ({report.compensation})."
    if report.repair:
        said += f" Its weights were repaired by {report.repair}."
    if training:
        said += f" Then it was {training}."
    elif not report.repair:
        said += " Nothing was trained afterwards."
    return said


def _training(report: Report) -> str:
    """Return what training did, in words that follow "it was"; empty if there was none."""
    if report.recovery is None:
        return ""
    summary = report.recovery.summary or "training"
    if report.recovery.gained:
        return f"recovered by {summary}"
    return f"trained by {summary}, which brought no gain, so that nothing of it was kept"


def _kept(report: Report) -> list[str]:
    layers = decoder_layers(report)
    parts = [f"{kept} of {dense} {name}" for name, (kept, dense) in _lists(report) if kept < dense]
    parts += [
        "{:,} of {:,} {}".format(*_total(layers, name), unit(name, report))
        for name in changed_units(report)
        if _narrowed(layers, name)
    ]
    return parts + [
        f"{kept:,} of {dense:,} {unit(name)}"
        for name, (kept, dense) in _across(report)
        if kept < dense and not _LIST.fullmatch(name)
    ]


def _across(report: Report) -> list[tuple[str, tuple[int, int]]]:
    return [size for row in report.layers if row.layer is None for size in row.sizes.items()]


def _lists(report: Report) -> list[tuple[str, tuple[int, int]]]:
    """Return how many layers are left, of how many; of several lists, for each of them."""
    layers = decoder_layers(report)
    lists = [(name, size) for name, size in _across(report) if _LIST.fullmatch(name)]
    left = sum(not layer.removed for layer in layers)
    return lists if len(lists) > 1 else [("layers", (left, len(layers)))]


def _total(layers: Sequence[Layer], name: str) -> tuple[int, int]:
    sizes = [layer.sizes.get(name, (0, 0)) for layer in layers]
    return sum(kept for kept, _ in sizes), sum(dense for _, dense in sizes)


def trials(report: Report) -> list[tuple[str, str]]:
    """Return splits of the budget that were tried, the best first, with their divergence."""
    ordered = sorted(report.trials, key=lambda trial: (not trial.refitted, trial.divergence))
    return [
        (
            ", ".join(f"{unit(name)} {percent(share)}" for name, share in trial.split.items())
            + (", refitted" if trial.refitted else "")
            + (": taken" if trial.taken else ""),
            f"{trial.divergence:.4f}",
        )
        for trial in ordered
    ]


def sizes(report: Report) -> Table | None:
    """Return the table of before and after."""
    names = tuple(v for v in VARIANTS if v in report.sizes)
    if not names:
        return None
    of = [report.sizes[name] for name in names]
    rows = [
        _row("parameters", [size.total for size in of], number),
        _row("in embeddings", [size.embedding for size in of], number),
        _row("in decoder layers", [size.blocks for size in of], number),
        _row("weights in memory", [size.bytes for size in of], megabytes),
    ]
    if report.tokens:
        rows.append(_row("tokens", [report.tokens[name != "dense"] for name in names], number))
    layers = decoder_layers(report)
    if layers and len(names) > 1:
        pairs = _lists(report)
        pairs += [(unit(name, report), _total(layers, name)) for name in changed_units(report)]
        whole = ("dense", "trimmed")
        rows += [
            _row(label, [dense if name in whole else kept for name in names], number)
            for label, (kept, dense) in pairs
        ]
    return Table(names, tuple(row for row in rows if any(row.cells)))


def _row(label: str, values: Sequence[float | None], form: Callable[[float], str]) -> Row:
    cells = tuple("" if value is None else form(value) for value in values)
    first, last = values[0], values[-1]
    change = ""
    if len(values) > 1 and first and last is not None:
        share = last / first - 1
        change = "unchanged" if last == first else f"{100 * share:+.1f}%".replace("-", "−")
    return Row(label, cells, change)


def aligned(evaluations: Mapping[_K, Evaluation], *parts: str) -> list[dict[_K, Result]]:
    """Return what may be compared: for each thing measured in these parts, whose -> result."""
    found: dict[Any, dict[_K, Result]] = {}
    for part in parts:
        for whose, evaluation in evaluations.items():
            for result in evaluation.of(part):
                found.setdefault(result.key, {})[whose] = result
    return list(found.values())


def first(results: Mapping[Any, Result]) -> Result:
    """Return one of the results that may be compared, to say what they have in common."""
    return next(iter(results.values()))


def compared(report: Report, part: str) -> Table | None:
    """Return a part of the evaluations as rows; the change is that of the last model."""
    if part == "perplexity" and report.tokens:
        part = "bits"
    evaluations = {v: report.evaluations[v] for v in VARIANTS if v in report.evaluations}
    found = aligned(evaluations, part)
    names = tuple(name for name in VARIANTS if any(name in by for by in found))
    rows = []
    for by in found:
        change: tuple[str, bool | None] = ("", None)
        if "dense" in by and names[-1] in by and names[-1] != "dense":
            change = by[names[-1]].since(by["dense"])
        cells = tuple(str(by.get(name, "")) for name in names)
        rows.append(Row(first(by).label, cells, *change))
    means = task_means(evaluations)
    if part == "tasks" and means and all(name in means for name in names):
        change = ("", None)
        if names[0] == "dense" != names[-1]:
            change = points(means[names[-1]] - means[names[0]])
        rows.append(Row("mean", tuple(f"{100 * means[name]:.1f}" for name in names), *change))
    return Table(names, tuple(rows)) if rows else None


def task_means(evaluations: Mapping[_K, Evaluation]) -> dict[_K, float]:
    """Return the mean over the paper's tasks for each model that was measured on all of them."""
    found = [by for by in aligned(evaluations, "tasks") if first(by).in_mean]
    counted = {first(by).name: by for by in found}.values()  # of one measured twice, the latest
    return {
        whose: sum(by[whose].value for by in counted) / len(counted)
        for whose in evaluations
        if counted and all(whose in by for by in counted)
    }


def samples(report: Report) -> list[tuple[str, list[tuple[Variant, str]]]]:
    """Return what the models wrote after each prompt."""
    found: dict[str, list[tuple[Variant, str]]] = {}
    for variant in VARIANTS:
        for prompt, text in report.evaluations.get(variant, Evaluation()).samples.items():
            found.setdefault(prompt, []).append((variant, text))
    return list(found.items())
