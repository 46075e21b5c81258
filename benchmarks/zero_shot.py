"""The seven zero-shot tasks through llm-pruner and through lm_eval itself: same numbers, and time.

    python benchmarks/zero_shot.py --data DIR

DIR holds boolq.jsonl and so on. SmolLM2-135M, dense and pruned to layers of different sizes, is
evaluated by `llm-pruner evaluate` and by `lm_eval --model hf`, each in a process of its own, on the
same items. Writes benchmarks/results/zero_shot.json; exits with 1 if any number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import found_by, keep, llm_pruner, save_dense

RESULTS = Path(__file__).parent / "results"
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def run(*command: object) -> float:
    """Run a Python command; return its seconds."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin


def ours(model: Path, data: Path, limit: int, folder: Path) -> tuple[dict[str, Any], float]:
    """Return {task: {metric: (value, stderr)}} and seconds of our command."""
    file = folder / "ours.json"
    command = ["-m", "llm_pruner", "evaluate", model, "--tasks", ",".join(TASKS)]
    command += [
        "--set",
        f"tasks_data={data}",
        "--limit",
        limit,
        "--set",
        "cache=false",
        "--json",
        file,
    ]
    seconds = run(*command)
    found = json.loads(file.read_text())["zero_shot"]
    tables = {
        task["task"]: {
            name: (metric["value"], metric["stderr"]) for name, metric in task["metrics"].items()
        }
        for task in found["tasks"]
    }
    return {"tasks": tables, "mean": found["mean"], "versions": found["versions"]}, seconds


def theirs(model: Path, tasks: Path, limit: int, folder: Path) -> tuple[dict[str, Any], float]:
    """Return the same of lm_eval, which is told nothing about llm-pruner."""
    out = folder / "theirs"
    command = ["-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", 8]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", tasks]
    command += ["--tasks", ",".join(TASKS), "--limit", limit, "--output_path", out]
    seconds = run(*command)
    (file,) = out.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    tables = {
        task: {
            name.partition(",")[0]: (value, found[task][name.replace(",", "_stderr,")])
            for name, value in found[task].items()
            if name in ("acc,none", "acc_norm,none")
        }
        for task in TASKS
    }
    return {"tasks": tables}, seconds


def compare(model: Path, data: Path, tasks: Path, limit: int) -> dict[str, Any]:
    """Evaluate a checkpoint both ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine, seconds = ours(model, data, limit, folder)
        other, other_seconds = theirs(model, tasks, limit, folder)
    rows = {
        task: {
            metric: {
                "llm_pruner": mine["tasks"][task][metric][0],
                "lm_eval": value,
                "stderr": stderr,
                "equal": mine["tasks"][task][metric][0] == value
                and abs(mine["tasks"][task][metric][1] - stderr) < 1e-9,
            }
            for metric, (value, stderr) in metrics.items()
        }
        for task, metrics in other["tasks"].items()
    }
    return {
        "tasks": rows,
        "equal": all(each["equal"] for metrics in rows.values() for each in metrics.values()),
        "mean": mine["mean"],
        "seconds": {"llm_pruner": seconds, "lm_eval": other_seconds},
        "versions": mine["versions"],
    }


def main() -> None:
    """Evaluate both checkpoints both ways and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=RESULTS / "zero_shot.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dense, pruned, tasks = (Path(name) / part for part in ("dense", "pruned", "tasks"))
        save_dense(options.model, dense)
        how = ("--ratio", options.ratio, "--preset", "paper", "--criterion", "l2")
        if found_by("prune", dense, "--out", pruned, *how)["saved_as"] == "stock":
            raise SystemExit("the pruned layers are equal; this is about layers that differ")
        llm_pruner("tasks", "--tasks-data", options.data, "--out", tasks)
        found = {
            kind: compare(model, options.data, tasks, options.limit)
            for kind, model in (("dense", dense), ("pruned", pruned))
        }
    versions = found["dense"].pop("versions")
    found["pruned"].pop("versions")
    result = {
        "settings": {
            "model": options.model,
            "items_per_task": options.limit,
            "pruned": f"{options.ratio:.0%} of all parameters, l2, layers of different sizes",
            "lm_eval": "--model hf, dtype=float32, batches of 8",
            "machine": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
            "versions": versions,
        },
        **found,
    }
    keep(options.out, result)
    print(json.dumps(result, indent=1))
    if not all(each["equal"] for each in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
