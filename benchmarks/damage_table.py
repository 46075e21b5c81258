"""The table of all criteria in docs/reference/results.md, from what least_damage.py measured.

    python benchmarks/damage_table.py >> docs/reference/results.md

A cell is perplexity as a multiple of the dense model's, on WikiText-2 / on held-out C4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIZES = ("20% of the blocks", "50% of the blocks")
VARIANTS = tuple(product(("local", "global"), ("none", "least-squares")))
NAMES = {"local": "uniform", "global": "global", "none": "cut", "least-squares": "refit"}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "least_damage.json")
    rows = json.loads(parser.parse_args().results.read_text())["rows"]
    rows = [row for row in rows if row["run"]["rows"] == "table"]
    criteria = list(dict.fromkeys(row["run"]["criterion"] for row in rows))
    for size in SIZES:
        titles = [f"{NAMES[scope]}, {NAMES[repair]}" for scope, repair in VARIANTS]
        print(f"{size} removed:\n")
        print(_table(("criterion", *titles), _damage(rows, criteria, size)))
    titles = ("criterion", "estimate, s", "refit, s", "peak without refit, GB", "with, GB")
    print("Cost, medians:\n")
    print(_table(titles, _costs(rows, criteria)))


def _damage(
    rows: Sequence[Mapping[str, Any]], criteria: Iterable[str], size: str
) -> list[tuple[str, ...]]:
    found = {
        tuple(row["run"][key] for key in ("criterion", "size", "scope", "compensation")): row
        for row in rows
    }
    cells = ((name, (found.get((name, size, *v)) for v in VARIANTS)) for name in criteria)
    return [(f"`{name}`", *(_cell(row) for row in of)) for name, of in cells]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "not possible"
    return " / ".join(_number(row["ratio"][name]) for name in ("wikitext2", "c4"))


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _costs(rows: Sequence[Mapping[str, Any]], criteria: Iterable[str]) -> list[tuple[str, ...]]:
    lines = []
    for name in criteria:
        own = [row for row in rows if row["run"]["criterion"] == name and "seconds" in row]
        refit = [row for row in own if row["run"]["compensation"] == "least-squares"]
        own = [row for row in own if "scores_known" not in row]
        cut = [row for row in own if row["run"]["compensation"] == "none"]
        if not (cut and refit):
            continue
        lines.append(
            (
                f"`{name}`",
                f"{median(row['seconds']['estimate'] for row in own):.0f}",
                f"{median(row['seconds']['least squares'] for row in refit):.0f}",
                *(f"{median(row['peak_bytes'] for row in of) / 1e9:.2f}" for of in (cut, refit)),
            )
        )
    return lines


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


if __name__ == "__main__":
    main()
