"""The picture of the README: damage against size, from what ``readme_table.py`` measured.

    python benchmarks/readme_picture.py

Draws docs/assets/damage.svg from benchmarks/results/readme_table.json, for light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from readme_table import HERE, RESULTS, mean_kl

OUT = HERE.parent / "docs" / "assets" / "damage.svg"
LINES = {
    "optipfair": ("optipfair", "#9a9a9a", "--"),
    "FLAP": ("FLAP", "#6f6f6f", ":"),
    "paper": ("LLM-Pruner, as published", "#b08030", "-."),
    "balanced": ("balanced (the default)", "#3a7bd5", "-"),
    "best": ("best", "#0b8457", "-"),
}
"""Row -> its name, colour and dashes."""
GREY = "#7d7d7d"
"""Read on white and on black."""


def points(results: Mapping[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Return the sizes of a row in percent of the dense model, and the damage of each."""
    size = next(row["parameters"] for row in results["rows"] if row["name"] == "dense")
    found = [
        (100 * row["parameters"] / size, mean_kl(row)[0])
        for row in results["rows"]
        if row["name"].split(" ")[0] == name
    ]
    ordered = sorted([(100.0, 0.0), *found], reverse=True)
    return [x for x, _ in ordered], [y for _, y in ordered]


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Draw the picture as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "damage", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.6))
    for name, (label, colour, dashes) in LINES.items():
        across, up = points(results, name)
        if len(up) > 1:
            marker = "o" if dashes == "-" else "."
            axes.plot(across, up, dashes, color=colour, marker=marker, label=label)
    for row in results["rows"]:
        if row["name"].startswith("recovered"):
            size = points(results, "recovered")[0][-1]
            axes.plot([size], [mean_kl(row)[0]], "*", color="#0b8457", markersize=13)
            axes.annotate(
                "best, an hour of recover",
                (size, mean_kl(row)[0]),
                xytext=(6, -14),
                textcoords="offset points",
                color=GREY,
            )
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters left, % of the dense model", color=GREY)
    axes.set_ylabel("KL from the dense model, nats", color=GREY)
    axes.set_title("Damage on text that no row has read", color=GREY, fontsize=11)
    axes.tick_params(colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, loc="upper left")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
