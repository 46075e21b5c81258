"""What the loss at a share of the positions changes in a plan, beside what another text does.

    python benchmarks/loss_positions.py MODEL --calibration FILES [--shape CONFIG.json]

Units are scored with the loss at each position, at every second and at every fourth one, and with
the loss at each position on other samples of the same text (another seed). Written is, for each,
the share of the units that a plan takes (a fifth of the FFN channels, one ranking) which the first
one takes as well, and the seconds of the estimate. ``--shape`` is a config of transformers of which
a model with random weights is timed with all positions and as the program chooses. Rows of other
shapes stay in the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llm_pruner as lp
from commands import keep, put, results_in
from llm_pruner.importance import boundary_pass, score
from llm_pruner.runtime.precision import fast_matmul
from machine import here

RESULTS = Path(__file__).parent / "results"
SAMPLES, SEQ_LEN, SHARE = 16, 512, 0.2
CRITERIA = ("fisher", "taylor")


def scored(
    network: Any, groups: lp.Discovery, criterion: str, tokens: torch.Tensor, stride: int | None
) -> tuple[np.ndarray[Any, Any], float]:
    """Return the scores of all FFN channels, layer after layer, and the seconds that they took."""
    names = [group.name for group in groups.groups if group.kind == "ffn"]
    begin = time.perf_counter()
    chosen = boundary_pass.loss_stride
    with (
        fast_matmul(network),
        patch.object(boundary_pass, "loss_stride", lambda chain: stride or chosen(chain)),
    ):
        found = score(
            network,
            groups,
            lp.Criterion(criterion),
            input_ids=tokens,
            seed=0,
            groups=names,
        )
    seconds = time.perf_counter() - begin
    return np.concatenate([found[name] for name in names]), round(seconds, 1)


def taken(scores: np.ndarray[Any, Any]) -> set[int]:
    """Return the units that a plan takes."""
    order = np.argsort(scores, kind="stable")
    return set(order[: int(SHARE * len(order))].tolist())


def main() -> None:
    """Score in each way and write what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--shape", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS / "loss_positions.json")
    options = parser.parse_args()
    settings = {
        "model": Path(options.model).name,
        "calibration": [Path(file).name for file in options.calibration.split(",")],
        "samples": [SAMPLES, SEQ_LEN],
    }
    results = results_in(options.out, settings, parser, rows=[], shapes=[])

    def add(rows: str, key: dict[str, Any], **found: Any) -> None:
        put(results[rows], {**key, **found, **here()}, *key)
        keep(options.out, results)
        print(json.dumps({**key, **found}), flush=True)

    loaded = lp.load(options.model)
    groups = lp.discover(loaded)
    texts = [
        lp.calibration(
            loaded, options.calibration, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed
        ).input_ids
        for seed in (0, 1)
    ]
    for criterion in CRITERIA:
        first: set[int] = set()
        for stride, seed in ((1, 0), (2, 0), (4, 0), (1, 1)):
            scores, seconds = scored(loaded.network, groups, criterion, texts[seed], stride)
            first = first or taken(scores)
            alike = len(taken(scores) & first) / len(first)
            row = {"criterion": criterion, "stride": stride, "seed": seed}
            add("rows", row, alike=round(alike, 4), seconds=seconds)
    for file in options.shape:
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file)).eval()
        found = lp.discover(network)
        ids = torch.randint(10, 1000, (8, SEQ_LEN), generator=torch.Generator().manual_seed(0))
        for stride in (1, None):
            _, seconds = scored(network.requires_grad_(False), found, "fisher", ids, stride)
            add("shapes", {"shape": file.stem, "stride": stride or "chosen"}, seconds=seconds)


if __name__ == "__main__":
    main()
