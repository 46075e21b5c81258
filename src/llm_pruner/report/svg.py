"""Drawings as SVG that takes its colours from the page, so that one drawing serves both themes."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from llm_pruner.report.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 840, 340
"""Widths in CSS pixels: for a screen and for a phone. Text is as large in both."""

# Colours that stand in a drawing for variables of the page's style sheet.
COLORS = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "dense": "#010104",
    "pruned": "#010105",
    "recovered": "#010106",
    "track": "#010107",
}
_VARIABLES = {value: f"var(--{name})" for name, value in COLORS.items()}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "llm-pruner",  # equal drawings are equal bytes
    "font.family": "DejaVu Sans",  # measured with; the page shows its own
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.titlecolor": COLORS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "text.color": COLORS["ink"],
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def draw(
    name: str, description: str, fill: Callable[[Figure, bool], None], height: Callable[[bool], int]
) -> str:
    """Return a drawing for screens and one for phones, of which the style sheet shows one.

    Args:
        name: unique in the page; prefix of the ids in it.
        description: what a reader who cannot see it is told.
        fill: draws into a figure, the second argument being whether it is the narrow one.
        height: in CSS pixels, by whether it is narrow.
    """
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    # It announces that it looks for fonts, once on each machine.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    drawings = []
    for narrow in (False, True):
        # Whatever the user has set for own plots stays out of this.
        with rc_context():
            rcdefaults()
            rcParams.update(_SETTINGS)
            size = (NARROW if narrow else WIDE) / 72, height(narrow) / 72
            figure = Figure(figsize=size, dpi=72, layout="constrained")
            fill(figure, narrow)
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata={"Date": None})
        prefix = f"{name}-{'n' if narrow else 'w'}"
        classes = f"plot {'narrow' if narrow else 'wide'}"
        drawings.append(_for_page(written.getvalue(), prefix, classes, description))
    return "".join(drawings)


def _for_page(drawing: str, prefix: str, classes: str, description: str) -> str:
    """Return the SVG element, named, without fixed colours, fonts and sizes or idle ids."""
    root = ElementTree.fromstring(drawing)
    used = {
        value.split("#", 1)[1].rstrip(")")
        for element in root.iter()
        for value in element.attrib.values()
        if value.startswith(("#", "url(#"))
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] == "metadata":
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set(key, f"{prefix}-{value}")
                else:
                    del element.attrib[key]
            elif value.startswith("#") and key.endswith("href"):
                element.set(key, f"#{prefix}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{prefix}-{value[5:]}")
            elif key == "style":
                element.set(key, _themed(value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("class", classes)
    root.set("role", "img")
    root.set("aria-label", visible(description))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    """Replace colours by variables, and leave the font to the page."""
    kept = []
    for rule in style.split(";"):
        key, _, value = (part.strip() for part in rule.partition(":"))
        if key == "font":  # such as: bold 11px 'DejaVu Sans', sans-serif
            weight = "600" if "bold" in value.split() or "700" in value.split() else "400"
            size = next((part for part in value.split() if part.endswith("px")), "11px")
            kept.append(f"font-weight: {weight}; font-size: {size}")
        elif key and key != "font-family":
            kept.append(f"{key}: {_VARIABLES.get(value, value)}")
    return "; ".join(kept)
