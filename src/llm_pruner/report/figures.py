"""The drawings of a report: images in SVG that a page holds within itself."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from llm_pruner.report.data import ImportanceMap, LossPoint
from llm_pruner.report.text import number, visible
from llm_pruner.types import FloatArray, Layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llm_pruner.report.records import CurvePoint

_MOST_PANELS = 6
_WIDTH = 840
"""In CSS pixels."""

_GREY, _BLUE, _GREEN, _RED, _TRACK = "#7d8590", "#2f72d6", "#149a70", "#c2185b", "#7d859040"
"""Colours that are seen on a light and on a dark page."""

_STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"


def widths(layers: Sequence[Layer], units: Sequence[tuple[str, str]]) -> Markup:
    """Draw the share of each of ``units``, (name in ``Layer.sizes``, heading), that layers keep."""
    units = units[:_MOST_PANELS]
    numbers = [layer.layer or 0 for layer in layers]

    def fill(figure: Figure) -> None:
        panels = figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, heading) in zip(panels, units, strict=True):
            sizes = {layer.layer or 0: layer.sizes[name] for layer in layers if name in layer.sizes}
            shares = [100 * kept / max(dense, 1) for kept, dense in sizes.values()]
            axes.bar([*sizes], 100, 0.72, color=_TRACK)
            axes.bar([*sizes], shares, 0.72, color=_BLUE)
            axes.set_title(_line(heading))
            axes.set_ylim(0, 100)
            axes.set_yticks([0, 50, 100], ["0", "50", "100%"])
        axes.set_xlabel("layer")
        axes.set_xticks(numbers[:: _step(len(numbers))])
        axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)

    said = ", ".join(heading for _, heading in units)
    return _drawn(f"Share kept in each layer: {said}", 46 + 100 * len(units), fill)


def heat(maps: Sequence[ImportanceMap], headings: Sequence[str]) -> Markup:
    """Draw importance by layer and rank within the layer, and how far up the removal went."""
    from matplotlib.colors import LogNorm, Normalize

    def fill(figure: Figure) -> None:
        panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for axes, found, heading in zip(panels, maps, headings, strict=True):
            cells = _cells(found)
            above = cells[np.isfinite(cells) & (cells > 0)]
            if above.size:  # zero, of units that do nothing, has no logarithm
                cells = np.maximum(cells, above.min())
            low, high = (above.min(), above.max()) if above.size else (0.0, 1.0)
            image = axes.imshow(
                np.ma.masked_invalid(cells.T),
                origin="lower",
                aspect="auto",
                interpolation="none",
                cmap="viridis",
                norm=LogNorm(low, high) if 0 < low < high else Normalize(low, low + 1),
                extent=(-0.5, len(found.rows) - 0.5, 0, 1),
            )
            edges = np.arange(len(found.rows) + 1) - 0.5
            cut = [row.removed / max(row.units, 1) for row in found.rows]
            axes.stairs(cut, edges, baseline=None, color="white", linewidth=3.2)
            axes.stairs(cut, edges, baseline=None, color=_RED, linewidth=1.6)
            axes.set_title(_line(heading))
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 1], ["lowest", "highest"])
            labels = ["all" if row.layer is None else str(row.layer) for row in found.rows]
            step = _step(len(labels))
            axes.set_xticks(range(0, len(labels), step), labels[::step])
            bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=12, shrink=0.95)
            bar.ax.minorticks_off()
            bar.set_ticks([low, high], labels=[f"{low:.1e}", f"{high:.1e}"])
        panels[-1].set_xlabel("layer")

    said = f"Importance by layer and rank: {', '.join(headings)}"
    return _drawn(said, 46 + 170 * len(maps), fill)


def _cells(found: ImportanceMap) -> FloatArray:
    """Return importance by row and bin; the bins of all rows are spread over the longest."""
    longest = max(len(row.bins) for row in found.rows)
    cells = np.full((len(found.rows), longest), np.nan)
    for place, row in enumerate(found.rows):
        if row.bins:
            values = np.array([np.nan if v is None else v for v in row.bins], dtype=float)
            cells[place] = values[(np.arange(longest) * len(values)) // longest]
    return cells


def loss(points: Sequence[LossPoint]) -> Markup:
    """Draw the loss of training by step."""
    from matplotlib.ticker import MaxNLocator

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for name, style, color in (("train", "-", _GREY), ("validation", "o-", _GREEN)):
            line = [(p.step, getattr(p, name)) for p in points if getattr(p, name) is not None]
            if line:
                axes.plot(*zip(*line, strict=True), style, color=color, label=name, ms=4)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss, nats per token")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    return _drawn("Loss of the recovery training by step", 260, fill)


_STEEP = 3.0
"""Times the dense perplexity from which on small damage shows only on a logarithmic axis."""


def curve(points: Sequence[CurvePoint], smallest: CurvePoint | None) -> Markup:
    """Draw divergence and perplexity, as a ratio to the dense model's, by the share removed."""
    from matplotlib.ticker import ScalarFormatter

    def fill(figure: Figure) -> None:
        shares = [0.0, *(100 * point.removed for point in points)]
        panels = figure.subplots(2, 1, sharex=True)
        titles = ("KL divergence from the dense model, nats a token", "perplexity, times the dense")
        values = ([0.0, *(p.kl for p in points)], [1.0, *(p.perplexity_ratio for p in points)])
        for axes, title, line in zip(panels, titles, values, strict=True):
            axes.plot(shares, line, "o-", color=_GREY, ms=5)
            axes.set_title(title)
            axes.grid(axis="y")
        if smallest is not None:
            for axes, value in zip(panels, (smallest.kl, smallest.perplexity_ratio), strict=True):
                axes.plot(100 * smallest.removed, value, "D", color=_GREEN, ms=7)
        if max(values[1]) > _STEEP:
            panels[1].set_yscale("log")
            panels[1].yaxis.set_major_formatter(ScalarFormatter())
            panels[1].minorticks_off()
        panels[1].set_xlabel("parameters removed, %")

    said = "; ".join(
        f"{100 * p.removed:.1f}%: KL {number(p.kl)}, perplexity {number(p.perplexity_ratio)} times"
        for p in points
    )
    return _drawn(f"Damage by the share of parameters removed. {said}", 440, fill)


def _step(count: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count / step <= 32)


def _line(text: str) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _drawn(description: str, height: int, fill: Callable[[Figure], None]) -> Markup:
    """Return an image that ``fill`` draws, ``height`` CSS pixels high, with what it shows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # It announces that it looks for fonts, once on each machine.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with rc_context(fname=_STYLE):  # not what the user has set for own plots
        size = _WIDTH / 72, height / 72
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        fill(figure)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    image = f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"
    tag = '<div class="scroll"><img class="plot" alt="{}" src="{}"></div>'
    return Markup(tag).format(visible(description), image)
