"""Tokens per second at which a model writes its own text, beside a loop over ``generate``.

    python benchmarks/writing_speed.py

SmolLM2-135M in float32 writes 64 texts of 512 tokens: as ``--data self`` does, and with the
``generate`` of transformers, sampling from the whole distribution, 16 and 64 texts at a time. In
turns, each in a process of its own. Writes benchmarks/results/writing_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from llm_pruner.data.selfmade import write_text
from llm_pruner.sources import load_model

RESULTS = Path(__file__).parent / "results"
TEXTS, LENGTH = 64, 512
WAYS = {"self": None, "generate, 16 at a time": 16, "generate, 64 at a time": 64}


def measure(way: str, texts: int) -> dict[str, float]:
    """Write and return seconds, tokens a second and the most memory that the process held."""
    loaded = load_model("default")
    batch = WAYS[way]
    begin = time.monotonic()
    if batch is None:
        write_text(loaded.model, loaded.tokenizer, samples=texts, seq_len=LENGTH, seed=0)
    else:
        torch.manual_seed(0)
        for first in range(0, texts, batch):
            loaded.model.generate(
                torch.full((min(batch, texts - first), 1), 198),
                attention_mask=torch.ones(min(batch, texts - first), 1, dtype=torch.int64),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=LENGTH,
                max_new_tokens=LENGTH,
                pad_token_id=0,
            )
    seconds = time.monotonic() - begin
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(texts * LENGTH / seconds, 1),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Measure in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "writing_speed.json")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.texts)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--texts", str(options.texts)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
    result = {
        "settings": {
            "model": "SmolLM2-135M-Instruct, float32",
            "texts": options.texts,
            "tokens": LENGTH,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        },
        "runs": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
