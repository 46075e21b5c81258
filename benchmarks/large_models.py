"""Time and memory of pruning, from small models to such as are larger than memory.

    python benchmarks/large_models.py --models NAME=MODEL[@MEMORY],... --calibration FILE --work DIR
        --out FILE [--plot FILE]

MODEL is a folder or a shape of ``random_checkpoint.py``, which is then written to DIR (and deleted
again); MEMORY is what ``--memory`` is given. Each row is a ``prune --preset paper --ratio 0.2`` in
a process of its own, from start to the saved checkpoint, with the seconds of its stages, the peak
of its resident memory, pages of mapped files included, the bytes in and out, and the hash of the
plan, which is the same whether weights are read block by block or not. OUT is written after each
row, and a row that is there is not made again.

Beside it stands the floor: the bytes of the weights read twice and those of the result written
once, at the rates of this disk, and 6 operations for each weight and token, at the rate of this
machine for products of the model's own shape.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from commands import found_in, keep
from llm_pruner.runtime.precision import multiplies_bfloat16
from machine import machine
from random_checkpoint import SHAPES, write

SAMPLES, LENGTH = 10, 64
BYTES = 2**30


def disk_rates(folder: Path) -> tuple[float, float]:
    """Return bytes read and written a second, past the page cache."""
    block = os.urandom(2**23)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(2**23):
            pass
        return BYTES / (time.perf_counter() - begin), BYTES / written


def operations_a_second(model: Path) -> float:
    """Return the rate of products of the calibration tokens with an FFN's weight."""
    config = AutoConfig.from_pretrained(model)
    kind = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    left = torch.randn(SAMPLES * LENGTH, config.hidden_size, dtype=kind)
    right = torch.randn(config.hidden_size, config.intermediate_size, dtype=kind)
    left @ right
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < 2:
        left @ right
        done += 2 * left.numel() * right.shape[1]
    return done / (time.perf_counter() - begin)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def reads_by_block(said: str) -> bool:
    """Return whether a run read weights block by block to its end, by what it said."""
    return said.rfind("read block by block") > said.rfind("read into memory")


def row_of(name: str, model: Path, memory: str | None, calibration: Path, work: Path) -> Any:
    """Prune; return what it took."""
    out, found = work / "pruned", work / "found.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "llm_pruner", "prune", model, "--out", out]
    command += ["--preset", "paper", "--ratio", "0.2", "--calibration", calibration]
    command += ["--json", found, "--overwrite"]
    command += [] if memory is None else ["--memory", memory]
    begin = time.perf_counter()
    with (work / "said.txt").open("w+") as file:
        child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        file.seek(0)
        said = file.read()
    if status:
        raise SystemExit(f"{said}{' '.join(map(str, command))} failed")
    record = json.loads(found.read_text())
    read, written = disk_rates(work)
    rate = operations_a_second(model)
    inside, outside = weight_bytes(model), weight_bytes(out)
    tokens = SAMPLES * LENGTH
    floor = {
        "read_twice": 2 * inside / read,
        "written_once": outside / written,
        "products": 6 * tokens * record["parameters_before"] / rate,
    }
    plan = hashlib.sha256((out / "plan.json").read_bytes()).hexdigest()
    shutil.rmtree(out)
    return {
        "name": name,
        "memory": memory,
        "by_block": reads_by_block(said),
        "plan": plan,
        "parameters": record["parameters_before"],
        "bytes_in": inside,
        "bytes_out": outside,
        "seconds": round(seconds, 1),
        "stages": {stage: round(value, 1) for stage, value in record["seconds"].items()},
        "peak_bytes": usage.ru_maxrss * 1024,
        "user_seconds": round(usage.ru_utime, 1),
        "system_seconds": round(usage.ru_stime, 1),
        "twin_difference": record["twin_difference"],
        "floor": {part: round(value, 1) for part, value in floor.items()},
        "of_floor": round(seconds / sum(floor.values()), 2),
        "rates": {"read": read, "written": written, "operations": rate},
        "machine": machine(),
        "total_memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw seconds and peak memory against the number of parameters."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    rows = sorted(rows, key=lambda row: row["parameters"])
    kinds: dict[str, list[dict[str, Any]]] = {"block by block": [], "all in memory": []}
    for row in rows:
        kinds["block by block" if row["by_block"] else "all in memory"].append(row)
    sizes = {row["parameters"] / 1e9: f"{row['parameters'] / 1e9:.2g}B" for row in rows}
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.5))
    for kind, found in kinds.items():
        at = [row["parameters"] / 1e9 for row in found]
        time_axes.plot(at, [row["seconds"] for row in found], "o-", label=kind)
        memory_axes.plot(at, [row["peak_bytes"] / 1e9 for row in found], "o-", label=kind)
    last = kinds["block by block"]
    at = [row["parameters"] / 1e9 for row in last]
    time_axes.plot(at, [sum(row["floor"].values()) for row in last], "--", label="floor")
    memory_axes.plot(at, [row["bytes_in"] / 1e9 for row in last], "--", label="weights on disk")
    time_axes.set_ylabel("seconds, start to saved")
    memory_axes.set_ylabel("GB, peak of resident memory")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([*sizes], [*sizes.values()])
        axes.set_xlabel("parameters")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", required=True, help="NAME=MODEL[@MEMORY], comma-separated")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = found_in(options.out, [])
    for item in options.models.split(","):
        name, _, rest = item.partition("=")
        model, _, memory = rest.partition("@")
        if any(row["name"] == name for row in rows):
            continue
        folder = options.work / model if model in SHAPES else Path(model)
        if model in SHAPES and not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            write(model, options.calibration, folder)
        row = row_of(name, folder, memory or None, options.calibration, options.work)
        rows.append(row)
        keep(options.out, rows)
        print(json.dumps(row), flush=True)
        if model in SHAPES:
            shutil.rmtree(folder)
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
