"""How much recovery wins back, by plan, size, method and data.

    python benchmarks/recovery.py --calibration c4_first_100.jsonl --c4 c4_last_50.jsonl \
        --wikitext wikitext2_test.txt --data alpaca.jsonl,c4_first_100.jsonl --minutes 25

Prunes SmolLM2-135M by two presets, trains each result with ``llm-pruner recover`` for ``--minutes``
and measures perplexity in windows of 1,024 tokens on the first 65,536 tokens of WikiText-2 test and
on held-out C4, beside the dense model. ``--plans``, ``--sizes`` and ``--methods`` choose the rows;
``distil`` is LoRA with the dense model as teacher, ``written`` LoRA on what the dense model writes
(``--data self``) without its predictions. With ``--max-steps`` runs are compared at equal steps,
and none stops early; ``--data`` given several times makes a row for each. Writes
benchmarks/results/recovery.json after each row, and goes on from there when it is run again. Pruned
models and what the dense model wrote are kept in ``--work``, trained models too with ``--keep``; a
teacher is asked anew in each row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import count, product
from pathlib import Path

from commands import keep, llm_pruner, results_in, stamp
from corpora import TOKENS, WINDOW, perplexities, read_texts
from machine import here, machine

RESULTS = Path(__file__).parent / "results"
SIZES = {"20% of the blocks": "113.3M", "20% of all": "107.612M", "50% of the blocks": "81.43M"}
METHODS = {
    "lora": ["--method", "lora"],
    "distil": ["--method", "lora", "--teacher", "default"],
    "full": ["--method", "full"],
    "written": ["--method", "lora", "--teacher", "default", "--set", "distill_weight=0"],
}


def forgetful(cache: Path) -> Path:
    """Return a teacher's cache with the text that it wrote, without what it said of any."""
    for file in cache.glob("*/done.bin"):
        shutil.rmtree(file.parent)
    return cache


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--c4", required=True)
    parser.add_argument("--data", action="append", required=True, help="files, comma-separated")
    parser.add_argument("--samples", type=int, help="of each file")
    parser.add_argument("--plans", default="best,paper")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--methods", default="lora,distil,full", help=", ".join(METHODS))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float, help="instead of the method's own")
    parser.add_argument("--epochs", type=float, help="instead of the preset's one")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "recovery-work")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery.json")
    options = parser.parse_args()
    texts = read_texts({"wikitext2": options.wikitext, "c4": options.c4})
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "calibration": Path(options.calibration).name,
        "windows": WINDOW,
        "tokens": TOKENS,
        **here(),
    }
    results = results_in(options.out, settings, parser, dense={}, pruned={}, rows=[])

    def ratios(measured: dict[str, float]) -> dict[str, float]:
        return {name: round(value / results["dense"][name], 4) for name, value in measured.items()}

    if not results["dense"]:
        results["dense"] = perplexities("default", texts)
        keep(options.out, results)
    budget = {"minutes": options.minutes, "max_steps": options.max_steps}
    for size, plan in product(options.sizes.split(","), options.plans.split(",")):
        made = stamp("default", options.calibration)
        pruned, name = options.work / f"{plan}-{SIZES[size]}-{made}", f"{plan}, {size}"
        if not pruned.exists():
            results["pruned"].pop(name, None)
            keep(options.out, results)
            how = ["--preset", plan, "--calibration", options.calibration]
            llm_pruner("prune", "default", "--out", pruned, "--params", SIZES[size], *how)
        if name not in results["pruned"]:
            results["pruned"][name] = ratios(perplexities(str(pruned), texts))
            keep(options.out, results)
            print(name, results["pruned"][name], flush=True)
        for method, data in product(options.methods.split(","), options.data):
            files = data.split(",")
            key = {"plan": plan, "size": size, "method": method, **budget}
            key |= {"data": [Path(file).name for file in files], "samples": options.samples}
            key |= {"batch_size": options.batch_size}
            own = {"learning_rate": options.learning_rate, "epochs": options.epochs}
            own = {name: value for name, value in own.items() if value is not None}
            key |= own
            if any(row["run"] == key for row in results["rows"]):
                continue
            arguments = [*METHODS[method], *(part for file in files for part in ("--data", file))]
            arguments += [] if options.samples is None else ["--samples", options.samples]
            if options.batch_size is not None:
                arguments += ["--batch-size", options.batch_size]
            for option, value in own.items():
                arguments += [f"--{option.replace('_', '-')}", value]
            arguments += [] if options.minutes is None else ["--max-minutes", options.minutes]
            if options.max_steps is not None:
                arguments += [
                    "--trainer",
                    f"max_steps={options.max_steps}",
                    "--set",
                    f"patience={options.max_steps}",
                ]
            if "--teacher" in arguments:
                arguments += ["--set", f"teacher_cache={forgetful(options.work / 'teacher')}"]
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                llm_pruner("recover", pruned, "--out", out, *arguments)
                found = json.loads((out / "recovery.json").read_text())
                row = {
                    "run": key,
                    "start": results["pruned"][name],
                    "ratio": ratios(perplexities(str(out), texts)),
                    "steps": found["steps"],
                    "best_step": found["best_step"],
                    "tokens": found["tokens"],
                    "seconds": round(found["seconds"], 1),
                    "held_out_loss": [round(loss, 4) for loss in found["loss"]],
                    "gained": found["gained"],
                    "machine": machine(),
                }
                results["rows"].append(row)
                keep(options.out, results)
                print(json.dumps(row), flush=True)
                if options.keep:
                    free = (options.work / f"row-{number}" for number in count())
                    kept = next(folder for folder in free if not folder.exists())
                    shutil.move(out, kept)
                    print(f"kept in {kept}", flush=True)


if __name__ == "__main__":
    main()
