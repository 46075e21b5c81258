"""How much zero-shot accuracy a smaller model keeps, on all items of the seven tasks.

    python benchmarks/zero_shot_kept.py --data DIR --calibration c4_first_100.jsonl \
        [--recovered "best, recovered for 6 minutes=FOLDER"] [--presets ""] [--params 113.3M] \
        [--limit 300]

DIR holds boolq.jsonl and so on. SmolLM2-135M is evaluated dense, pruned by the presets `paper` and
`best` to ``--params`` parameters (113.3M: a fifth of the blocks gone), and recovered: each
``--recovered`` is a name and a folder that `recover` or another package wrote. Beside the mean of
the seven and of the six without BoolQ it gives the share of accuracy above chance that is kept
(mean over tasks of accuracy minus chance, over that of the dense model) and the flips, as
``evaluate --against`` does. Writes
benchmarks/results/zero_shot_kept.json after each model, and goes on from there when it is run
again; pruned models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from commands import keep, llm_pruner, name_of, results_in, stamp
from llm_pruner.evaluation import zero_shot
from machine import machine

RESULTS = Path(__file__).parent / "results"
RESULT = TypeAdapter(zero_shot.TaskResult)


def evaluated(model: object, data: Path, dtype: str, limit: int | None = None) -> dict[str, Any]:
    """Return accuracy and standard error of each task, by the paper's metric, and their means."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        tasks = ("--tasks", "paper", "--set", f"tasks_data={data}", "--dtype", dtype)
        some = () if limit is None else ("--limit", limit)
        llm_pruner("evaluate", model, *tasks, *some, "--set", "cache=false", "--json", file)
        found = json.loads(file.read_text())["zero_shot"]
    return {
        "tasks": {one["task"]: one for one in found["tasks"]},
        "mean of seven": found["mean"],
        "mean without boolq": found["mean_without_boolq"],
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": found["versions"],
    }


def kept(found: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is kept of the dense model's accuracy above chance, and the flips."""
    shares = {}
    for name, left_out in {"seven": (), "without boolq": ("boolq",)}.items():
        of = [
            [
                RESULT.validate_python(one)
                for task, one in each["tasks"].items()
                if task not in left_out
            ]
            for each in (found, dense)
        ]
        share = zero_shot.kept(*of, "dense")
        assert share is not None
        shares[name] = {key: value for key, value in vars(share).items() if key != "against"}
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
