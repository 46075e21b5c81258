"""A pruned folder fine-tuned by TRL's SFTTrainer with LoRA adapters of PEFT, in their own code.

    python benchmarks/fine_tune.py FOLDER ... --data FILE.jsonl --work FOLDER

Trains 20 steps on texts of a JSON Lines file (field ``text``), saves the adapter, loads it again,
merges it, saves the merged model and loads that. Says how the loss went, and how far the logits are
from those before each of these. Writes benchmarks/results/fine_tune.json, where other rows stay.
Needs trl. What is merged is then served by

    python benchmarks/serve_vllm.py --work FOLDER --python VLLM/bin/python
        --only 'NAME, fine-tuned'
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from commands import keep, results_in
from machine import machine

RESULTS = Path(__file__).parent / "results"
STEPS = 20


def main() -> None:
    """Train each folder, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "fine_tune.json")
    options = parser.parse_args()
    settings = {"steps": STEPS, "data": Path(options.data).name}
    results = results_in(options.out, settings, parser, rows={})
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    for folder in options.folders:
        found = fine_tuned(folder, options.data, options.work)
        results["rows"][folder.name] = {**found, "versions": versions, "machine": machine()}
        keep(options.out, results)
        print(folder.name, json.dumps(found), flush=True)


def fine_tuned(folder: Path, data: str, out: Path) -> dict[str, Any]:
    """Train, merge, save and reload one folder."""
    work, whole = out / folder.name, out / f"{folder.name}, fine-tuned"
    for one in (work, whole):
        shutil.rmtree(one, ignore_errors=True)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=load_dataset("json", data_files=data, split="train[:200]"),
        peft_config=LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(work / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            max_length=128,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=0,
        ),
    )
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    trainer.save_model(str(work / "adapter"))
    trained = logits(trainer.model)
    adapted = AutoPeftModelForCausalLM.from_pretrained(work / "adapter", trust_remote_code=True)
    adapter = logits(adapted)
    model = adapted.merge_and_unload()
    merged = logits(model)
    model.save_pretrained(whole)
    again = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True)
    return {
        "loss_first_five": sum(losses[:5]) / 5,
        "loss_last_five": sum(losses[-5:]) / 5,
        "adapter_reloaded": distance(adapter, trained),
        "merged": distance(merged, adapter),
        "merged_reloaded": distance(logits(again), merged),
        "class": type(again).__name__,
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed text."""
    model.eval()
    found: torch.Tensor = model(torch.arange(100, 150)[None]).logits.float()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference."""
    return float((one - other).abs().max())


if __name__ == "__main__":
    main()
