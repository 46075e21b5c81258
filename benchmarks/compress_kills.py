"""Whether ``compress``, killed in each of its stages and started again, ends with the same files.

    python benchmarks/compress_kills.py --text c4_last_50.jsonl

Makes SmolLM2-135M 20% smaller by the preset ``fast`` and trains it on a little text, once to its
end, and once more killed by SIGKILL, with the processes that it started, at a random moment of each
stage and started again. Compares all files of the two folders; in report.json and recovery.json
times, speeds and memory are left out, and README.md and report.html, which show them, and the
digests of all these are not compared; nor are the folders that request.yaml names. Writes
benchmarks/results/compress_kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from commands import keep, llm_pruner
from llm_pruner.files.outputs import MANIFEST
from llm_pruner.report.write import REQUEST_FILE
from machine import machine

RESULTS = Path(__file__).parent / "results"
STAGES = {
    "prune": "pruned",
    "dense": "dense.json",
    "pruned": "pruned.json",
    "recover": "recovered",
    "recovered": "recovered.json",
    "report": "result.json",
}
"""Stages in their order, named as in report.json, and what each leaves in the folder of the run."""

SETTINGS = ("--ratio", "0.2", "--preset", "fast")
TIMED = {"report.html", "README.md", MANIFEST}
MEASURED = {"report.json", "recovery.json"}
FOLDERS = {"out", "model", "kept"}
"""Settings that name folders of the run."""


def command(out: Path, text: Path) -> list[str]:
    """Return the command of a run."""
    data = ("--calibration", str(text), "--data", str(text))
    return ["compress", "default", "--out", str(out), *SETTINGS, *data]


def killed(out: Path, text: Path, stage: str, wait: float) -> bool:
    """Kill the run some seconds after a stage began; return whether it was still in it."""
    work = out.with_name(f"{out.name}.compressing")
    names = list(STAGES.values())
    before = names[: list(STAGES).index(stage)][-1:]
    started = [sys.executable, "-m", "llm_pruner", *command(out, text)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(started, start_new_session=True, **quiet) as process:
        while not all((work / name).exists() for name in before):
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode} before {stage}")
            time.sleep(0.005)
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode == -signal.SIGKILL and not (work / STAGES[stage]).exists()


def untimed(value: Any) -> Any:
    """Return what JSON says without times, speeds and memory."""
    if isinstance(value, dict):
        if str(value.get("unit", "")).startswith("tokens/s"):
            return value["name"]
        volatile = ("seconds", "peak memory", "card_digest", "command")
        return {k: untimed(v) for k, v in value.items() if k not in volatile}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    if one.name in MEASURED:
        return bool(untimed(json.loads(one.read_text())) == untimed(json.loads(other.read_text())))
    if one.name == REQUEST_FILE:
        asked = [yaml.safe_load(file.read_text()) for file in (one, other)]
        first, second = ({k: v for k, v in each.items() if k not in FOLDERS} for each in asked)
        return bool(first == second)
    return one.read_bytes() == other.read_bytes()


def main() -> None:
    """Run, kill, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="to calibrate and to train on")
    parser.add_argument("--out", type=Path, default=RESULTS / "compress_kills.json")
    options = parser.parse_args()
    draw = random.SystemRandom()
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        llm_pruner(*command(whole, options.text))
        report = json.loads((whole / "report.json").read_text())
        seconds: dict[str, float] = report["settings"]["Run"]["seconds"]
        kills = []
        for stage in STAGES:
            # The report cannot tell how long it took to write: less than a second.
            wait = draw.uniform(0.2, 0.8) * seconds.get(stage, 0.5)
            within = killed(cut, options.text, stage, wait)
            kills.append({"stage": stage, "seconds_into_it": round(wait, 1), "within_it": within})
            print(json.dumps(kills[-1]), flush=True)
        if not cut.exists():
            llm_pruner(*command(cut, options.text))
        files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
        others = {str(path.relative_to(cut)) for path in cut.rglob("*") if path.is_file()}
        left = files - TIMED
        differ = sorted(
            (files ^ others) | {n for n in left & others if not same(whole / n, cut / n)}
        )
    result = {
        "settings": {
            "model": "SmolLM2-135M-Instruct",
            "settings": " ".join(SETTINGS),
            "text": options.text.name,
            "machine": machine(),
        },
        "seconds": seconds,
        "kills": kills,
        "files": sorted(left),
        "differ": differ,
    }
    keep(options.out, result)
    print(f"{len(left)} files, {len(differ)} differ {differ}")


if __name__ == "__main__":
    main()
