"""How much is left of a model after each package of the field, at equal size, beside ours.

    python -m venv peers && peers/bin/pip install torch transformers optipfair torch-pruning
    git clone https://github.com/horseee/LLM-Pruner original
    python benchmarks/peers.py --peers peers/bin/python --original original \
        --calibration c4_first_100.jsonl --c4 c4_last_50.jsonl --wikitext wikitext2_raw_test.txt

SmolLM2-135M, pruned on the same text to the same number of parameters, without training. Peers run
in the environment of ``--peers`` (``peer_pruners.py`` says how each is used); FLAP, whose code
needs transformers 4.28 and has no grouped heads, is written anew in ``reference/flap.py``. Each
model is judged by ``evaluate --against`` in windows of 512 tokens, on C4 text that nothing was
fitted to and on WikiText-2 test: KL(dense || pruned) and perplexity with standard errors. Seconds
are of the whole process, from its start to the saved folder. A row is one process; rows are written
to benchmarks/results/peers.json as they come, and what is there is not made again. ``--table``
prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from commands import found_by, save_dense
from machine import machine

HERE = Path(__file__).parent
SIZES = {"20% of the blocks": 113_300_000, "20% of all": 107_600_000}
PEERS = {
    "optipfair": "optipfair, on weights alone",
    "optipfair-data": "optipfair, data-driven",
    "llm-pruner": "LLM-Pruner, the original, FFN",
    "flap": "FLAP, from its paper",
    "torch-pruning": "Torch-Pruning, group L2",
}
PRESETS = ("fast", "balanced", "best")
WINDOW = 512


def prune_command(name: str, size: int, out: Path, given: argparse.Namespace) -> list[str]:
    """Return the command that makes a row's model."""
    if name in PEERS:
        return [
            *(str(given.peers), str(HERE / "peer_pruners.py"), name, str(given.work / "dense")),
            *(str(given.calibration), str(out), str(size), "--source", str(given.original)),
        ]
    return [
        *(
            sys.executable,
            "-m",
            "llm_pruner",
            "prune",
            str(given.work / "dense"),
            "--out",
            str(out),
        ),
        *("--preset", name, "--params", str(size), "--calibration", str(given.calibration)),
        *("--dtype", "float32"),
    ]


def pruned(name: str, size: int, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Make a row's model; return what was made, in how many seconds, or why it was not."""
    own = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"} if name in PEERS else {}
    environment = {**os.environ, **own}
    if name in PEERS:
        environment.pop("PYTHONPATH", None)
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            prune_command(name, size, out, given),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * given.minutes,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished in {given.minutes:g} minutes"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 1)}
    if name in PEERS:
        said = json.loads((out / "peer.json").read_text())
        return found | {key: said[key] for key in ("parameters", "version", "transformers")}
    return found


def judged(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return parameters, and for each text KL to the dense model and perplexity."""
    found = found_by(
        *("evaluate", model, "--against", given.work / "dense", "--seq-len", WINDOW),
        *("--perplexity", given.c4, "--perplexity", given.wikitext),
        *("--max-tokens", given.max_tokens, "--dtype", given.dtype),
    )
    texts = {}
    for name, one in zip(("c4", "wikitext2"), found["perplexity"], strict=True):
        far = one["divergence"]
        texts[name] = {
            **{key: far[key] for key in ("kl", "kl_stderr", "changed", "changed_stderr")},
            **{key: one[key] for key in ("perplexity", "stderr", "tokens", "windows")},
            "ratio_to_dense": one["perplexity"] / far["perplexity"],
        }
    return {"parameters": found["parameters"], "texts": texts}


def main() -> None:
    """Make the rows that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    for name in ("--peers", "--original", "--calibration", "--c4", "--wikitext"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rows", default=",".join((*PEERS, *PRESETS)), help="comma-separated")
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--dtype", default="bfloat16", help="in which models are judged")
    parser.add_argument("--minutes", type=float, default=15, help="of one row's pruning")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "peers-work")
    parser.add_argument("--out", type=Path, default=HERE / "results/peers.json")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    results: dict[str, Any] = {"rows": []}
    if given.out.exists():
        results = json.loads(given.out.read_text())
    if given.table:
        print(table(results))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "dense").exists():
        save_dense(given.model, given.work / "dense")
    results["settings"] = {
        "model": "SmolLM2-135M-Instruct",
        "calibration": given.calibration.name,
        "texts": [given.c4.name, given.wikitext.name],
        "window": WINDOW,
        "max_tokens": given.max_tokens,
        "dtype": given.dtype,
        "machine": machine(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    there = {(row["size"], row["name"]) for row in results["rows"]}
    for size in given.sizes.split(","):
        for name in given.rows.split(","):
            if (size, name) in there:
                continue
            with tempfile.TemporaryDirectory(dir=given.work) as folder:
                out = Path(folder) / "pruned"
                row = pruned(name, SIZES[size], out, given)
                if "error" not in row:
                    # A peer's own count wins: its zeros are no parameters.
                    row = {**judged(out, given), **row}
            results["rows"].append({"size": size, "name": name, **row})
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(results["rows"][-1]), flush=True)


def table(results: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    titles = ["", "parameters", "KL, fresh C4", "KL, WikiText-2", "C4 ×", "WikiText-2 ×", "seconds"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in results["rows"]:
        name = PEERS.get(row["name"], f"`prune --preset {row['name']}`")
        if "error" in row:
            lines.append([f"{name}, {row['size']}: {row['error']}", *[""] * (len(titles) - 1)])
            continue
        texts = [row["texts"][text] for text in ("c4", "wikitext2")]
        lines.append(
            [
                name,
                f"{row['parameters'] / 1e6:.2f}M",
                *(f"{one['kl']:.3f} ± {one['kl_stderr']:.3f}" for one in texts),
                *(f"{one['ratio_to_dense']:.3f}" for one in texts),
                f"{row['seconds']:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
