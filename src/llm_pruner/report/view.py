"""A report in words and rows: what the page and the model card show, still without markup."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from llm_pruner.report.data import BITS, VARIANTS, Evaluation, Report, Variant
from llm_pruner.report.text import count, measured, megabytes, number, percent, points
from llm_pruner.types import Layer

_K = TypeVar("_K")

_PLACES = ("--out", "-o", "--plan", "tasks_data", "teacher_cache")
"""Options whose value is a path, however short."""

_PATH = re.compile(
    r"(?:~|\.{0,2}|[a-zA-Z]:)/|.*\\|.*/.*/|.*/.*\.(?:txt|jsonl?|parquet|ya?ml|gguf|csv)(?::[\d.]+)?$"
)
"""What no id of the hub is like; a source may have a weight."""

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

_WHOLE = ("dense", "trimmed")
"""Models with all their units."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: what is shown.
        cells: one text per model, empty where it was not measured.
        change: from the dense model to the final one, empty if it is not known.
        better: whether the change is for the better; None if neither.
    """

    label: str
    cells: tuple[str, ...]
    change: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Table:
    """Rows by model; ``models`` heads the columns."""

    models: tuple[Variant, ...]
    rows: tuple[Row, ...]
    note: str = ""


def unit(name: str, report: Report | None = None) -> str:
    """Return what units are called; ``heads`` are key-value heads where query heads share them."""
    if name == "heads" and report is not None:
        shared = any("query_heads" in layer.sizes for layer in report.layers)
        return "key-value heads" if shared else "heads"
    return UNITS.get(name, name)


def changed_units(report: Report) -> list[str]:
    """Return the names in ``Layer.sizes`` to show for decoder layers: heads, FFN, what changed."""
    layers = decoder_layers(report)
    names = dict.fromkeys(name for layer in layers for name in layer.sizes)
    names.pop("value_dim", None)  # follows head_dim
    usual = [name for name in ("heads", "ffn") if name in names]
    lost = [name for name in names if _narrowed(layers, name)]
    if "query_heads" in lost and "heads" in names and _in_step(layers, "query_heads", "heads"):
        lost.remove("query_heads")  # gone with their key-value heads, which say it already
    return list(dict.fromkeys([*usual, *lost]))


def _narrowed(layers: Sequence[Layer], name: str) -> bool:
    """Return whether a layer that stays keeps fewer units."""
    sizes = [layer.sizes.get(name, (0, 0)) for layer in layers if not layer.removed]
    return any(kept < dense for kept, dense in sizes)


def _in_step(layers: Sequence[Layer], one: str, other: str) -> bool:
    """Return whether each layer keeps the same share of both."""
    pairs = [(layer.sizes.get(one), layer.sizes.get(other)) for layer in layers]
    return all(a and b and a[0] * b[1] == b[0] * a[1] for a, b in pairs)


def decoder_layers(report: Report) -> list[Layer]:
    """Return the rows that are layers."""
    return [layer for layer in report.layers if layer.layer is not None]


def title(report: Report) -> str:
    """Return the name of the model and what became of it."""
    return f"{report.source.name}, {'pruned' if report.was_pruned else report.final}"


def sentence(report: Report) -> str:
    """Say in one sentence, or two, what was done."""
    dense, after = report.sizes.get("dense"), report.sizes.get(report.final)
    training = _training(report)
    if not report.was_pruned:
        return f"{report.source.name} was {training}." if training else report.source.name
    said = f"{report.source.name} was pruned"
    if dense is not None and after is not None:
        said += (
            f" from {count(dense.total)} to {count(after.total)} parameters "
            f"({percent(1 - after.total / dense.total)} removed)"
        )
    kept = _kept(report)
    if kept:
        listed = [", ".join(kept[:-1]), kept[-1]] if len(kept) > 1 else kept
        said += f"; it keeps {' and '.join(listed)}"
    if report.criterion:
        said += f", chosen by {report.criterion}"
    said += ". "
    if report.tokens:
        said += "First, all but {1:,} of its {0:,} tokens were taken out. ".format(*report.tokens)
    if report.compensation:
        said += f"What reads the pruned axes was refitted ({report.compensation}). "
    if report.repair:
        said += f"Its weights were repaired by {report.repair}. "
    if training:
        said += f"Then it was {training}. "
    elif not report.repair:
        said += "Nothing was trained afterwards. "
    if "quantized" in report.sizes:
        said += "Last, the weights of its linear layers were packed in int8, by torchao."
    return said.strip()


def _training(report: Report) -> str:
    """Return what training did, in words that follow "it was"; empty if there was none."""
    if report.recovery is None:
        return ""
    summary = report.recovery.summary or "training"
    if report.recovery.gained:
        return f"recovered by {summary}"
    return f"trained by {summary}, which brought no gain, so that nothing of it was kept"


def _kept(report: Report) -> list[str]:
    layers, lists = decoder_layers(report), _lists(report)
    parts = [f"{kept} of {dense} {name}" for name, (kept, dense) in lists if kept < dense]
    for name in changed_units(report):
        kept, dense = _total(layers, name)
        if _narrowed(layers, name):
            parts.append(f"{kept:,} of {dense:,} {unit(name, report)}")
    for layer in report.layers:
        if layer.layer is None:
            parts += [
                f"{kept:,} of {dense:,} {unit(name)}"
                for name, (kept, dense) in layer.sizes.items()
                if kept < dense and not _LIST.fullmatch(name)
            ]
    return parts


def _lists(report: Report) -> list[tuple[str, tuple[int, int]]]:
    """Return how many layers are left, of how many; of several lists, for each of them."""
    layers = decoder_layers(report)
    across = [size for row in report.layers if row.layer is None for size in row.sizes.items()]
    lists = [(name, size) for name, size in across if _LIST.fullmatch(name)]
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
        tokens = [report.tokens[name != "dense"] for name in names]
        rows.append(_row("tokens", tokens, number))
    layers = decoder_layers(report)
    if layers and len(names) > 1:
        pairs = _lists(report)
        pairs += [(unit(name, report), _total(layers, name)) for name in changed_units(report)]
        rows += [
            _row(label, [dense if name in _WHOLE else kept for name in names], number)
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


def aligned(evaluations: Mapping[_K, Evaluation], part: str) -> list[dict[_K, Any]]:
    """Return what may be compared: for each thing measured in a part, whose result -> result."""
    found: dict[Any, dict[_K, Any]] = {}
    for whose, evaluation in evaluations.items():
        for result in getattr(evaluation, part):
            found.setdefault(result.key, {})[whose] = result
    return list(found.values())


def by_model(report: Report, part: str) -> list[dict[Variant, Any]]:
    """Return the results of a part of the evaluations that may be compared, by model."""
    found = {v: report.evaluations[v] for v in VARIANTS if v in report.evaluations}
    return aligned(
        {v: one.per_byte() for v, one in found.items()} if report.tokens else found, part
    )


def first(results: Mapping[Any, Any]) -> Any:
    """Return one of the results that may be compared, to say what they have in common."""
    return next(iter(results.values()))


def compared(report: Report, part: str, cell: Callable[[Any], str] = str) -> Table | None:
    """Return a part of the evaluations as rows; the change is that of the last model."""
    found = by_model(report, part)
    names = tuple(name for name in VARIANTS if any(name in by for by in found))
    rows = []
    for by in found:
        change: tuple[str, bool | None] = ("", None)
        if "dense" in by and names[-1] in by and names[-1] != "dense":
            change = by[names[-1]].since(by["dense"])
        cells = tuple(cell(by[name]) if name in by else "" for name in names)
        rows.append(Row(first(by).label, cells, *change))
    return Table(names, tuple(rows)) if rows else None


def task_table(report: Report) -> Table | None:
    """Return task scores in percent with standard errors, and their means."""
    table, means = compared(report, "tasks"), task_means(report.evaluations)
    if table is None or len(means) < len(table.models):
        return table
    start, last = table.models[0], table.models[-1]
    known = start == "dense" != last
    change = points(means[last] - means[start]) if known else ("", None)
    row = Row("mean", tuple(f"{100 * means[name]:.1f}" for name in table.models), *change)
    note = f"Percent, with standard errors. The mean takes {mean_takes(report.evaluations)}."
    return Table(table.models, (*table.rows, row), note)


def _counted(evaluations: Mapping[_K, Evaluation]) -> list[dict[_K, Any]]:
    """Return each task's score in the mean: that of the way that most models have, the latest."""
    found: dict[str, dict[_K, Any]] = {}
    for by in aligned(evaluations, "tasks"):
        task = first(by).task
        if first(by).in_mean and len(by) >= len(found.get(task, ())):
            found[task] = by
    return [*found.values()]


def mean_takes(evaluations: Mapping[Any, Evaluation]) -> str:
    """Return which scores the mean takes, in words; how they were measured where there are more."""
    counted = [first(by) for by in _counted(evaluations)]
    if sum(first(by).in_mean for by in aligned(evaluations, "tasks")) > len(counted):
        return "; ".join(score.label for score in counted)
    return ", ".join(f"{score.metric} of {score.task}" for score in counted)


def task_means(evaluations: Mapping[_K, Evaluation]) -> dict[_K, float]:
    """Return the mean over the tasks for each model that was measured on all of them."""
    counted = _counted(evaluations)
    return {
        whose: sum(by[whose].value for by in counted) / len(counted)
        for whose in evaluations
        if counted and all(whose in by for by in counted)
    }


def measurements(report: Report) -> Table | None:
    """Return sizes and speeds with their spread."""
    return compared(report, "measurements", lambda found: found.spread)


def command(report: Report) -> str:
    """Return the command that makes the model, with files by name alone, as cards are published."""
    said = report.command or ""
    try:
        words = shlex.split(said)
    except ValueError:  # no shell wrote it
        words = said.split()
    pairs = pairwise(part.rstrip("\\/") for word in words for part in word.split("=", 1))
    places = {value for option, value in pairs if option in _PLACES}
    local = None if report.source.hub_id else report.source.name

    def named(part: str) -> str:
        path = part.rstrip("\\/")
        name = re.split(r"[\\/]", path)[-1]
        return name if path in places or name == local or _PATH.match(path) else path

    names = ("".join(map(named, re.split("([=,])", word))) for word in words)
    return " ".join(name if name == "&&" else shlex.quote(name) for name in names)


def samples(report: Report) -> list[tuple[str, list[tuple[Variant, str]]]]:
    """Return what the models wrote after each prompt."""
    found: dict[str, list[tuple[Variant, str]]] = {}
    for variant in VARIANTS:
        for prompt, text in report.evaluations.get(variant, Evaluation()).samples.items():
            found.setdefault(prompt, []).append((variant, text))
    return list(found.items())


def headlines(report: Report) -> list[tuple[str, str, str]]:
    """Return the few numbers to read first: label, number, and what it was before."""
    final = report.final
    shown = []

    def add(label: str, by: Mapping[Variant, Any], form: Callable[[Any], str]) -> None:
        if final in by:
            before = f"dense {form(by['dense'])}" if "dense" in by else ""
            shown.append((label, form(by[final]), before))

    dense, after = report.sizes.get("dense"), report.sizes.get(final)
    if report.was_pruned and dense is not None and after is not None:
        label = f"{percent(1 - after.total / dense.total)} removed"
        shown.append(("parameters", count(after.total), f"of {count(dense.total)}, {label}"))
    for by in by_model(report, "perplexity")[:1]:
        add(f"perplexity, {first(by).name}", by, lambda one: measured(one.perplexity, None))
    add("mean accuracy", task_means(report.evaluations), lambda mean: f"{100 * mean:.1f}%")
    for by in by_model(report, "measurements"):
        if (first(by).better == "higher" or first(by).unit == BITS) and len(shown) < 4:
            add(first(by).label, by, str)
    return shown
