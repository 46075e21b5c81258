"""Every criterion and aggregation in the paper's setting, on one model and one text.

    python benchmarks/paper_setting.py --calibration calib.jsonl --text wikitext2_test.txt

Removes 20% of all parameters of SmolLM2-135M (layers 4 to 26, key-value heads and FFN channels,
local ranking, 10 x 64 calibration tokens) and measures perplexity by the paper's protocol on the
first 8,192 tokens of the text; then FFN channels alone, single query heads, ten steps, and the
budget split by trial removals (on one of the ten samples). Writes
benchmarks/results/paper_setting.json after each row, and goes on from there when it is run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from commands import keep, results_in
from llm_pruner import (
    Criterion,
    Model,
    PlanSettings,
    discover,
    load,
    perplexity,
    plan,
    presets,
    prune_,
)
from llm_pruner.models.load import LoadedModel
from llm_pruner.settings.prune import READ_BY

RESULTS = Path(__file__).parent / "results"
RATIO, LAYERS, SAMPLES, SEQ_LEN, TOKENS = 0.2, (4, 26), 10, 64, 8192
SPLIT = (Criterion(), Criterion("l2"), Criterion("random"))
AGGREGATES = ("sum", "prod", "max", "last")


@dataclass(frozen=True)
class Run:
    """One row: the criterion, where from, in how many steps, and the seed of text and choice."""

    criterion: Criterion
    structures: tuple[str, ...] = ("heads", "ffn")
    steps: int = 1
    seed: int = 0
    split: str | None = None


def runs() -> list[Run]:
    """Return every distinct row."""
    taylor, ffn = Criterion(), ("ffn",)
    found = [Run(Criterion("random"), seed=seed) for seed in range(3)]
    found += [Run(Criterion(name, aggregate=a)) for name, a in product(("l1", "l2"), AGGREGATES)]
    for order, reduction, aggregate in product(
        ("first", "second", "mixed"), ("element", "vector"), AGGREGATES
    ):
        # The second-order term is a sum of squares: both reductions are the same.
        if (order, reduction) != ("second", "vector"):
            found.append(Run(Criterion("taylor", order, reduction, aggregate)))
    found += [Run(taylor, seed=seed) for seed in (1, 2)]
    found += [Run(taylor, steps=10, seed=seed) for seed in range(3)]
    found += [Run(Criterion("random"), ffn, seed=seed) for seed in range(3)]
    found += [Run(Criterion("l2"), ffn)]
    found += [Run(taylor, ffn, seed=seed) for seed in range(3)]
    found += [Run(criterion, seed=seed, split="auto") for criterion in SPLIT for seed in range(3)]
    return [*found, Run(taylor, ("query_heads", "ffn"))]


def settings_of(run: Run, calibration: str) -> PlanSettings:
    """Return how a row is pruned."""
    how = run.criterion
    return presets.paper(
        ratio=RATIO,
        structures=run.structures,
        layers=dict.fromkeys(run.structures, LAYERS),
        split=run.split,
        criterion=how.name,
        **{name: getattr(how, name) for name in READ_BY if how.name in READ_BY[name]},
        steps=run.steps,
        seed=run.seed,
        calibration=calibration,
        samples=SAMPLES,
        seq_len=SEQ_LEN,
    )


def prune(dense: LoadedModel, calibration: str, run: Run) -> Model:
    """Return a pruned copy of the model."""
    model = Model(replace(dense, model=copy.deepcopy(dense.model)))
    prune_(model, plan(model, discover(model), None, settings_of(run, calibration)), verify=False)
    return model


def main() -> None:
    """Run what is missing of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper_setting.json")
    options = parser.parse_args()

    dense = load(options.model)
    settings = {
        "model": dense.loaded.name,
        "ratio": RATIO,
        "layers": list(LAYERS),
        "scope": "local",
        "calibration": f"{Path(options.calibration).name}, {SAMPLES} x {SEQ_LEN} tokens",
        "perplexity": f"{Path(options.text).name}, first {TOKENS} tokens, windows of 128",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, float32",
    }
    results = results_in(options.out, settings, parser, rows=[])
    rows = results["rows"]
    done = [row["run"] for row in rows]

    def add(run: dict[str, Any] | None, model: Model) -> None:
        found = perplexity(model, options.text, protocol="paper", max_tokens=TOKENS)
        rows.append(
            {
                "run": run,
                "parameters": sum(p.numel() for p in model.network.parameters()),
                "perplexity": round(found.perplexity, 2),
            }
        )
        keep(options.out, results)
        print(json.dumps(rows[-1]), flush=True)

    if None not in done:
        add(None, dense)
    for run in runs():
        key = json.loads(json.dumps({k: v for k, v in asdict(run).items() if v is not None}))
        if key not in done:
            add(key, prune(dense.loaded, options.calibration, run))


if __name__ == "__main__":
    main()
