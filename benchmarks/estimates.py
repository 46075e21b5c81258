"""What ``prune --estimate`` says, beside what the run then takes.

    python benchmarks/estimates.py --small FOLDER --large FOLDER --calibration FILE --work DIR
        --out FILE

Four runs: SmolLM2-135M (``--small``) with the default preset and with ``paper``, both on text that
it writes; a model of 1 to 2 billion parameters (``--large``) with ``paper`` on the file, all in
memory, and read block by block. Each is asked for with ``--estimate`` and then carried out, in
processes of their own. OUT has the stages of both, the seconds from start to end, and the peak of
the resident memory, and is written after each row; a row that is there is not made again. About ten
minutes on two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from commands import found_in, keep
from machine import machine


def timed(words: list[str]) -> tuple[float, float, int]:
    """Run a command; return seconds, those of the processor, and the peak of resident memory."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "llm_pruner", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    seconds = time.perf_counter() - begin
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def row_of(name: str, words: list[str], work: Path) -> dict[str, Any]:
    """Estimate and carry out one run."""
    out, said, found = work / "pruned", work / "said.json", work / "found.json"
    shutil.rmtree(out, ignore_errors=True)
    words = ["prune", *words, "--ratio", "0.2", "--out", str(out)]
    took, _, _ = timed([*words, "--estimate", "--json", str(said), "--overwrite"])
    seconds, busy, peak = timed([*words, "--json", str(found), "--overwrite"])
    expected = json.loads(said.read_text())
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {
        "name": name,
        "seconds": {"estimated": round(expected["seconds"], 1), "true": round(seconds, 1)},
        "peak_bytes": {"estimated": expected["peak_bytes"], "true": peak},
        "saved_bytes": {"estimated": expected["saved_bytes"], "true": weights},
        "seconds_off": round(expected["seconds"] / seconds - 1, 3),
        "memory_off": round(expected["peak_bytes"] / peak - 1, 3),
        "estimate": expected,
        "stages": json.loads(found.read_text())["seconds"],
        "processor_seconds": round(busy, 1),
        "estimating_seconds": round(took, 1),
        "machine": machine(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("small", "large", "calibration", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    small, large = str(options.small), str(options.large)
    paper = ["--preset", "paper"]
    read = [*paper, "--calibration", str(options.calibration)]
    runs = {
        "SmolLM2-135M": [small],
        "SmolLM2-135M, paper": [small, *paper],
        f"{options.large.name}, paper": [large, *read, "--memory", "12GB"],
        f"{options.large.name}, paper, by block": [large, *read, "--memory", "2GB"],
    }
    rows = found_in(options.out, [])
    for name, words in runs.items():
        if any(row["name"] == name for row in rows):
            continue
        rows.append(row_of(name, words, options.work))
        keep(options.out, rows)
        shown = ("name", "seconds", "peak_bytes", "seconds_off", "memory_off")
        print(json.dumps({key: rows[-1][key] for key in shown}), flush=True)


if __name__ == "__main__":
    main()
