"""The drawings of a report; each shows what a table or ``report.json`` holds in numbers."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import escape

from llm_pruner.report.data import ImportanceMap, LossPoint
from llm_pruner.report.text import number, visible
from llm_pruner.types import FloatArray, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llm_pruner.report.records import CurvePoint

_MOST_PANELS = 6


def widths(layers: Sequence[Layer], units: Sequence[tuple[str, str]]) -> str:
    """Draw the share of each of ``units``, (name in ``Layer.sizes``, heading), that layers keep."""
    units = units[:_MOST_PANELS]

    def fill(figure: Figure, narrow: bool) -> None:
        panels = figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0]
        numbers = [layer.layer or 0 for layer in layers]
        for axes, (name, heading) in zip(panels, units, strict=True):
            sizes = {layer.layer or 0: layer.sizes[name] for layer in layers if name in layer.sizes}
            kept = {place: 100 * left / max(of, 1) for place, (left, of) in sizes.items()}
            _bars(axes, dict.fromkeys(kept, 100.0), COLORS["track"])
            _bars(axes, kept, COLORS["pruned"])
            axes.set_title(_title(heading, narrow))
            axes.set_ylim(0, 100)
            axes.set_yticks([0, 50, 100], ["0", "50", "100%"])
        axes.set_xlabel("layer")
        axes.set_xticks(numbers[:: _step(len(numbers), narrow)])
        axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)

    said = ", ".join(heading for _, heading in units)
    return draw(
        "widths", f"Share kept in each layer: {said}", fill, lambda _: 46 + 100 * len(units)
    )


def _bars(axes: Axes, heights: Mapping[int, float], color: str) -> None:
    """Draw bars as one object, which takes a fraction of the time of as many."""
    from matplotlib.collections import PolyCollection

    sides = [
        ((x - 0.36, 0), (x - 0.36, height), (x + 0.36, height), (x + 0.36, 0))
        for x, height in heights.items()
    ]
    axes.add_collection(PolyCollection(sides, facecolor=color, linewidth=0))


def heat(maps: Sequence[ImportanceMap], headings: Sequence[str]) -> str:
    """Draw importance by layer and rank within the layer, and how far up the removal went."""
    from matplotlib.colors import LogNorm, Normalize

    def fill(figure: Figure, narrow: bool) -> None:
        panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for axes, found, heading in zip(panels, maps, headings, strict=True):
            cells = _cells(found)
            known = cells[np.isfinite(cells)]
            if known.size and known.min() == 0 < known.max():
                # Units that do nothing are shown as the least of the others: zero has no logarithm.
                cells = np.maximum(cells, known[known > 0].min())
                known = cells[np.isfinite(cells)]
            low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
            positive = low > 0 and high > low
            image = axes.imshow(
                np.ma.masked_invalid(cells.T),
                origin="lower",
                aspect="auto",
                interpolation="none",
                cmap="viridis",
                norm=LogNorm(low, high) if positive else Normalize(low, max(high, low + 1e-12)),
                extent=(-0.5, len(found.rows) - 0.5, 0, 1),
            )
            edges = np.arange(len(found.rows) + 1) - 0.5
            cut = [row.removed / max(row.units, 1) for row in found.rows]
            axes.stairs(cut, edges, baseline=None, color="white", linewidth=3.2)
            axes.stairs(cut, edges, baseline=None, color="#c2185b", linewidth=1.6)
            axes.set_title(_title(heading, narrow))
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 1], ["lowest", "highest"])
            axes.spines["bottom"].set_visible(False)
            labels = ["all" if row.layer is None else str(row.layer) for row in found.rows]
            step = _step(len(labels), narrow)
            axes.set_xticks(range(0, len(labels), step), labels[::step])
            bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=12, shrink=0.95)
            bar.outline.set_visible(False)
            bar.ax.minorticks_off()
            ticks = np.geomspace(low, high, 3) if positive else np.linspace(low, high, 3)
            bar.set_ticks(list(ticks), labels=_distinct(ticks))
        panels[-1].set_xlabel("layer")

    return draw(
        "importance",
        f"Importance by layer and rank: {', '.join(headings)}",
        fill,
        lambda narrow: 46 + (150 if narrow else 170) * len(maps),
    )


def _distinct(ticks: FloatArray) -> list[str]:
    """Return numbers with as few digits as tell them apart."""
    for digits in range(1, 6):
        labels = [f"{tick:.{digits}e}" for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def _cells(found: ImportanceMap) -> FloatArray:
    """Return importance by row and bin; the bins of all rows are spread over the longest."""
    longest = max(len(row.bins) for row in found.rows)
    cells = np.full((len(found.rows), longest), np.nan)
    for place, row in enumerate(found.rows):
        if row.bins:
            values = np.array([np.nan if v is None else v for v in row.bins], dtype=float)
            cells[place] = values[(np.arange(longest) * len(values)) // longest]
    return cells


Series = Sequence[tuple[str, float, float | None]]
"""Name of the model, value and standard error."""


def dots(name: str, title: str, rows: Sequence[tuple[str, Series]], *, share: bool) -> str:
    """Draw values with standard errors, models beside each other; a ``share`` in percent, else on a
    logarithmic axis. A row is a label and one value per model.
    """
    scale = 100 if share else 1

    def fill(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        names = list(dict.fromkeys(model for _, series in rows for model, *_ in series))
        beside = any(len(series) > 1 for _, series in rows)
        for order, model in enumerate(names):
            marker, color = "os^D"[order % 4], COLORS.get(model, COLORS["ink"])
            offset = (order - (len(names) - 1) / 2) * 0.26 if beside else 0
            axes.plot([], [], marker, color=color, label=model)
            for place, (_, series) in enumerate(rows):
                for whose, value, stderr in series:
                    if whose == model and math.isfinite(value):
                        spread = None if stderr is None else scale * stderr
                        x, y = scale * value, place + offset
                        axes.errorbar(x, y, None, spread, marker, color=color, elinewidth=2)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_short(label, narrow) for label, _ in rows])
        axes.tick_params(axis="y", labelcolor=COLORS["ink"])
        axes.grid(axis="x")
        axes.margins(x=0.08)
        if not share:
            _logarithmic(axes, [value for _, series in rows for _, value, _ in series])
        axes.set_xlabel(_title(title, narrow))
        gap = 0.8 if narrow else 2.0
        figure.legend(
            loc="outside upper left", ncols=len(names), handletextpad=0.1, columnspacing=gap
        )

    said = "; ".join(
        f"{label}: " + ", ".join(f"{model} {number(scale * value)}" for model, value, _ in series)
        for label, series in rows
    )
    return draw(name, f"{title}. {said}", fill, lambda _: 80 + 44 * len(rows))


def loss(points: Sequence[LossPoint]) -> str:
    """Draw the loss of training by step."""
    from matplotlib.ticker import MaxNLocator

    def fill(figure: Figure, _: bool) -> None:
        axes = figure.subplots()
        for name, style, color in (("train", "-", "dense"), ("validation", "o-", "recovered")):
            line = [(p.step, getattr(p, name)) for p in points if getattr(p, name) is not None]
            if line:
                axes.plot(*zip(*line, strict=True), style, color=COLORS[color], label=name, ms=4)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss, nats per token")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    return draw("loss", "Loss of the recovery training by step", fill, lambda _: 260)


_STEEP = 3.0
"""Times the dense perplexity from which on small damage shows only on a logarithmic axis."""


def curve(points: Sequence[CurvePoint], smallest: CurvePoint | None) -> str:
    """Draw divergence and perplexity, as a ratio to the dense model's, by the share removed."""

    def fill(figure: Figure, narrow: bool) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        divergence = f"KL divergence{'' if narrow else ' from the dense model'}, nats a token"
        shares = [0.0, *(100 * point.removed for point in points)]
        for axes, title, dense, value in (
            (panels[0], divergence, 0.0, lambda p: p.kl),
            (panels[1], "perplexity, times the dense model's", 1.0, lambda p: p.perplexity_ratio),
        ):
            line = [dense, *(value(point) for point in points)]
            axes.plot(shares, line, "o-", color=COLORS["dense"], ms=5)
            if smallest is not None:
                at = 100 * smallest.removed, value(smallest)
                axes.plot(*at, "D", color=COLORS["recovered"], ms=7)
            axes.set_title(title)
            axes.grid(axis="y")
        ratios = [1.0, *(point.perplexity_ratio for point in points)]
        if max(ratios) > _STEEP:
            _logarithmic(panels[1], ratios, "y")
        panels[1].set_xlabel("parameters removed, %")

    said = "; ".join(
        f"{100 * p.removed:.1f}%: KL {number(p.kl)}, perplexity {number(p.perplexity_ratio)} times"
        for p in points
    )
    return draw("curve", f"Damage by the share of parameters removed. {said}", fill, lambda _: 440)


def _logarithmic(axes: Axes, values: Sequence[float], name: Literal["x", "y"] = "x") -> None:
    """Use a logarithmic axis with a few plain numbers on it."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        return
    getattr(axes, f"set_{name}scale")("log")
    low, high = min(known) / 1.25, max(known) * 1.25
    ticks: list[float] = []
    fine = tuple(m / 10 for m in range(10, 100))
    for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), fine):
        ticks = [m * 10.0**e for e in range(-3, 13) for m in marks if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 6) or 1]
    getattr(axes, f"set_{name}lim")(low, high)
    getattr(axes, f"set_{name}ticks")(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()


def _step(count: int, narrow: bool) -> int:
    """Return every how many-th label has room."""
    room = 9 if narrow else 32
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count / step <= room)


def _title(text: str, narrow: bool) -> str:
    """Return a heading in one line that fits."""
    return _cut(text, 38 if narrow else 100)


def _short(label: str, narrow: bool) -> str:
    """Return a label that leaves room for what it labels: of two lines where that is narrow."""
    parts = label.split(", ", 1) if narrow else [label]
    return "\n".join(_cut(part, 15 if narrow else 40) for part in parts)


def _cut(text: str, room: int) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= room else f"{line[: room - 1]}…"


WIDE, NARROW = 840, 340
"""Widths in CSS pixels: for a screen and for a phone. Text is as large in both."""

_NAMES = ("ink", "muted", "line", "dense", "pruned", "recovered", "track", "quantized")
COLORS = {name: f"#01010{number}" for number, name in enumerate(_NAMES, start=1)}
"""Variables of the page's style sheet -> colours that stand for them in a drawing."""

_STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"
_UNSAID = ("Creator", "Date", "Format", "Type")
"""What a file says about itself, which is left out."""


def draw(
    name: str, description: str, fill: Callable[[Figure, bool], None], height: Callable[[bool], int]
) -> str:
    """Return a drawing for screens and a narrow one for phones; the style sheet shows one of them.

    Args:
        name: unique in the page; prefix of the ids in it.
        description: what a reader who cannot see it is told.
        fill, height: draws into a figure, and its height in CSS pixels, by whether it is narrow.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # It announces that it looks for fonts, once on each machine.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    drawings = []
    for narrow in (False, True):
        with rc_context(fname=_STYLE):  # whatever the user has set for own plots stays out of this
            size = (NARROW if narrow else WIDE) / 72, height(narrow) / 72
            figure = Figure(figsize=size, dpi=72, layout="constrained")
            fill(figure, narrow)
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata=dict.fromkeys(_UNSAID))
        prefix = f"{name}-{'n' if narrow else 'w'}"
        classes = f"plot {'narrow' if narrow else 'wide'}"
        drawings.append(_for_page(written.getvalue(), prefix, classes, description))
    return "".join(drawings)


def _for_page(drawing: str, prefix: str, classes: str, description: str) -> str:
    """Return the SVG element, named, without fixed colours, fonts and sizes or idle ids."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawing))

    def themed(tag: re.Match[str]) -> str:
        text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", tag[0].replace("\n", " "))
        text = re.sub(
            r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text
        )
        # Such as: font: bold 11px 'DejaVu Sans', sans-serif; the family is left to the page.
        text = re.sub(r"font: (?:(bold|700) )?(\S+px) [^;\"]*", _font, text)
        text = re.sub(r'font-family: [^;"]*(; )?', "", text)
        for name, color in COLORS.items():
            text = text.replace(color, f"var(--{name})")
        return text

    # Letters and signs in texts are escaped, so that what looks like a tag is one.
    root, rest = re.sub(r"<[^>]+>", themed, drawing[drawing.index("<svg") :]).split(">", 1)
    root = re.sub(r' (width|height|version)="[^"]*"', "", root)
    said = f'role="img" aria-label="{escape(visible(description))}"'
    return f'{root} class="{classes}" {said}>{rest}'


def _font(found: re.Match[str]) -> str:
    return f"font-weight: {600 if found[1] else 400}; font-size: {found[2]}"
