"""What int8 weights of torchao cost and save, of the dense model and of pruned ones.

    python benchmarks/quantize.py --work FOLDER --calibration FILE --text FILE

Prunes MODEL by a fifth, once to layers of different sizes and once to equal ones, packs all three
as ``compress --quantize int8`` does, and has ``evaluate`` measure perplexity and KL divergence from
the dense model. Says of each packed folder whether transformers alone computes the same
logits as the model that was packed, to the last bit. Pruned folders that are there are not made
again. Writes benchmarks/results/quantize.json. Needs torchao.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from commands import apart, found_by, llm_pruner, save_dense
from machine import machine

RESULTS = Path(__file__).parent / "results"
PRUNED: dict[str, tuple[str, ...]] = {
    "dense": (),
    "unequal": ("--preset", "fast"),
    "equal": ("--preset", "fast", "--uniform"),
}
TOKENS = 4_096
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("llm_pruner") for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.arange(100, 164)[None]).logits, sys.argv[2])
"""


def main() -> None:
    """Prune, pack, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="bfloat16", help="of the saved weights")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    dense = options.work / "dense"
    for name, how in PRUNED.items():
        folder = options.work / name
        if not folder.is_dir() and not how:
            save_dense(options.model, folder, options.dtype)
        elif not folder.is_dir():
            text = ("--calibration", options.calibration)
            llm_pruner("prune", dense, "--out", folder, "--ratio", 0.2, *how, *text)
        packed = options.work / f"{name}-int8"
        same = apart(_pack, folder, packed)
        for one in (folder, packed):
            rows[one.name] = _measured(one, dense, options.text)
        rows[packed.name]["same_logits_with_transformers_alone"] = same
        print(json.dumps({one.name: rows[one.name] for one in (folder, packed)}), flush=True)
    settings = {
        "model": options.model,
        "saved in": options.dtype,
        "computed in": "float32",
        "prune": {name: f"--ratio 0.2 {' '.join(how)}" for name, how in PRUNED.items() if how},
        "calibration": Path(options.calibration).name,
        "text": f"{Path(options.text).name}, first {TOKENS} tokens",
        "versions": {name: version(name) for name in ("torch", "torchao", "transformers")},
        "machine": machine(),
    }
    options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def _pack(folder: Path, out: Path) -> bool:
    """Pack a folder; return whether transformers without this package computes the same."""
    import torch

    from llm_pruner.checkpoints.packed import save_packed

    shutil.rmtree(out, ignore_errors=True)
    model = save_packed(folder, out, max_shard_size="5GB")
    with torch.no_grad():
        wanted = model(torch.arange(100, 164)[None]).logits
    file = out.with_suffix(".pt")
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", ALONE, out, file], check=True, env=environment)
    return bool(torch.equal(torch.load(file, weights_only=True), wanted))


def _measured(folder: Path, dense: Path, text: str) -> dict[str, Any]:
    against = () if folder == dense else ("--against", dense)
    how = ("--perplexity", text, "--max-tokens", TOKENS, "--seq-len", 1024)
    found = found_by("evaluate", folder, *how, *against)
    (result,) = found["perplexity"]
    far = result["divergence"] or {}
    return {
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "perplexity": result["perplexity"],
        **{name: far.get(name) for name in ("kl", "kl_stderr", "changed")},
    }


if __name__ == "__main__":
    main()
