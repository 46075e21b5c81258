"""Time and peak memory of ``llm-pruner inspect`` on large shapes, from their configs alone.

    python benchmarks/inspect_scale.py

Each model is inspected in a process of its own, without weights; the time includes the start of
Python. Writes benchmarks/results/inspect_scale.json, where rows of other models stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from commands import keep, put, results_in
from machine import here

RESULTS = Path(__file__).parent / "results"

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3.1-70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
    },
}


def inspect(name: str) -> dict[str, Any]:
    """Inspect one shape; return counts, wall and processor seconds, and peak resident bytes."""
    with tempfile.TemporaryDirectory() as folder:
        config, result = Path(folder) / f"{name}.json", Path(folder) / "groups.json"
        config.write_text(json.dumps(CONFIGS[name]))
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_pruner", "inspect", config, "--json", result],
            stdout=subprocess.DEVNULL,
        )
        # Unlike getrusage, wait4 tells the peak of this one process.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"inspecting {name} failed")
        found = json.loads(result.read_text())
    return {
        "model": name,
        "parameters": found["parameters"],
        "groups": dict(Counter(group["kind"] for group in found["groups"])),
        "frozen_groups": sum(group["frozen"] is not None for group in found["groups"]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        **here(),
    }


def main() -> None:
    """Measure every shape and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "inspect_scale.json")
    parser.add_argument("models", nargs="*", help=", ".join(CONFIGS))
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in CONFIGS]
    if unknown:
        parser.error(f"{unknown[0]} is unknown; choose from {', '.join(CONFIGS)}")
    results = results_in(options.out, {"dtype": "float32"}, parser, rows=[])
    for name in options.models or CONFIGS:
        row = inspect(name)
        put(results["rows"], row, "model")
        keep(options.out, results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
