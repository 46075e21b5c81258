"""Equal against unequal numbers of experts, on a small mixture of experts that is trained here.

    python benchmarks/experts.py --train FILE --text FILE

Trains a Mixtral of 4 layers with 16 experts each on the bytes of FILE for some minutes, removes a
quarter and a half of all parameters, of experts alone: the same number in each layer, or by one
ranking over all layers. Writes KL divergence from the dense model and perplexity on the other text
to benchmarks/results/experts.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from commands import found_by, keep, llm_pruner
from machine import machine

RESULTS = Path(__file__).parent / "results"
WINDOW = 256
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}
EXPERT = 3 * 192 * 256 + 192
"""Parameters that go with an expert: three matrices, and its row in the router."""
WAYS = {
    "equal": ("--uniform",),
    "unequal, no layer more than twice the average": ("--set", "spread=2"),
    "unequal, no layer more than four times the average": ("--set", "spread=4"),
}


def main() -> None:
    """Train, prune in each way, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--criterion", default="fisher")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "model": SIZES,
        "train": f"{options.train.name}, {options.steps} steps of 8 x {WINDOW} bytes",
        "text": options.text.name,
        "criterion": options.criterion,
        "machine": machine(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as work:
        dense, out = Path(work) / "dense", Path(work) / "pruned"
        result["dense_loss"] = _train(options.train, options.steps, dense)
        size = sum(one.numel() for one in MixtralForCausalLM.from_pretrained(dense).parameters())
        for each in (4, 8):
            left = size - each * SIZES["num_hidden_layers"] * EXPERT
            for way, how in WAYS.items():
                llm_pruner(
                    *("prune", dense, "--out", out, "--overwrite", "--params", left),
                    *("--structures", "experts", "--criterion", options.criterion, *how),
                    *("--set", "protect_first=0", "--set", "protect_last=0", "--round-to", 1),
                    *("--preset", "fast", "--calibration", options.train),
                )
                found = found_by(
                    *("evaluate", out, "--perplexity", options.text, "--against", dense),
                    *("--set", "max_tokens=32768", "--set", f"seq_len={WINDOW}"),
                )
                text = found["perplexity"][0]
                row = {
                    "experts_left": 16 - each,
                    "parameters": left,
                    "way": way,
                    "kl": text["divergence"]["kl"],
                    "kl_stderr": text["divergence"]["kl_stderr"],
                    "perplexity": text["perplexity"],
                    "dense_perplexity": text["divergence"]["perplexity"],
                }
                result["rows"].append(row)
                keep(options.out, result)
                print(json.dumps(row), flush=True)


def _train(file: Path, steps: int, folder: Path) -> float:
    """Train a model on the bytes of a text and save it; return its loss in the last steps."""
    tokenizer = _tokenizer()
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8")[:2_000_000])["input_ids"])
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **SIZES)
    )
    model.config.output_router_logits = True  # and with it the loss that spreads tokens evenly
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        starts = torch.randint(0, len(ids) - WINDOW, (8,))
        rows = torch.stack([ids[start : start + WINDOW] for start in starts])
        found = model(rows, labels=rows)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(
            float(cross_entropy(found.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))
        )
        if step % 100 == 0:
            print(f"step {step}: {losses[-1]:.3f}", file=sys.stderr, flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-50:]) / len(losses[-50:])


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
