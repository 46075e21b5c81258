"""Whether scores say what a layer loses that is cut and refitted: the case for a search of budgets.

    python benchmarks/layer_damage.py MODEL --calibration FILES --held-out FILE [--held-out FILE]

A Llama. From one layer at a time, a share of the FFN channels goes, in the order of ``fisher-obs``;
``down_proj`` is fitted by least squares to the dense layer's output. Written are the KL divergence
of the logits from the dense ones on held-out text, in nats a token, and the sum of the scores that
went. Were the quotient of both the same in all layers, a ranking by scores would be what a search
for each layer's budget by that divergence ends with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

import llm_pruner as lp
from llm_pruner.runtime.precision import fast_products, mixed_precision
from machine import machine

RESULTS = Path(__file__).parent / "results"
SAMPLES, HELD_OUT, SEQ_LEN = 33, 3, 512
RIDGE, FIRST = 1e-3, 0.25
"""Of the mean of the Gram matrix's diagonal; weight of a first token, in weights of its sample."""


class Blocks:
    """The blocks of a Llama, run one at a time."""

    def __init__(self, network: Any) -> None:
        self.network, self.layers = network, network.model.layers

    def run(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden state behind a block, (samples, tokens, hidden)."""
        place = torch.arange(hidden.shape[1])[None]
        rotary = self.network.model.rotary_emb(hidden, place)
        with mixed_precision():
            block = self.layers[layer]
            return block(hidden, attention_mask=None, position_embeddings=rotary).float()

    def behind(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Return the hidden states before the first block and behind each."""
        states = [self.network.model.embed_tokens(ids).float()]
        for layer in range(len(self.layers)):
            states.append(self.run(layer, states[-1]))
        return states

    def read(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what ``down_proj`` of a block reads, and the hidden state behind the block."""
        seen: list[torch.Tensor] = []
        down = self.layers[layer].mlp.down_proj
        with down.register_forward_pre_hook(lambda _, args: seen.append(args[0].float())):
            output = self.run(layer, hidden)
        return seen[0], output

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return those of the next token, float32."""
        with mixed_precision():
            logits: torch.Tensor = self.network.lm_head(self.network.model.norm(hidden))
        return logits.float().log_softmax(-1)


def refitted(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the weight of the kept inputs that gives the output of all, by least squares."""
    left = gram[kept][:, kept].double()
    left += torch.eye(len(kept)) * left.diagonal().mean() * RIDGE
    return torch.linalg.solve(left, (weight @ gram[:, kept]).double().T).T.float()


@torch.no_grad()
def damage(blocks: Blocks, scores: Any, text: Any, held: Any, share: float) -> list[dict[str, Any]]:
    """Return for each layer the divergence and the sum of the scores that went."""
    fitted, judged = blocks.behind(text), blocks.behind(held)
    dense, rows = blocks.log_probabilities(judged[-1]), []
    for layer, values in enumerate(scores):
        order = np.argsort(values, kind="stable")
        count = int(share * len(order))
        kept = torch.from_numpy(np.sort(order[count:]))
        inputs, output = blocks.read(layer, fitted[layer])
        importance = 1 / output.square().mean(-1).clamp_min(1e-12)
        importance[:, 0] *= FIRST * SEQ_LEN
        weighted = (inputs * importance.sqrt()[..., None]).flatten(0, 1)
        with fast_products():
            gram = weighted.T @ weighted
        weight = blocks.layers[layer].mlp.down_proj.weight.float()
        inputs, hidden = blocks.read(layer, judged[layer])
        hidden = hidden - inputs @ weight.T + inputs[..., kept] @ refitted(gram, weight, kept).T
        for above in range(layer + 1, len(blocks.layers)):
            hidden = blocks.run(above, hidden)
        found = blocks.log_probabilities(hidden)
        kl = float((dense.exp() * (dense - found)).sum(-1).mean())
        lost = float(values[order[:count]].sum())
        rows.append({"layer": layer, "share": share, "kl": kl, "scores": lost, "ratio": kl / lost})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure all layers, at each share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", action="append", required=True)
    parser.add_argument("--shares", default="0.3,0.67")
    parser.add_argument("--out", type=Path, default=RESULTS / "layer_damage.json")
    options = parser.parse_args()
    model = lp.load(options.model)
    groups = lp.discover(model)
    text = lp.calibration(model, options.calibration, samples=SAMPLES, seq_len=SEQ_LEN)
    parts = [
        lp.calibration(model, file, samples=HELD_OUT, seq_len=SEQ_LEN).input_ids
        for file in options.held_out
    ]
    names = [group.name for group in groups.groups if group.kind == "ffn"]
    scores = lp.score(model, groups, lp.Criterion("fisher-obs"), text, groups=names)
    values = [np.asarray(scores[name]) for name in names]
    blocks = Blocks(model.network)
    rows = [
        row
        for share in options.shares.split(",")
        for row in damage(blocks, values, text.input_ids, torch.cat(parts), float(share))
    ]
    ratios = [row["ratio"] for row in rows]
    result = {
        "settings": {
            "model": Path(options.model).name,
            "calibration": [Path(file).name for file in options.calibration.split(",")],
            "held_out": [Path(file).name for file in options.held_out],
            "tokens": [SAMPLES * SEQ_LEN, len(parts) * HELD_OUT * SEQ_LEN],
            "machine": machine(),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        },
        "ratio": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
