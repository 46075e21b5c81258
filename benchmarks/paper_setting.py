"""Every criterion and aggregation in the paper's setting, on one model and one text.

    python benchmarks/paper_setting.py --calibration calib.jsonl --text wikitext2_test.txt

Removes 20% of all parameters of SmolLM2-135M (layers 4 to 26, key-value heads and FFN channels,
local ranking, 10 x 64 calibration tokens) and measures perplexity by the paper's protocol on the
first 8,192 tokens of the text. Writes benchmarks/results/paper_setting.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from llm_pruner import (
    Criterion,
    Selection,
    Target,
    allocate,
    count_parameters,
    discover,
    prune_,
    score,
)
from llm_pruner.data.calibration import build_calibration
from llm_pruner.data.evaluation import load_evaluation_text
from llm_pruner.evaluation.perplexity import EvaluationText, perplexity
from llm_pruner.sources import load_model

RESULTS = Path(__file__).parent / "results"
RATIO, LAYERS, SAMPLES, SEQ_LEN, TOKENS = 0.2, (4, 26), 10, 64, 8192
AGGREGATES = ("sum", "prod", "max", "last")


def criteria() -> list[tuple[Criterion, int]]:
    """Return every distinct (criterion, seed)."""
    found = [(Criterion("random"), seed) for seed in range(3)]
    found += [(Criterion(name, aggregate=a), 0) for name, a in product(("l1", "l2"), AGGREGATES)]
    for order, reduction, aggregate in product(
        ("first", "second", "mixed"), ("element", "vector"), AGGREGATES
    ):
        # The second-order term is a sum of squares: both reductions are the same.
        if (order, reduction) != ("second", "vector"):
            found.append((Criterion("taylor", order, reduction, aggregate), 0))
    return found


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper_setting.json")
    options = parser.parse_args()

    loaded = load_model(options.model)
    text = EvaluationText(*load_evaluation_text(options.text, protocol="paper"))
    calibration = build_calibration(
        options.calibration, loaded.tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=0
    )
    discovery = discover(loaded.model)
    selection = Selection(("heads", "ffn"), layer_ranges={"heads": LAYERS, "ffn": LAYERS})

    def measure(model: Any) -> dict[str, float]:
        found = perplexity(model, loaded.tokenizer, text, protocol="paper", max_tokens=TOKENS)
        return {"perplexity": round(found.perplexity, 2), "tokens": found.tokens}

    rows: list[dict[str, Any]] = [{"criterion": "dense", **measure(loaded.model)}]
    for criterion, seed in criteria():
        begin = time.perf_counter()
        scores = score(
            loaded.model, discovery, criterion, input_ids=calibration.input_ids, seed=seed
        )
        seconds = time.perf_counter() - begin
        removal = allocate(discovery, scores, selection, Target(ratio=RATIO))
        pruned = copy.deepcopy(loaded.model)
        prune_(pruned, discovery, removal)
        rows.append(
            {
                "criterion": criterion.name,
                "order": criterion.order if criterion.name == "taylor" else None,
                "reduction": criterion.reduction if criterion.name == "taylor" else None,
                "aggregate": criterion.aggregate if criterion.name != "random" else None,
                "seed": seed,
                "parameters": count_parameters(discovery, removal),
                **measure(pruned),
                "estimation_seconds": round(seconds, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "settings": {
            "model": loaded.name,
            "ratio": RATIO,
            "layers": LAYERS,
            "structures": selection.structures,
            "scope": selection.scope,
            "calibration": f"{Path(options.calibration).name}, {SAMPLES} x {SEQ_LEN} tokens",
            "perplexity": f"{Path(options.text).name}, first {TOKENS} tokens, windows of 128",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32",
        },
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
