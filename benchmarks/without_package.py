"""Load pruned folders without this package, with the oldest and the newest transformers.

    python benchmarks/without_package.py --work DIR [--transformers 5.5.4,5.24.0]

SmolLM2 (the default model) is pruned in five ways, and tiny random models of other families so that
their layers differ. For each release of transformers there is an environment with torch,
transformers and what these install, and nothing else. In each, every folder is loaded with
``trust_remote_code=True``: logits of five prompts and 32 greedy tokens of each are compared with
those of the model that this package loads here, and so is what ``save_pretrained`` writes from it.
Writes benchmarks/results/without_package.json, where other rows stay. What DIR holds is not made
again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from commands import found_in, keep
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.surgery.cut import cut_
from machine import here

RESULTS = Path(__file__).parent / "results"
OLDEST = "5.5.4"

WAYS: dict[str, tuple[object, ...]] = {
    "SmolLM2 unequal FFN": ("--structures", "ffn", "--ratio", 0.15, "--set", "scope=global"),
    "SmolLM2 unequal KV heads": ("--structures", "heads", "--ratio", 0.05, "--set", "scope=global"),
    "SmolLM2 all unequal, layers dropped": (
        *("--structures", "heads,query_heads,ffn,layers", "--ratio", 0.2, "--set", "scope=global"),
        *("--set", "split=heads=0.2,query_heads=0.1,ffn=0.4,layers=0.3"),
    ),
    "SmolLM2 equal": ("--structures", "heads,ffn", "--ratio", 0.2, "--uniform"),
    "SmolLM2 26 of 30 layers": ("--structures", "layers", "--params", "120.4M"),
}
"""Ways in which SmolLM2 is pruned."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {},
    "qwen2": {},
    "olmo2": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
FAMILIES["llama, even"] = {}
GONE = {"heads": {0: 1, 2: 2}, "ffn": {1: 16, 3: 40}, "experts": {1: 1, 2: 2}}
"""Kind of a group -> layer -> units that go; where two processes share a model, all are even."""

CHECK = """
import json, sys
from importlib.util import find_spec
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
folder, reference, again = sys.argv[1:4]
assert (find_spec("llm_pruner") is None) == bool(again)
def results(where):
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=again != "")
    model.generation_config.eos_token_id = None
    found, generator = {}, torch.Generator().manual_seed(0)
    for number, length in enumerate((5, 9, 12, 17, 30)):
        rows = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(4, rows, (1, length), generator=generator)
        with torch.no_grad():
            found[f"logits.{number}"] = model(ids).logits
            found[f"tokens.{number}"] = model.generate(ids, max_new_tokens=32, do_sample=False)
    return model, found
model, found = results(folder)
if not again:
    save_file(found, reference)
    sys.exit()
wanted = load_file(reference)
model.save_pretrained(again)
second = results(again)[1]
def same(one, what):
    return all(torch.equal(one[name], wanted[name]) for name in wanted if name.startswith(what))
print(json.dumps({
    "class": type(model).__name__,
    "logits_equal": same(found, "logits"),
    "largest_difference": max((found[n] - wanted[n]).abs().max().item() for n in wanted),
    "generate_equal": same(found, "tokens"),
    "saved_again_equal": same(second, ""),
}))
"""


def main() -> None:
    """Make what is missing, check, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--transformers", default=f"{OLDEST},{transformers.__version__}")
    parser.add_argument("--only", help="names of folders, parted by semicolons; default: all")
    options = parser.parse_args()
    work = options.work.resolve()
    kept = work / "rows.json"
    rows = found_in(kept, {})
    for folder in folders(work, options.only):
        for release in options.transformers.split(","):
            name = f"{folder.name}, transformers {release}"
            if name not in rows:
                rows[name] = {**check(folder, environment(work, release)), **here()}
                keep(kept, rows)
            print(name, rows[name], flush=True)
    results = found_in(RESULTS / "without_package.json", {"rows": {}})
    results["rows"] |= rows
    keep(RESULTS / "without_package.json", results)


def folders(work: Path, only: str | None = None) -> Iterator[Path]:
    """Yield a pruned folder for each way and each family, with its reference beside it.

    Args:
        only: the names of some, parted by semicolons.
    """
    for name in [*WAYS, *FAMILIES] if only is None else only.split(";"):
        out = work / name
        if name in FAMILIES and not out.exists():
            prune_family(name, out)
        elif not out.exists():
            whole = ("--set", "protect_first=0", "--set", "protect_last=0")
            common = ("--out", out, "--preset", "paper", "--criterion", "l2", *whole)
            llm_pruner("prune", "default", *common, *WAYS[name])
        yield referred(out)


def llm_pruner(*arguments: object) -> None:
    """Run the command."""
    subprocess.run([sys.executable, "-m", "llm_pruner", *map(str, arguments)], check=True)


def prune_family(family: str, out: Path) -> None:
    """Save a tiny random model whose layers differ."""
    torch.manual_seed(0)
    kind, _, even = family.partition(", ")
    gone = GONE | {"heads": {0: 2, 2: 2}} if even else GONE
    config = AutoConfig.for_model(kind, **(SIZES | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter) + (parameter.ndim == 1))
    dense, discovery = copy.deepcopy(model.config), discover(model)
    removal = {
        group.name: np.arange(min(gone[group.kind][group.layer], group.size // 2))
        for group in discovery.groups
        if not group.frozen and group.layer in gone.get(group.kind, ())
    }
    edits = cut_(model, discovery, removal)
    saved = save_checkpoint(model, out, edits=edits, dense_config=dense)
    assert saved.kind == "remote_code", saved


def referred(folder: Path) -> Path:
    """Write what the model gives that this package loads; return the folder."""
    reference = folder.parent / f"{folder.name}.safetensors"
    if not reference.exists():
        code = f"import llm_pruner\n{CHECK}"
        subprocess.run([sys.executable, "-c", code, folder, reference, ""], check=True)
    return folder


def environment(work: Path, release: str) -> Path:
    """Return the Python of an environment with torch and a release of transformers."""
    place = work / f"transformers-{release}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        wanted = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={release}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (place / "complete").touch()
    return python


def check(folder: Path, python: Path) -> dict[str, Any]:
    """Return what a Python without this package makes of a folder."""
    again = folder.parent / "again"
    reference = folder.parent / f"{folder.name}.safetensors"
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    apart = {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    try:
        ran = subprocess.run(
            [python, "-c", CHECK, folder, reference, again],
            env=inherited | apart,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(again, ignore_errors=True)
        shutil.rmtree(folder.parent / "modules", ignore_errors=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
