"""The curve of a model, and its time beside that of separate runs of ``prune`` at the same sizes.

    python benchmarks/curve.py --model MODEL --calibration FILE [--preset NAME] [--ratios LIST]
        --out FILE [--plot FILE]

Each command has a process of its own. OUT is written after each, and what is there is not made
again; a curve that is there has to have the sizes that are asked for. The seconds are those of the
clock and of the processor, which hold on a busy machine, too. Beside them stands whether the plan
of a point is, byte for byte, that of ``prune``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import found_in, keep
from machine import machine


def run(command: list[object], folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a command that writes ``folder``/out; return its JSON and what it took."""
    found = folder / "found.json"
    words = [sys.executable, "-m", "llm_pruner", *command, "--out", folder / "out", "--json", found]
    begin = time.perf_counter()
    child = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed")
    cost = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return json.loads(found.read_text()), stages(cost)


def digest(plan: Path) -> str:
    """Return what tells plans apart."""
    return hashlib.sha256(plan.read_bytes()).hexdigest()[:16]


def stages(seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds with one digit."""
    return {name: round(value, 1) for name, value in seconds.items()}


def measured(point: dict[str, Any]) -> dict[str, Any]:
    """Return what a plot shows of a point."""
    far = point["measured"]["divergence"]
    return {
        "removed": point["removed"],
        "parameters": point["parameters"],
        "kl": far["kl"],
        "kl_stderr": far["kl_stderr"],
        "changed": far["changed"],
        "perplexity_ratio": point["perplexity_ratio"],
        "split": point["split"],
        "seconds": stages(point["seconds"]),
    }


def curve(asked: list[object], ratios: str, tokens: str) -> dict[str, Any]:
    """Return the points of a curve, and what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        more = ["--ratios", ratios, "--set", f"measured_tokens={tokens}"]
        found, cost = run(["curve", *asked, *more], folder)
        text = found["points"][0]["measured"]
        return {
            **cost,
            "stages": stages(found["seconds"]),
            "text": {key: text[key] for key in ("corpus", "tokens", "window", "windows")},
            "dense_perplexity": text["divergence"]["perplexity"],
            "points": {str(one["asked"]): measured(one) for one in found["points"]},
            "plans": {
                str(one["asked"]): digest(folder / "out" / one["plan"]) for one in found["points"]
            },
        }


def prune(asked: list[object], ratio: str) -> dict[str, Any]:
    """Return what a run of ``prune`` took."""
    with tempfile.TemporaryDirectory() as name:
        found, cost = run(["prune", *asked, "--ratio", ratio], Path(name))
        plan = digest(Path(name) / "out/plan.json")
    return {**cost, "stages": stages(found["seconds"]), "plan": plan}


def plot(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw the damage of each row, and what curve and ``prune`` took of the processor."""
    import matplotlib.pyplot as plt

    figure, (kl_axes, ratio_axes, time_axes) = plt.subplots(1, 3, figsize=(11, 3.4))
    for place, (name, row) in enumerate(rows.items()):
        points = row["curve"]["points"].values()
        shares = [0.0, *(100 * one["removed"] for one in points)]
        errors = [0.0, *(one["kl_stderr"] or 0.0 for one in points)]
        kl_axes.errorbar(
            shares, [0.0, *(one["kl"] for one in points)], errors, fmt="o-", label=name
        )
        ratios = [1.0, *(one["perplexity_ratio"] for one in points)]
        ratio_axes.plot(shares, ratios, "o-", label=name)
        bottom = 0.0
        for one in row["prune"].values():
            label = "prune, a bar for each size" if place == 0 and bottom == 0 else None
            time_axes.bar(
                place - 0.2,
                one["cpu_seconds"],
                0.35,
                bottom,
                color="C7",
                edgecolor="white",
                label=label,
            )
            bottom += one["cpu_seconds"]
        label = "curve" if place == 0 else None
        time_axes.bar(place + 0.2, row["curve"]["cpu_seconds"], 0.35, color="C0", label=label)
    kl_axes.set_ylabel("KL from the dense model, nats")
    ratio_axes.set_yscale("log", base=2)
    ratio_axes.yaxis.set_major_formatter("{x:g}")
    ratio_axes.set_ylabel("perplexity, times the dense model's")
    time_axes.set_ylabel("seconds of the processor")
    names = [name.replace("-Instruct, ", "\n") for name in rows]
    time_axes.set_xticks(range(len(rows)), names, fontsize="small")
    for axes in (kl_axes, ratio_axes):
        axes.set_xlabel("parameters removed, %")
        axes.grid(visible=True, alpha=0.3)
    for axes in (kl_axes, time_axes):
        axes.margins(y=0.3)  # room for the legend
    for axes in (kl_axes, time_axes):
        axes.legend(loc="upper left", fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Make what is missing of one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--measured-tokens", default="8192")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows, name = found_in(options.out, {}), f"{Path(options.model).name}, {options.preset}"
    text, ratios = options.calibration.name, [str(float(one)) for one in options.ratios.split(",")]
    row = rows.setdefault(name, {"calibration": text, "machine": machine(), "prune": {}})
    there = row["curve"]["points"] if "curve" in row else ratios
    missing = [ratio for ratio in ratios if ratio not in there]
    if row["calibration"] != text or missing:
        what = f"no point at {', '.join(missing)}" if missing else f"read {row['calibration']}"
        parser.error(f"the curve of {name} in {options.out} has {what}; give another --out")
    asked = [options.model, "--preset", options.preset, "--calibration", options.calibration]

    if "curve" not in row:
        row["curve"] = curve(asked, options.ratios, options.measured_tokens)
        keep(options.out, rows)
    for ratio in ratios:
        if ratio not in row["prune"]:
            found = prune(asked, ratio)
            found["same_plan"] = found.pop("plan") == row["curve"]["plans"][ratio]
            row["prune"][ratio] = found
            keep(options.out, rows)
    for what in ("seconds", "cpu_seconds"):
        total = sum(one[what] for one in row["prune"].values())
        row[f"prune_{what}"] = round(total, 1)
        row[f"prune_over_curve_{what}"] = round(total / row["curve"][what], 2)
    keep(options.out, rows)
    print(json.dumps({key: value for key, value in row.items() if key.startswith("prune_")}))
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
