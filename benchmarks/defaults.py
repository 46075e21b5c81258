"""What each preset costs and keeps at one size, on any model.

    python benchmarks/defaults.py MODEL --calibration FILE --text FILE [--text FILE] --out FILE

Prunes MODEL by ``--ratio`` (a fifth) with each preset, in a process of its own, and writes a row of
seconds by stage, peak memory and perplexity on each text, as a multiple of the dense model's too:
windows of 1,024 tokens on the first ``--max-tokens``. ``--code`` is a file of programs as HumanEval
has them (JSONL with prompt and canonical_solution), which are read as one text. OUT is written
after each row, and a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from commands import apart, keep, results_in
from corpora import TOKENS, WINDOW, perplexities, read_texts
from llm_pruner import PlanSettings, PruneSettings, UserError, read_plan
from llm_pruner.commands.prune import PruneRun
from llm_pruner.data.text import EvaluationText
from llm_pruner.runtime.memory import PRUNING, keep_kernels, keep_large_blocks
from machine import here


def code_text(file: Path) -> EvaluationText:
    """Return the programs of a file, one after the other."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    programs = (record["prompt"] + record["canonical_solution"] for record in records)
    return EvaluationText(file.name, None, "\n\n".join(programs))


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Prune; return what it cost, and what was found."""
    begin = time.perf_counter()
    done = PruneRun(settings).carry_out()
    seconds = time.perf_counter() - begin
    return {
        "parameters": [done.parameters_before, done.parameters_after],
        "split": read_plan(settings.out / "plan.json").settings.get("split"),
        "saved_as": done.saved_as,
        "refitted": sum(one.changed for one in done.refitted),
        "seconds": {name: round(value, 2) for name, value in done.seconds.items()},
        "total_seconds": round(seconds, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def measure(
    settings: PruneSettings,
    texts: Mapping[str, EvaluationText],
    tokens: int,
    dense: Mapping[str, float],
) -> dict[str, Any]:
    """Return the row of one preset."""
    try:
        found = apart(prune, settings)
    except UserError as error:
        return {"error": str(error)}
    found["perplexity"] = apart(perplexities, str(settings.out), texts, tokens)
    ratio = {name: round(value / dense[name], 4) for name, value in found["perplexity"].items()}
    return {**found, "ratio_to_dense": ratio}


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--code", type=Path, help="JSONL with prompt and canonical_solution")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--presets", default=",".join(PlanSettings.presets), help="comma-separated")
    parser.add_argument("--max-tokens", type=int, default=TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    keep_large_blocks()
    keep_kernels(PRUNING)
    texts = read_texts({Path(text).stem: text for text in options.text})
    if options.code is not None:
        texts[options.code.stem] = code_text(options.code)
    settings = {
        "model": Path(options.model).name,
        "ratio": options.ratio,
        "calibration": Path(options.calibration).name,
        "texts": list(texts),
        "window": WINDOW,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
    }
    results = results_in(options.out, settings, parser, dense={}, rows=[])

    if not results["dense"]:
        results["dense"] = apart(perplexities, options.model, texts, options.max_tokens)
        keep(options.out, results)
    there = {row["preset"] for row in results["rows"]}
    for preset in options.presets.split(","):
        if preset in there:
            continue
        with tempfile.TemporaryDirectory() as folder:
            asked = PruneSettings(
                model=options.model,
                out=Path(folder) / "pruned",
                preset=preset,
                ratio=options.ratio,
                calibration=options.calibration,
                seed=options.seed,
            )
            found = measure(asked, texts, options.max_tokens, results["dense"])
        row = {"preset": preset, **found, **here()}
        results["rows"].append(row)
        keep(options.out, results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
