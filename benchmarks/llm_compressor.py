"""Quantize a folder with llm-compressor, which knows nothing of this package.

    COMPRESSOR/bin/python benchmarks/llm_compressor.py FOLDER OUT --scheme W4A16 --group 64
        --data FILE.jsonl

Runs in an environment of its own (``pip install llmcompressor``). GPTQ on the first samples of a
JSON Lines file (field ``text``); everything linear but the output. Prints how far the logits of
what was saved and loaded again are from those before, and the versions, as JSON.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH = 16, 512


def main() -> None:
    """Quantize, save, load again and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", required=True, help="such as W8A8 or W4A16")
    parser.add_argument("--group", type=int, help="columns that share a scale; default: 128")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    scheme = preset_name_to_scheme(options.scheme, ["Linear"])
    if options.group:
        scheme.weights.group_size = options.group
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=load_dataset("json", data_files=options.data, split=f"train[:{options.samples}]"),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=LENGTH,
        num_calibration_samples=options.samples,
        trust_remote_code_model=True,
    )
    before = logits(model)
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    again = AutoModelForCausalLM.from_pretrained(options.out, trust_remote_code=True)
    packages = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    found = {
        "reloaded": float((logits(again) - before).abs().max()),
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(found))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed text."""
    found: torch.Tensor = model(torch.arange(100, 164)[None]).logits.float()
    return found


if __name__ == "__main__":
    main()
