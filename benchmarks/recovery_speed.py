"""Tokens per second of recovery, beside plain scripts and with each part switched off.

    python benchmarks/recovery_speed.py --data alpaca.jsonl --model best-113.3M

All rows train LoRA (rank 8, all linear layers but the embedding) on the same file of samples, 16 in
a step, for ``--seconds``, at a rate that rises over a tenth of the time, to 1e-3, and falls to zero
along a cosine; each in a process of its own with the same threads:

- ``script``: Trainer and PEFT as users write it, which pads to the longest of a batch, groups
  samples of like length, or lays each batch end to end in one row (DataCollatorWithFlattening); in
  float32, and in the precision of ours (``bf16=True``, autocast);
- ``recover``: as the command comes, without packing, and with each of its kernels off.

Padding does not count as tokens. The loss is that of 64 samples that no row trains on. Every row is
measured ``--repeats`` times in turns; each run is added to the file when it ends, and what is there
is not measured again. Writes benchmarks/results/recovery_speed.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from commands import keep, results_in
from llm_pruner import __version__
from machine import commits, machine

RESULTS = Path(__file__).parent / "results"
BATCH, SEQ_LEN, HELD_OUT, RATE = 16, 512, 64, 1e-3
KERNELS = ("attention", "loss")
LAYOUTS = ("padding", "group_by_length", "packing")
ROWS = (
    *(f"script, {layout}, {kind}" for layout in LAYOUTS for kind in ("float32", "autocast")),
    "recover",
    "recover without packing",
    *(f"recover without {name}" for name in KERNELS),
)


def encoded(lines: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each record as a chat."""
    found = []
    for line in lines:
        record = json.loads(line)
        question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": record["output"]},
        ]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        found.append(ids[:SEQ_LEN])
    return found


def held_out_loss(network: Any, rows: list[list[int]]) -> float:
    """Return the mean negative log-likelihood of tokens, in nats."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for ids in rows:
            given = torch.tensor([ids])
            total += float(network(input_ids=given, labels=given).loss) * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


def script(row: str, model: str, data: Path, held: Path, seconds: float) -> dict[str, float]:
    """Train as a script of Trainer and PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    import llm_pruner as lp

    loaded = lp.load(model)
    ids = encoded(data.read_text().splitlines(), loaded.tokenizer)
    rows = [{"input_ids": one, "labels": one, "length": len(one)} for one in ids]
    seen = {"tokens": 0}
    tokens_of_step: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic()

        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            done = min(1.0, (time.monotonic() - self.start) / seconds)
            share = done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2
            for group in optimizer.param_groups:
                group["lr"] = RATE * share

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            seen["tokens"] = sum(tokens_of_step[: state.global_step])
            seen["steps"] = state.global_step
            control.should_training_stop = time.monotonic() >= self.start + seconds

    def collate(batch: list[dict[str, Any]]) -> Any:
        tokens_of_step.append(sum(one["length"] for one in batch))
        plain = [{name: one[name] for name in ("input_ids", "labels")} for one in batch]
        if "packing" in row:
            return DataCollatorWithFlattening()(plain)
        return DataCollatorForSeq2Seq(loaded.tokenizer)(plain)

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(loaded.network, config),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=100,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16="autocast" in row,
                disable_tqdm=True,
                remove_unused_columns=False,
                train_sampling_strategy="group_by_length" if "group" in row else "random",
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[Clock()],
        )
        started = time.monotonic()
        trainer.train()
        took = time.monotonic() - started
    loss = held_out_loss(
        trainer.model.eval(), encoded(held.read_text().splitlines(), loaded.tokenizer)
    )
    return {**seen, "seconds": took, "loss": loss, "threads": torch.get_num_threads()}


def ours(row: str, model: str, data: Path, held: Path, seconds: float) -> dict[str, float]:
    """Train with ``llm-pruner recover``, one example held out and scored once."""
    import torch

    import llm_pruner as lp

    off = row.removeprefix("recover without ")
    settings = {
        "packing": off != "packing",
        "kernels": [name for name in KERNELS if name != off],
        "learning_rate": RATE,
        "batch_size": BATCH,
        "seq_len": SEQ_LEN,
        "held_out": 1,
        "evaluations": 1,
        "max_minutes": seconds / 60,
        "epochs": 100,
    }
    with tempfile.TemporaryDirectory() as folder:
        out, config = Path(folder) / "out", Path(folder) / "run.yaml"
        config.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "llm_pruner", "recover", model, "--out", str(out)]
        subprocess.run(
            [*command, "--data", str(data), "--config", str(config)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads((out / "recovery.json").read_text())
        loaded = lp.load(str(out))
    loss = held_out_loss(
        loaded.network.eval(), encoded(held.read_text().splitlines(), loaded.tokenizer)
    )
    kept = {name: found[name] for name in ("tokens", "steps", "seconds")}
    return {**kept, "loss": loss, "threads": torch.get_num_threads()}


def in_a_process(options: argparse.Namespace, row: str, data: Path, held: Path) -> Any:
    """Measure a row in a process of its own."""
    command = [sys.executable, __file__, "--row", row, "--model", options.model]
    command += ["--data", str(data), "--held", str(held), "--seconds", str(options.seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="default", help="the pruned model")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", default=";".join(ROWS), help="some of them, with semicolons")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_speed.json")
    options = parser.parse_args()
    if options.row:
        measure = script if options.row.startswith("script") else ours
        given = (options.row, options.model, options.data, options.held, options.seconds)
        print(json.dumps(measure(*given)))
        return
    settings = {
        "model": Path(options.model).name,
        "data": options.data.name,
        "samples": options.samples,
        "held_out": HELD_OUT,
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "seconds": options.seconds,
        "machine": machine(),
        "llm_pruner": __version__,
        "commit": commits()[1],
    }
    result = results_in(options.out, settings, parser, runs={})
    with tempfile.TemporaryDirectory() as folder:
        data, held = Path(folder) / "rows.jsonl", Path(folder) / "held.jsonl"
        lines = options.data.read_text().splitlines(keepends=True)
        held.write_text("".join(lines[:HELD_OUT]))
        data.write_text("".join(lines[HELD_OUT : HELD_OUT + options.samples]))
        for number in range(options.repeats):
            for row in options.rows.split(";")[:: 1 if number % 2 == 0 else -1]:
                runs = result["runs"].setdefault(row, [])
                if len(runs) <= number:
                    runs.append(in_a_process(options, row, data, held))
                    print(row, json.dumps(runs[-1]), flush=True)
                    result["rows"] = summary(result["runs"])
                    keep(options.out, result)


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return tokens per second, beside those of ``recover``, and the loss; medians of the runs."""
    rates = {
        row: median(one["tokens"] / one["seconds"] for one in each) for row, each in runs.items()
    }
    whole = rates.get("recover")
    return {
        row: {
            "tokens_per_second": round(rate, 1),
            "recover_is_faster_by": None if whole is None else round(whole / rate, 3),
            "loss": round(median(one["loss"] for one in runs[row]), 4),
        }
        for row, rate in rates.items()
    }


if __name__ == "__main__":
    main()
