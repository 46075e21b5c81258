"""What else a repair could be: ways to train a pruned model for as many steps, by what they leave.

    python benchmarks/repair_trials.py DENSE PRUNED --train FILE [--train FILE] --text FILE
        [--text FILE] [--only NAMES] [--steps N] --out FILE

A plain loop: KL(dense || pruned) at every token (or the text's own next token), all weights but the
embeddings or adapters, 4 x 512 tokens a step, the same ones for every way, rates that rise for
three steps and fall linearly to a tenth. Written are KL and perplexity as a multiple of the dense
model's on the first tokens of each ``--text``, before and after. What is in OUT is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from machine import machine

WINDOW, ROWS = 512, 4
BETAS = (0.9, 0.95)
WAYS: dict[str, dict[str, Any]] = {
    "AdamW, 2e-4": {"rate": 2e-4},
    "AdamW, 1e-4": {"rate": 1e-4},
    "AdamW, 4e-4": {"rate": 4e-4},
    "AdamW in the gradients' eigenbasis (SOAP), 2e-4": {"rate": 2e-4, "rotated": True},
    "adapters of rank 16, 1e-3": {"rate": 1e-3, "rank": 16},
    "the text's next token in place of the dense model, 2e-4": {"rate": 2e-4, "taught": False},
}


def windows(tokenizer: Any, file: str, most: int | None = None) -> torch.Tensor:
    """Return whole windows of a text, (windows, WINDOW)."""
    text = Path(file).read_text(encoding="utf-8")
    if file.endswith(".jsonl"):
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    ids = tokenizer(text if most is None else text[: 8 * most], verbose=False)["input_ids"][:most]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return float32, (rows, WINDOW, vocabulary)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    found: torch.Tensor = logits.float().log_softmax(-1)
    return found


@torch.no_grad()
def measured(dense: Any, model: Any, texts: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return KL and ratio of perplexities for each text."""
    found = {}
    for name, rows in texts.items():
        kl = rise = 0.0
        for ids in rows.split(ROWS):
            before, after = (log_probabilities(one, ids)[:, :-1] for one in (dense, model))
            kl += float((before.exp() * (before - after)).sum())
            rise += float((before - after).gather(-1, ids[:, 1:, None]).sum())
        count = rows[:, 1:].numel()
        found[name] = [round(kl / count, 4), round(math.exp(rise / count), 4)]
    return found


class Rotated:
    """AdamW's step in the eigenbasis of a matrix's gradients on its shorter side (2409.11321)."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.weights, self.time = weights, 0
        self.states: list[dict[str, torch.Tensor]] = [{} for _ in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step; the basis is found anew at powers of two."""
        self.time += 1
        for weight, state in zip(self.weights, self.states, strict=True):
            assert weight.grad is not None
            gradient, turned = weight.grad, weight.ndim == 2 and weight.shape[0] > weight.shape[1]
            gradient = gradient.T if turned else gradient
            if weight.ndim == 2:
                gradient = self._basis(state, gradient).T @ gradient
            first = state.setdefault("first", torch.zeros_like(gradient))
            second = state.setdefault("second", torch.zeros_like(gradient))
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square(), 1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** self.time)).sqrt_().add_(1e-10)
            step = first / (1 - BETAS[0] ** self.time) / scale
            step = state["basis"] @ step if weight.ndim == 2 else step
            weight -= rate * (step.T if turned else step)

    def _basis(self, state: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
        square = gradient @ gradient.T
        kept = state.setdefault("square", square)
        kept.lerp_(square, 1 - BETAS[1])
        if self.time & (self.time - 1) == 0:
            _, basis = torch.linalg.eigh(kept)
            if "basis" in state:
                change = basis.T @ state["basis"]
                state["first"], state["second"] = (
                    change @ state["first"],
                    change.square() @ state["second"],
                )
            state["basis"] = basis
        return state["basis"]


def stepper(way: dict[str, Any], weights: list[torch.Tensor]) -> Callable[[float], None]:
    """Return what takes a step at a rate."""
    if way.get("rotated"):
        return Rotated(weights).step
    adam = torch.optim.AdamW(weights, lr=0.0, betas=BETAS, weight_decay=0.0)

    def step(rate: float) -> None:
        adam.param_groups[0]["lr"] = rate
        adam.step()

    return step


def trained(way: dict[str, Any], dense: Any, pruned: str, rows: torch.Tensor, steps: int) -> Any:
    """Return the pruned model after so many steps."""
    model: Any = loaded(pruned)
    apart = {id(one) for one in model.get_input_embeddings().parameters()}
    apart |= {id(one) for one in model.get_output_embeddings().parameters()}
    if "rank" in way:
        rank = way["rank"]
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        )
    else:
        for one in model.parameters():
            one.requires_grad_(id(one) not in apart)
    weights = [one for one in model.parameters() if one.requires_grad]
    step = stepper(way, weights)
    for number in range(steps):
        ids = rows[torch.arange(number * ROWS, (number + 1) * ROWS) % len(rows)]
        if way.get("taught", True):
            with torch.no_grad():
                target = log_probabilities(dense, ids)
            own = log_probabilities(model, ids)
            loss = (target.exp() * (target - own)).sum() / ids.numel()
        else:
            own = log_probabilities(model, ids)
            loss = cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        step(way["rate"] * min(1, (number + 1) / 3) * (1 - 0.9 * number / steps))
        for one in weights:
            one.grad = None
    return model


def loaded(folder: str) -> Any:
    """Return a model in float32; the code in a pruned folder is that of ``llm_pruner``."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--train", action="append", required=True)
    parser.add_argument("--text", action="append", required=True, help="to judge by")
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", help="names of ways, semicolon-separated")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    dense = loaded(options.dense).requires_grad_(False)
    texts = {Path(one).stem: windows(tokenizer, one, options.max_tokens) for one in options.text}
    rows = torch.cat([windows(tokenizer, one) for one in options.train])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    names = ("train", "text")
    settings = {name: [Path(one).name for one in getattr(options, name)] for name in names}
    settings |= {"steps": options.steps, "tokens": options.max_tokens}
    results: dict[str, Any] = {"settings": settings, "rows": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            parser.error(f"{options.out} holds rows of other settings; give another --out")
    if "before" not in results:
        results["before"] = measured(dense, loaded(options.pruned), texts)
    for name in options.only.split(";") if options.only else WAYS:
        if name in results["rows"]:
            continue
        torch.manual_seed(0)
        begin = time.perf_counter()
        model = trained(WAYS[name], dense, options.pruned, rows, options.steps)
        seconds = time.perf_counter() - begin
        row = {"seconds": round(seconds), "after": measured(dense, model.eval(), texts)}
        results["rows"][name] = row | {"machine": machine()}
        results["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
