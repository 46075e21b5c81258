"""How much zero-shot accuracy a smaller model keeps, on all items of the seven tasks.

    python benchmarks/zero_shot_kept.py --data DIR --calibration c4_first_100.jsonl \
        [--recovered "best, recovered for 6 minutes=FOLDER"] [--presets ""] [--params 113.3M] \
        [--limit 300]

DIR holds boolq.jsonl and so on. SmolLM2-135M is evaluated dense, pruned by the presets `paper` and
`best` to ``--params`` parameters (113.3M: a fifth of the blocks gone), and recovered: each
``--recovered`` is a name and a folder that `recover` or another package wrote. Beside the mean of
the seven and of the six without BoolQ it gives the share of accuracy above chance that is kept:
mean over tasks of accuracy minus chance, over that of the dense model. Writes
benchmarks/results/zero_shot_kept.json after each model, and goes on from there when it is run
again; pruned models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands import keep, llm_pruner, name_of, results_in, stamp
from machine import machine

RESULTS = Path(__file__).parent / "results"
CHANCE = {
    **{"boolq": 1 / 2, "piqa": 1 / 2, "winogrande": 1 / 2},
    **{"hellaswag": 1 / 4, "arc_easy": 1 / 4, "arc_challenge": 1 / 4, "openbookqa": 1 / 4},
}


def evaluated(model: object, data: Path, dtype: str, limit: int | None = None) -> dict[str, Any]:
    """Return accuracy and standard error of each task, by the paper's metric, and their means."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        tasks = ("--tasks", "paper", "--tasks-data", data, "--dtype", dtype)
        some = () if limit is None else ("--limit", limit)
        llm_pruner("evaluate", model, *tasks, *some, "--no-cache", "--json", file)
        found = json.loads(file.read_text())["zero_shot"]
    each = {
        task["task"]: {
            "metric": task["paper_metric"],
            "items": task["documents"],
            **{k: task["metrics"][task["paper_metric"]][k] for k in ("value", "stderr")},
        }
        for task in found["tasks"]
    }
    return {
        "tasks": each,
        "mean of seven": mean(each, tuple(CHANCE)),
        "mean without boolq": mean(each, tuple(CHANCE)[1:]),
        "above chance": above_chance(each),
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": found["versions"],
    }


def mean(each: Mapping[str, Mapping[str, float]], tasks: tuple[str, ...]) -> dict[str, float]:
    """Return the mean over tasks and its standard error, for tasks that are independent."""
    value = sum(each[task]["value"] for task in tasks) / len(tasks)
    error = math.sqrt(sum(each[task]["stderr"] ** 2 for task in tasks)) / len(tasks)
    return {"value": value, "stderr": error}


def above_chance(
    each: Mapping[str, Mapping[str, float]], tasks: tuple[str, ...] = tuple(CHANCE)
) -> dict[str, float]:
    """Return the mean over tasks of accuracy minus chance."""
    found = mean(each, tasks)
    return {**found, "value": found["value"] - sum(CHANCE[one] for one in tasks) / len(tasks)}


def kept(found: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return each mean over that of the dense model, with the error of a quotient."""
    shares = {}
    six = "above chance without boolq"
    for name in ("mean of seven", "mean without boolq", "above chance", six):
        both = [
            above_chance(one["tasks"], tuple(CHANCE)[1:]) if name == six else one[name]
            for one in (found, dense)
        ]
        (a, da), (b, db) = ((one["value"], one["stderr"]) for one in both)
        # The items are the same, so the two errors go together; taken as independent, this is
        # more than the true error.
        shares[name] = {
            "value": round(a / b, 4),
            "stderr": round(abs(a / b) * math.hypot(da / a, db / b), 4),
        }
    return shares


def main() -> None:
    """Evaluate what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--recovered", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--presets", default="paper,best")
    parser.add_argument("--params", default="113.3M", help="that all but the dense model have")
    parser.add_argument("--limit", type=int, help="items of each task; all by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kept-work")
    parser.add_argument("--out", type=Path, default=RESULTS / "zero_shot_kept.json")
    options = parser.parse_args()
    settings = {
        "model": name_of(options.model),
        "dtype": options.dtype,
        "parameters": options.params,
        "calibration": Path(options.calibration).name,
        "machine": machine(),
        **({} if options.limit is None else {"limit": options.limit}),
    }
    results = results_in(options.out, settings, parser, models={})
    models: dict[str, Any] = {"dense": options.model}
    presets = options.presets.split(",") if options.presets else []
    for preset in presets:
        made_of = (options.model, options.calibration, options.params)
        models[preset] = options.work / f"{preset}-{stamp(*made_of)}"
    for given in options.recovered:
        name, _, folder = given.partition("=")
        models[name] = Path(folder)
    for name, model in models.items():
        if name in results["models"]:
            continue
        if name in presets and not model.exists():
            size = ("--params", options.params, "--preset", name)
            llm_pruner(
                *("prune", options.model, "--out", model, *size),
                *("--calibration", options.calibration),
            )
        found = evaluated(model, options.data, options.dtype, options.limit)
        dense = results["models"].get("dense", found)
        results["models"][name] = {**found, "kept": kept(found, dense)}
        keep(options.out, results)
        print(name, json.dumps(results["models"][name]["kept"]), flush=True)


if __name__ == "__main__":
    main()
