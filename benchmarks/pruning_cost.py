"""Peak memory and time of pruning beside a plain forward and backward over the same tokens.

    python benchmarks/pruning_cost.py --calibration calib.jsonl

Prunes SmolLM2-135M with mixed-order Taylor on 128 x 128 tokens through the command line, and runs
a plain training-like pass (weight gradients kept, batches of 8), each in its own process. Writes
benchmarks/results/pruning_cost.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SAMPLES, SEQ_LEN, BATCH = 128, 128, 8


def plain(model: str, calibration: str) -> dict[str, float]:
    """Run forward and backward over the calibration tokens, weight gradients kept."""
    import torch
    import torch.nn.functional as F

    from llm_pruner.data.calibration import build_calibration
    from llm_pruner.models.load import load_model
    from llm_pruner.settings.common import CalibrationSettings

    loaded = load_model(model)
    asked = CalibrationSettings(calibration=calibration, samples=SAMPLES, seq_len=SEQ_LEN)
    tokens = build_calibration(asked, loaded.tokenizer, seed=0).input_ids
    begin = time.perf_counter()
    for batch in tokens.split(BATCH):
        logits = loaded.model(input_ids=batch, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "threads": torch.get_num_threads()}


def run(command: list[str]) -> tuple[dict[str, Any], float]:
    """Run a command; return its JSON and the peak resident memory of its process in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # The kernel reports the peak over all children, so each has a process of its own.
        code = (
            "import resource, subprocess, sys\n"
            "done = subprocess.run(sys.argv[1:])\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
            "sys.exit(done.returncode)"
        )
        full = [part.format(out=folder, json=result) for part in command]
        done = subprocess.run(
            [sys.executable, "-c", code, *full], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(result.read_text()), float(done.stdout.split()[-1])


def main() -> None:
    """Measure both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning_cost.json")
    options = parser.parse_args()
    if options.plain:
        options.plain.write_text(json.dumps(plain(options.model, options.calibration)))
        return
    prune = [sys.executable, "-m", "llm_pruner", "prune", options.model, "--out", "{out}/pruned"]
    prune += ["--ratio", "0.2", "--preset", "paper", "--order", "mixed"]
    prune += ["--calibration", options.calibration]
    prune += ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--json", "{json}"]
    pruned, pruned_peak = run(prune)
    base = [sys.executable, __file__, "--calibration", options.calibration]
    unpruned, plain_peak = run([*base, "--model", options.model, "--plain", "{json}"])
    estimate = pruned["seconds"]["estimate"]
    result = {
        "settings": {
            "model": pruned["model"],
            "criterion": "taylor, mixed, element",
            "calibration": f"{Path(options.calibration).name}, {SAMPLES} x {SEQ_LEN} tokens",
            "plain": f"forward and backward, weight gradients kept, batches of {BATCH}",
            "machine": f"{platform.machine()}, {unpruned['threads']} threads, float32",
        },
        "prune_peak_bytes": pruned_peak,
        "plain_peak_bytes": plain_peak,
        "prune_seconds": pruned["seconds"],
        "plain_seconds": unpruned["seconds"],
        "estimate_over_plain": estimate / unpruned["seconds"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
