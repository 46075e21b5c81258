"""How much faster a pruned model is, beside the speed-up that its size allows.

    python benchmarks/speed.py [--ratio 0.2 --ratio 0.5]

Prunes SmolLM2-135M with ``--round-to blocks`` and measures it against the dense model with
``llm-pruner bench``. The limit is the ratio of MACs for prefill, and of the bytes that a step reads
for decoding. Writes benchmarks/results/speed.json, where other ratios stay; its rows "compiled" are
of version 0.2, which timed torch.compile as well. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import found_by, keep, put, results_in, save_dense

RESULTS = Path(__file__).parent / "results"


def row(compared: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two rows, prefill and decode, of one batch size."""
    index = found["settings"]["batch_sizes"].index(compared["batch_size"])
    rows = []
    for stage in ("prefill", "decode"):
        speed_up, limit = compared[stage], compared[f"{stage}_limit"]
        rate = f"{stage}_tokens_per_second"
        rows.append(
            {
                "stage": stage,
                "batch_size": compared["batch_size"],
                "dense_tokens_per_second": round(found["against"]["speed"][index][rate], 1),
                "pruned_tokens_per_second": round(found["model"]["speed"][index][rate], 1),
                "speed_up": {key: round(value, 3) for key, value in speed_up.items()},
                "limit": round(limit, 3),
                "share_of_limit": round(speed_up["median"] / limit, 3),
            }
        )
    return rows


def size(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what does not depend on the machine's speed."""
    keys = ("parameters", "bytes_on_disk", "macs", "macs_per_token", "bytes_read_per_token")
    return {key: figures[key] for key in (*keys, "kv_cache_bytes_per_token", "memory")}


def main() -> None:
    """Prune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--ratio", type=float, action="append", help="0.2 and 0.5 if not given")
    parser.add_argument("--preset", default="fast", help="as for llm-pruner prune")
    parser.add_argument("--calibration", default="self", help="as for llm-pruner prune")
    parser.add_argument("--batch-size", default="1,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    options = parser.parse_args()
    timing = ["--batch-size", options.batch_size, "--repeats", options.repeats]
    settings = {"model": options.model, "preset": options.preset}
    results = results_in(options.out, settings, parser, results=[])
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        save_dense(options.model, dense)
        for ratio in options.ratio or (0.2, 0.5):
            small = Path(folder) / f"small-{ratio}"
            estimation = ["--preset", options.preset, "--calibration", options.calibration]
            target = ["--out", small, "--ratio", ratio, "--round-to", "blocks"]
            pruned = found_by("prune", dense, *target, *estimation)
            result = {
                "ratio": ratio,
                "round_to": pruned["round_to"],
                "parameters_removed": round(pruned["ratio"], 4),
            }
            found = found_by("bench", small, "--against", dense, *timing)
            result |= {
                "settings": found["settings"],
                "dense": size(found["against"]),
                "pruned": size(found["model"]),
                "transformers": [line for one in found["comparison"] for line in row(one, found)],
            }
            print(json.dumps({"ratio": ratio, "rows": result["transformers"]}), flush=True)
            put(results["results"], result, "ratio")
            keep(options.out, results)


if __name__ == "__main__":
    main()
