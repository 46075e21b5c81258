"""What share of a ``prune`` run the comparison with the masked twin takes.

    python benchmarks/verification_cost.py [MODEL ...] --calibration c4_first_100.jsonl [--keep DIR]

Prunes each model (by default the embedded SmolLM2-135M) by 20% as the command comes, but for the
text, and reads the seconds of its stages: ``verify`` runs the twin and the pruned model, ``reload``
loads what was saved and runs it beside the model in memory. Writes
benchmarks/results/verification_cost.json; what was pruned stays only where ``--keep`` says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from commands import found_in, keep, llm_pruner
from machine import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Prune each model, print and write the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=["default"])
    parser.add_argument("--calibration", required=True, help="text for the estimate")
    parser.add_argument("--keep", type=Path, help="folder for the pruned models")
    options = parser.parse_args()
    file = RESULTS / "verification_cost.json"
    rows = found_in(file, {})
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            kept = options.keep or Path(folder)
            out, record = kept / f"{Path(model).name}-pruned", Path(folder) / "run.json"
            settings = ("--ratio", "0.2", "--calibration", options.calibration)
            llm_pruner("prune", model, "--out", out, *settings, "--json", record)
            run = json.loads(record.read_text())
        seconds = run["seconds"]
        whole = sum(seconds.values())
        compared = seconds.get("verify", 0.0) + seconds.get("reload", 0.0)
        rows[run["model"]] = {
            "parameters": run["parameters_before"],
            "share": compared / whole,
            "seconds": seconds,
            "scenes": run["twin_scenes"],
            "skipped": run["twin_skipped"],
            "difference": run["twin_difference"],
            "machine": machine(),
        }
        print(f"{run['model']}: {100 * compared / whole:.1f}% of {whole:.0f} s")
        keep(file, rows)


if __name__ == "__main__":
    main()
