"""The table of results in the README: prune, measure, compare, all through the command line.

    python benchmarks/results_table.py --calibration c4_sample.jsonl --text wikitext2_raw_test.txt

Each row is one ``prune`` and one ``evaluate --report``; the dense model is measured once. What
``compare`` prints of the folders is written to benchmarks/results/results_table.md, and as data to
results_table.json. Run again with the same model and texts it measures the folders that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import stamp

RESULTS = Path(__file__).parent / "results"
PAPER = ("--preset", "paper", "--layers", "heads=4-26,ffn=4-26")
MEASURED = ("--protocol", "paper", "--set", "max_tokens=8192")
"""Of SmolLM2-135M, in the paper's setting."""

ROWS: dict[str, Sequence[str]] = {
    "random": (*PAPER, "--criterion", "random"),
    "L2": (*PAPER, "--criterion", "l2"),
    "Taylor": PAPER,
    "Taylor, split by trials": (*PAPER, "--set", "split=auto"),
    "preset fast": ("--preset", "fast"),
    "preset best": ("--preset", "best"),
}
"""Name -> options of ``prune --ratio 0.2``."""


def main() -> None:
    """Make the folders that are missing, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default", help="dense model")
    parser.add_argument("--calibration", required=True, help="text for taylor")
    parser.add_argument("--text", required=True, help="corpus that perplexity is measured on")
    parser.add_argument("--work", type=Path, default=Path("runs/results_table"), help="folders")
    given = parser.parse_args()
    measured = ("--perplexity", given.text, *MEASURED)
    work, folders = given.work / stamp(given.model, given.calibration, given.text), []
    for name, options in ROWS.items():
        folder = work / name.lower().replace(", ", "-").replace(" ", "-")
        folders.append(f"{name}={folder}")
        if not folder.exists():
            prune = ("prune", given.model, "--out", folder, "--ratio", "0.2", "--calibration")
            _run(*prune, given.calibration, *options)
        _run("evaluate", folder, *measured, "--report", folder)
        if len(folders) == 1:
            _run("evaluate", given.model, *measured, "--report", folder)
    RESULTS.mkdir(exist_ok=True)
    data = RESULTS / "results_table.json"
    table = _run("compare", *folders, "--markdown", "--json", data)
    (RESULTS / "results_table.md").write_text(table, encoding="utf-8")
    print(table, end="")


def _run(*arguments: object) -> str:
    """Run ``llm-pruner`` and return what it prints."""
    command = [sys.executable, "-m", "llm_pruner", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
