"""What a pruned model loses by being saved in bfloat16, as its dense model was.

    python benchmarks/kept_type.py --calibration FILE --text FILE

Saves MODEL in bfloat16 and prunes the folder by a fifth twice, with ``--dtype auto``, which keeps
the type, and with ``--dtype float32``; both compute in float32, and both results are measured in
it. Writes the bytes of the folders and of the weights in them, and perplexity in windows of 1,024
tokens on the first ``--max-tokens``, to benchmarks/results/kept_type.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import found_by, keep, save_dense
from corpora import TOKENS, WINDOW
from llm_pruner.files.disk import folder_bytes
from machine import here

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Save, prune twice, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--preset", help="as for llm-pruner prune", default="best")
    parser.add_argument("--max-tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, default=RESULTS / "kept_type.json")
    options = parser.parse_args()
    prune = ("--ratio", 0.2, "--preset", options.preset, "--repair-minutes", 0, "--seed", 0)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {each: Path(name) / each for each in ("dense", "auto", "float32")}
        save_dense(options.model, folders["dense"], "bfloat16")
        for kind, folder in folders.items():
            found[kind] = {}
            if kind != "dense":
                text = ("--calibration", options.calibration, "--dtype", kind)
                done = found_by("prune", folders["dense"], "--out", folder, *prune, *text)
                found[kind] = {key: done[key] for key in ("parameters_after", "seconds")}
            how = ("--set", f"seq_len={WINDOW}", "--set", f"max_tokens={options.max_tokens}")
            measured = found_by("evaluate", folder, "--perplexity", options.text, *how)
            found[kind] |= {
                "folder_bytes": folder_bytes(folder),
                "weights_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                "perplexity": measured["perplexity"][0]["perplexity"],
            }
            print(kind, json.dumps(found[kind]), flush=True)
    result = {
        "settings": {
            "model": options.model,
            "stored": "bfloat16",
            "prune": " ".join(map(str, prune)),
            "calibration": Path(options.calibration).name,
            "text": f"{Path(options.text).name}, first {options.max_tokens} tokens",
            **here(),
        },
        **found,
        "weights_of_dense": {
            kind: round(found[kind]["weights_bytes"] / found["dense"]["weights_bytes"], 4)
            for kind in ("auto", "float32")
        },
        "relative_difference_of_perplexity": (
            found["auto"]["perplexity"] / found["float32"]["perplexity"] - 1
        ),
    }
    keep(options.out, result)
    print(result["relative_difference_of_perplexity"])


if __name__ == "__main__":
    main()
