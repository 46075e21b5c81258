"""Whether a recovery that is killed at a random step and resumed ends as if it had not been.

    python benchmarks/recovery_kills.py --model PRUNED --data alpaca.jsonl

Trains a pruned SmolLM2-135M in float32, with dropout and a checkpoint every third step, once to its
end and ``--kills`` times killed by SIGKILL at a random moment of a random step and gone on with
``--resume``. Writes the largest difference of any weight, training loss or score to
benchmarks/results/recovery_kills.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from commands import keep, llm_pruner
from machine import machine

RESULTS = Path(__file__).parent / "results"
STEPS, BATCH, SEQ_LEN, SAVE_EVERY = 16, 2, 256, 3


def kill(command: list[str], step: int, wait: float) -> None:
    """Start a run and kill it some seconds after a step."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"step {step} of"):
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                break
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended by itself with {process.returncode} at step {step}")


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a folder's weights and its record."""
    record: dict[str, Any] = json.loads((folder / "recovery.json").read_text())
    return load_file(folder / "model.safetensors"), record


def furthest(one: list[float], other: list[float]) -> float:
    """Return the largest difference."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the pruned model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_kills.json")
    options = parser.parse_args()
    draw = random.SystemRandom()
    settings = ["--data", options.data, "--samples", STEPS * BATCH + 4, "--set", "held_out=4"]
    settings += [
        "--batch-size",
        BATCH,
        "--set",
        f"seq_len={SEQ_LEN}",
        "--trainer",
        f"max_steps={STEPS}",
        "--trainer",
        "bf16=false",
    ]
    settings += [
        "--trainer",
        f"save_steps={SAVE_EVERY}",
        "--set",
        f"evaluations={STEPS}",
        "--set",
        "lora_dropout=0.1",
    ]
    tries = []
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        llm_pruner("recover", options.model, "--out", whole, *settings)
        weights, record = read(whole)
        before = load_file(Path(options.model) / "model.safetensors")
        moved = max(float((weights[name] - before[name]).abs().max()) for name in before)
        arguments = [sys.executable, "-m", "llm_pruner", "recover", options.model, "--out", cut]
        for _ in range(options.kills):
            step, wait = draw.randint(1, STEPS - 1), draw.uniform(0, 1)
            kill([str(one) for one in (*arguments, *settings)], step, wait)
            if cut.exists():
                raise SystemExit("a run that was killed left a folder that looks finished")
            llm_pruner("recover", options.model, "--out", cut, *settings, "--resume")
            again, told = read(cut)
            found = {
                "killed_at_step": step,
                "seconds_after": round(wait, 2),
                "weights": max(float((again[n] - weights[n]).abs().max()) for n in weights),
                "losses": furthest(told["losses"], record["losses"]),
                "scores": furthest(*([x for _, x in r["evaluations"]] for r in (told, record))),
            }
            tries.append(found)
            print(json.dumps(found), flush=True)
            shutil.rmtree(cut)
    result = {
        "settings": {
            "model": Path(options.model).name,
            "data": options.data.name,
            "steps": STEPS,
            "batch": BATCH,
            "seq_len": SEQ_LEN,
            "save_every": SAVE_EVERY,
            "machine": machine(),
        },
        "largest_change_by_training": moved,
        "tries": tries,
        "largest_difference": {
            name: max(one[name] for one in tries) for name in ("weights", "losses", "scores")
        },
    }
    keep(options.out, result)
    print(json.dumps(result["largest_difference"]))


if __name__ == "__main__":
    main()
