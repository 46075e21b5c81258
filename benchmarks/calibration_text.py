"""What a pruned model keeps by the text that importance is estimated and the refit is made on.

    python benchmarks/calibration_text.py MODEL --work DIR --mixture web=c4.jsonl \\
        --mixture web+chat=c4.jsonl,chat --text web=held.jsonl --text code=human_eval.txt

Prunes MODEL by a fifth with each mixture, as ``prune`` comes, into a folder below ``--work``, and
measures each on every text: perplexity, and KL divergence from the dense model.
Writes benchmarks/results/calibration_text.json; folders and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from commands import found_by, llm_pruner, name_of, results_in, stamp
from machine import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Prune, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mixture", action="append", required=True, metavar="NAME=SOURCES")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="of the measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration_text.json")
    options = parser.parse_args()
    settings = {
        "model": name_of(options.model),
        "texts": {name: Path(file).name for name, file in _pairs(options.text)},
        "tokens": options.max_tokens,
        "window": options.seq_len,
        "dtype": options.dtype,
        "machine": machine(),
    }
    results = results_in(options.out, settings, parser, rows={})
    for name, sources in _pairs(options.mixture):
        if name in results["rows"]:
            continue
        folder = options.work / f"{name}-{stamp(options.model, sources)}"
        if not folder.is_dir():
            llm_pruner(
                *("prune", options.model, "--ratio", 0.2, "--calibration", sources),
                *("--out", folder),
            )
        report = json.loads((folder / "report.json").read_text())
        row: dict[str, Any] = {
            "calibration": ",".join(Path(one).name for one in sources.split(",")),
            "seconds": report["seconds"],
            "texts": {},
        }
        for text, file in _pairs(options.text):
            found = found_by(
                *("evaluate", folder, "--perplexity", file, "--against", options.model),
                *("--max-tokens", options.max_tokens, "--seq-len", options.seq_len),
                *("--dtype", options.dtype),
            )["perplexity"][0]
            far = found["divergence"]
            row["texts"][text] = {
                "perplexity": found["perplexity"],
                "dense": far["perplexity"],
                "kl": far["kl"],
                "kl_stderr": far["kl_stderr"],
            }
        results["rows"][name] = row
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)


def _pairs(given: list[str]) -> list[tuple[str, str]]:
    split = (one.partition("=") for one in given)
    return [(name, value) for name, _, value in split]


if __name__ == "__main__":
    main()
