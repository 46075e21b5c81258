"""What models do rather than predict: HumanEval pass@1 and the health of long answers.

    python benchmarks/skills.py --skills-data DIR --row "SmolLM2-135M=default" \
        --row "Qwen2.5-Coder-1.5B=DIR" [--limit 20] [--against default]

DIR holds human_eval.jsonl. Each row is ``evaluate MODEL --skills humaneval --run-code --health``
in bfloat16 on the first ``--limit`` problems and all built-in prompts; ``--only`` takes one of the
two. Writes benchmarks/results/skills.json after each row, and goes on from there when it is run
again; ``evaluate`` keeps every batch of answers, so a row that was interrupted goes on as well.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from commands import found_by, keep, results_in
from machine import here

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--row", action="append", required=True, metavar="NAME=MODEL")
    parser.add_argument("--skills-data", required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--against")
    parser.add_argument("--only", choices=("humaneval", "health"))
    parser.add_argument("--batch-size", default="20")
    parser.add_argument("--out", type=Path, default=RESULTS / "skills.json")
    given = parser.parse_args()
    settings = {"limit": given.limit, "against": given.against and Path(given.against).name}
    results = results_in(given.out, settings, parser, rows=[])
    there = {(row["name"], row["of"]) for row in results["rows"]}
    asked = {
        "humaneval": (
            *("--skills", "humaneval", "--run-code", "--set", f"skills_data={given.skills_data}"),
            *("--limit", given.limit),
        ),
        "health": ("--health",),
    }
    against = ("--against", given.against) if given.against else ()
    for name, _, model in (row.partition("=") for row in given.row):
        for of, options in asked.items():
            if (name, of) in there or given.only not in (None, of):
                continue
            begun = time.perf_counter()
            found = found_by(
                *("evaluate", model, *options, *against),
                *("--dtype", "bfloat16", "--set", f"batch_size={given.batch_size}"),
            )
            row = {
                **{"name": name, "of": of, "parameters": found["parameters"]},
                **{key: found[key] for key in ("skills", "health", "dense")},
                "seconds": round(time.perf_counter() - begun, 1),
                "batch_size": given.batch_size,
                **here(),
            }
            results["rows"].append(row)
            keep(given.out, results)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
