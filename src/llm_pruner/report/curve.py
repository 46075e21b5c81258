"""The page of a curve: damage against size, with the plan of each point."""

from __future__ import annotations

from markupsafe import Markup

from llm_pruner.report import figures
from llm_pruner.report.data import HTML_FILE
from llm_pruner.report.facts import spaced, versions
from llm_pruner.report.records import Curve, CurvePoint
from llm_pruner.report.text import count, measured, percent
from llm_pruner.report.write import page
from llm_pruner.settings.curve import CurveSettings

DATA_FILE = "curve.json"

COLUMNS = ("removed", "left", "KL, nats", "changed", "perplexity", "x dense", "plan")
"""Headings of a table of points."""


def cells(point: CurvePoint) -> tuple[str, ...]:
    """Return what a table says of a point, see ``COLUMNS``."""
    found = point.measured
    far = found.divergence
    assert far is not None
    return (
        percent(point.removed),
        count(point.parameters),
        measured(far.kl, far.kl_stderr, ".3f"),
        percent(far.changed),
        measured(found.perplexity, None),
        f"{point.perplexity_ratio:.3f}",
        point.plan,
    )


def on(points: tuple[CurvePoint, ...]) -> str:
    """Return what was measured on, in words."""
    found = points[0].measured
    return f"{found.corpus}, {found.tokens:,} tokens in windows of {found.window:,}"


def answer(found: Curve) -> str:
    """Return the answer to how small the model may be, in a sentence; empty if nobody asked."""
    best = found.smallest
    if best is None:
        return ""
    said = f"a perplexity of {best.limit:g} times the dense model's"
    if best.of == "kl":
        said = f"a KL divergence of {best.limit:g} nats"
    if best.point is None:
        share = "" if best.removed is None else f"about {percent(best.removed)} may go, but "
        return f"For {said}: {share}{best.outside}."
    point = best.point
    reached = f"{point.perplexity_ratio:.3f} times"
    if best.of == "kl":
        reached = f"{point.kl:.3f} nats"
    return (
        f"For {said} {percent(point.removed)} of the parameters may go, which leaves "
        f"{count(point.parameters)}; measured at that size: {reached} ({point.plan})."
    )


def drawn_files(found: Curve, settings: CurveSettings, command: str | None) -> dict[str, str]:
    """Return the page, under its name, which needs nothing else, as ``write.render_html``."""
    best = None if found.smallest is None else found.smallest.point
    rows = sorted({point.asked: point for point in (*found.points, *filter(None, [best]))}.items())
    placed = {"out", "overwrite", "restart"}
    said = settings.model_dump(mode="json", exclude=placed, exclude_none=True)
    html = page(
        "curve.html",
        title=f"{found.model}, damage against size",
        found=found,
        plot=Markup(figures.curve(found.points, best)),
        columns=COLUMNS,
        rows=[cells(point) for _, point in rows],
        on=on(found.points),
        answer=answer(found),
        command=command,
        settings=spaced(said),
        versions=versions(),
    )
    return {HTML_FILE: html}
