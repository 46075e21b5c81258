"""How much faster a pruned model is in vLLM and llama.cpp, by their own benchmarks.

    python benchmarks/serving_speed.py --work DIR [--vllm A/bin/vllm] [--llama-bench B/llama-bench]

Prunes SmolLM2-135M by 20% and by 50% in bfloat16 and times each model and the dense one: ``vllm
bench latency`` on the folders, ``llama-bench`` on f16 and q8_0 files that ``llm-pruner export``
writes. A program that is not named is left out. Nothing else should run on the machine. What is in
DIR or in the file of results is not made again. The committed results/serving_speed.json is of
version 0.2, which timed the servers itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from commands import found_by, keep, llm_pruner, results_in, save_dense, stamp
from machine import machine

RATIOS = (0.2, 0.5)
BATCHES = (1, 8)


def main() -> None:
    """Make the models that are missing, time what has no row, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, help="vLLM's command")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's command")
    parser.add_argument("--model", default="default")
    parser.add_argument("--preset", default="fast", help="as for llm-pruner prune")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="DIR/serving_speed.json if not given")
    options = parser.parse_args()
    names = ("model", "preset", "prompt_tokens", "new_tokens", "repeats")
    settings = {"machine": machine(), **{name: getattr(options, name) for name in names}}
    out = options.out or options.work / "serving_speed.json"
    results = results_in(out, settings, parser, rows={})
    dense = options.work / f"dense-{stamp(options.model)}"
    if not dense.exists():
        half = dense.with_name("half")
        save_dense(options.model, half, "bfloat16")
        half.rename(dense)
    folders = {"dense": dense}
    folders |= {f"{ratio:.0%} removed": pruned(dense, ratio, options) for ratio in RATIOS}
    for name, folder in folders.items():
        for way, program in (("vllm", options.vllm), *_llama_cpp(options)):
            row = f"{name}, {way}"
            if program is not None and row not in results["rows"]:
                timed = by_vllm if way == "vllm" else by_llama_cpp
                results["rows"][row] = timed(folder, way, program, options)
                keep(out, results)
                print(row, json.dumps(results["rows"][row]), flush=True)


def _llama_cpp(options: argparse.Namespace) -> list[tuple[str, Path | None]]:
    return [(kind, options.llama_bench) for kind in ("f16", "q8_0")]


def pruned(dense: Path, ratio: float, options: argparse.Namespace) -> Path:
    """Return the folder of a pruned model."""
    out = options.work / f"small-{ratio}-{stamp(options.model, options.preset)}"
    if not out.exists():
        how = ("--ratio", ratio, "--preset", options.preset, "--calibration", "self")
        llm_pruner("prune", dense, "--out", out, *how)
    return out


def by_vllm(folder: Path, _: str, program: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return requests at once -> seconds of a batch, of each round."""
    found = {}
    for batch in BATCHES:
        file = options.work / "latency.json"
        lengths = f"--input-len {options.prompt_tokens} --output-len {options.new_tokens}"
        rounds = f"--num-iters {options.repeats} --num-iters-warmup 1 --batch-size {batch}"
        longest = options.prompt_tokens + options.new_tokens
        words = f"{lengths} {rounds} --max-model-len {longest} --trust-remote-code"
        command = [program, "bench", "latency", "--model", folder, *words.split()]
        subprocess.run([*command, "--output-json", file], check=True)
        found[str(batch)] = json.loads(file.read_text())["latencies"]
    return found


def by_llama_cpp(
    folder: Path, kind: str, program: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the bytes of a file of this type, and tokens per second of prefill and decoding."""
    file = options.work / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        found_by("export", folder, "--type", kind, "--out", file)
    words = f"-p {options.prompt_tokens} -n {options.new_tokens} -r {options.repeats} -o json"
    command = [program, "-m", file, *words.split()]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    stages = {
        "decode" if one["n_gen"] else "prefill": {"mean": one["avg_ts"], "stddev": one["stddev_ts"]}
        for one in json.loads(said)
    }
    return {"bytes": file.stat().st_size, **stages}


if __name__ == "__main__":
    main()
