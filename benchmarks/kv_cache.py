"""When ``prune --kv-cache`` pays: long prompts in large batches, beside FFN channels alone.

    python benchmarks/kv_cache.py --calibration FILE --text FILE

Prunes SmolLM2-135M by a third of its key-value cache, and once more by FFN channels alone to the
same number of parameters. The two are timed in turns by ``llm-pruner bench`` at batch 8 behind a
prompt of 512 tokens, and perplexity is measured in windows of 1,024 tokens on the first
``--max-tokens``. Writes benchmarks/results/kv_cache.json. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import found_by, keep
from corpora import WINDOW
from machine import here

RESULTS = Path(__file__).parent / "results"
CACHE, BATCH, PROMPT = 0.34, 8, 512
FIGURES = ("parameters", "kv_cache_bytes_per_token", "bytes_read_per_token")


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of one model."""
    speed = found["speed"][0]
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return {name: found[name] for name in FIGURES} | {
        **{name: round(speed[name], 1) for name in rates},
        "decode_peak_bytes": found["memory"][0]["decode"],
    }


def main() -> None:
    """Prune, time, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_cache.json")
    options = parser.parse_args()
    how = ("--preset", options.preset, "--calibration", options.calibration)
    timed = ("--batch-size", BATCH, "--prompt-tokens", PROMPT, "--new-tokens", options.new_tokens)
    timed = (*timed, "--repeats", options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        heads, ffn = Path(folder) / "heads", Path(folder) / "ffn"
        first = found_by("prune", options.model, "--out", heads, "--kv-cache", CACHE, *how)
        same = ("--params", first["parameters_after"], "--structures", "ffn")
        found_by("prune", options.model, "--out", ffn, *same, *how)
        both = found_by("bench", heads, "--against", ffn, *timed)
        counts = found_by("bench", options.model, "--counts-only")["model"]
        rows = {
            "dense": {name: counts[name] for name in FIGURES},
            "kv-cache": figures(both["model"]),
            "ffn": figures(both["against"]),
        }
        for name, model in (("dense", options.model), ("kv-cache", heads), ("ffn", ffn)):
            read = ("--set", f"seq_len={WINDOW}", "--set", f"max_tokens={options.max_tokens}")
            found = found_by("evaluate", model, "--perplexity", options.text, *read)
            rows[name]["perplexity"] = round(found["perplexity"][0]["perplexity"], 3)
            print(name, json.dumps(rows[name]), flush=True)
    compared = both["comparison"][0]
    result = {
        "settings": {
            "model": options.model,
            "kv_cache": CACHE,
            "preset": options.preset,
            "calibration": Path(options.calibration).name,
            "text": f"{Path(options.text).name}, first {options.max_tokens} tokens",
            **both["settings"],
            **here(),
        },
        "rows": rows,
        "kv-cache over ffn": {name: compared[name] for name in ("prefill", "decode")},
    }
    keep(options.out, result)
    print(json.dumps(result["kv-cache over ffn"]))


if __name__ == "__main__":
    main()
