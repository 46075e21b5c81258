"""What quantizing costs and saves, of the dense model and of pruned ones.

    python benchmarks/quantize.py --work FOLDER --calibration FILE --text FILE
        [--compressor COMPRESSOR/bin/python]

Prunes MODEL by a fifth, once to layers of different sizes and once to equal ones, packs all three
in int8 by torchao, and has ``evaluate`` measure perplexity and KL divergence from
the dense model. Says of each packed folder whether transformers alone computes the same
logits as the model that was packed, to the last bit. Needs torchao.

With ``--compressor``, an environment that has llm-compressor quantizes instead, in the schemes W8A8
and W4A16, the dense model and one whose layers have different multiples of 64. Needs
compressed-tensors, to load what is written.

Folders that are there are not made again, and rows not measured again. Writes
benchmarks/results/quantize.json, in each row the versions that it was measured with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import apart, found_by, keep, llm_pruner, results_in, save_dense, stamp
from machine import machine

RESULTS = Path(__file__).parent / "results"
PRUNED: dict[str, tuple[str, ...]] = {
    "dense": (),
    "unequal": ("--preset", "fast"),
    "equal": ("--preset", "fast", "--uniform"),
    "unequal-64": ("--preset", "fast", "--round-to", "marlin"),
}
SCHEMES = {"w8a8": ("--scheme", "W8A8"), "w4a16": ("--scheme", "W4A16", "--group", "64")}
"""Ways of llm-compressor. The hidden size, 576, is no multiple of the usual group of 128."""

BY_TORCHAO, BY_COMPRESSOR = ("dense", "unequal", "equal"), ("dense", "unequal-64")
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
    parser.add_argument("--compressor", type=Path, help="Python with llm-compressor")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.json")
    options = parser.parse_args()
    settings = {
        "model": options.model,
        "saved in": options.dtype,
        "computed in": "float32",
        "prune": {name: f"--ratio 0.2 {' '.join(how)}" for name, how in PRUNED.items() if how},
        "calibration": Path(options.calibration).name,
        "text": f"{Path(options.text).name}, first {TOKENS} tokens",
    }
    results = results_in(options.out, settings, parser, rows={})
    rows: dict[str, Any] = results["rows"]
    options.work /= stamp(options.model, options.dtype, options.calibration)
    options.work.mkdir(parents=True, exist_ok=True)
    packages = filter(find_spec, ("torch", "transformers", "torchao"))
    here = {"machine": machine(), "versions": {name: version(name) for name in packages}}

    def measured(folder: Path, **more: Any) -> None:
        if folder.name not in rows:
            found = _measured(folder, options.work / "dense", options.text)
            rows[folder.name] = {**found, **more, **here}
            keep(options.out, results)
        print(folder.name, json.dumps(rows[folder.name]), flush=True)

    for name in BY_COMPRESSOR if options.compressor else BY_TORCHAO:
        folder = _pruned(name, options)
        measured(folder)
        if options.compressor is None:
            packed = options.work / f"{name}-int8"
            if packed.name not in rows:
                same = apart(_pack, folder, packed)
                measured(packed, same_logits_with_transformers_alone=same)
            continue
        for scheme, how in SCHEMES.items():
            packed = options.work / f"{name}-{scheme}"
            if packed.name not in rows:
                said = _compress(options.compressor, folder, packed, how, options.calibration)
                measured(packed, **{"llm-compressor": said.pop("versions")}, **said)


def _pruned(name: str, options: argparse.Namespace) -> Path:
    """Return the folder of a model, which is made if it is not there."""
    dense, folder = options.work / "dense", options.work / name
    if not dense.is_dir():
        save_dense(options.model, dense, options.dtype)
    if not folder.is_dir():
        text = ("--calibration", options.calibration)
        llm_pruner("prune", dense, "--out", folder, "--ratio", 0.2, *PRUNED[name], *text)
    return folder


def _compress(python: Path, folder: Path, out: Path, how: Sequence[str], data: str) -> Any:
    """Quantize a folder with llm-compressor; return what its script says."""
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name("llm_compressor.py")
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, script, folder, out, *how, "--data", data]
    ran = subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _pack(folder: Path, out: Path) -> bool:
    """Pack a folder; return whether transformers without this package computes the same."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    weights = shutil.ignore_patterns("*.safetensors*", ".written-by-llm-pruner")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=weights)
    how = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype="auto")
    model.save_pretrained(out)
    with torch.no_grad():
        wanted = model(torch.arange(100, 164)[None]).logits
    file = out.with_suffix(".pt")
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", ALONE, out, file], check=True, env=environment)
    return bool(torch.equal(torch.load(file, weights_only=True), wanted))


def _measured(folder: Path, dense: Path, text: str) -> dict[str, Any]:
    against = () if folder == dense else ("--against", dense)
    how = ("--perplexity", text, "--set", f"max_tokens={TOKENS}", "--set", "seq_len=1024")
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
