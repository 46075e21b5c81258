"""Tokens per second of recovery beside a plain Trainer with PEFT on the same rows.

    python benchmarks/recovery_speed.py --data alpaca.jsonl

Trains LoRA (rank 8, all linear layers but the embedding) on a pruned SmolLM2-135M with steps of 16
samples: ``llm-pruner recover``, and the script that its users would write (Trainer, PEFT, padding
to the longest of a batch). Both train on the same rows in turns, each in a process of its own;
padding does not count as tokens. Writes benchmarks/results/recovery_speed.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results"
BATCH, SEQ_LEN = 16, 512


def plain(model: str, data: Path) -> dict[str, float]:
    """Train one epoch as a script of Trainer and PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from llm_pruner.models.load import load_model

    loaded = load_model(model)
    tokenizer: Any = loaded.tokenizer
    rows = []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": record["output"]},
        ]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        rows.append({"input_ids": ids[:SEQ_LEN], "labels": ids[:SEQ_LEN]})
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(loaded.model, config),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=1e-3,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=None),
        )
        seconds = trainer.train().metrics["train_runtime"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"tokens": tokens, "seconds": seconds, "threads": torch.get_num_threads()}


def ours(model: str, data: Path) -> dict[str, float]:
    """Train one epoch with ``llm-pruner recover``, one example held out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "llm_pruner", "recover", model, "--out", str(out)]
        options = ["--data", data, "--batch-size", BATCH, "--seq-len", SEQ_LEN]
        options += ["--held-out", 1, "--evaluations", 1]
        subprocess.run([*command, *map(str, options)], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((out / "recovery.json").read_text())
    return {"tokens": found["tokens"], "seconds": found["seconds"]}


def in_a_process(model: str, data: Path) -> dict[str, float]:
    """Run ``plain`` in a process of its own."""
    command = [sys.executable, __file__, "--plain", "--model", model, "--data", str(data)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="default", help="the pruned model")
    parser.add_argument("--rows", type=int, default=193)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_speed.json")
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.model, options.data)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = options.data.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[: options.rows]))
        for number in range(options.repeats):
            for name in ("ours", "plain")[:: 1 if number % 2 == 0 else -1]:
                result = (ours if name == "ours" else in_a_process)(options.model, rows)
                found[name].append(result)
                print(name, json.dumps(result), flush=True)
    rates = {
        name: median(result["tokens"] / result["seconds"] for result in results)
        for name, results in found.items()
    }
    ratios = [
        (mine["tokens"] / mine["seconds"]) / (theirs["tokens"] / theirs["seconds"])
        for mine, theirs in zip(found["ours"], found["plain"], strict=True)
    ]
    result = {
        "settings": {
            "model": Path(options.model).name,
            "data": options.data.name,
            "rows": options.rows,
            "batch": BATCH,
            "seq_len": SEQ_LEN,
            "machine": machine(),
        },
        "runs": found,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {"median": round(median(ratios), 3), "all": [round(r, 3) for r in ratios]},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tokens_per_second"]), json.dumps(result["ratio"]))


if __name__ == "__main__":
    main()
