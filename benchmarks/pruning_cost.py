"""Time and peak memory of an estimate, beside the least work that it is made of.

    python benchmarks/pruning_cost.py MODEL --calibration FILE [--repeats 3] [--out FILE]

128 x 128 tokens. Each of these runs in a process of its own, one after the other, several times:

- ``activations``: forward, and backward to what enters the first block, without gradients of
  weights: what ``gate`` cannot do without;
- ``activations, attention by sample``: the same with attention as our passes compute it there;
- ``weights``: forward and backward with the gradients of all weights: what ``taylor`` cannot;
- ``original``: the loop of the original's mixed order (``reference/mixed_taylor.py``);
- ``gate``, ``taylor, mixed``: our estimates, of heads and FFN channels.

All multiply in bfloat16 where the processor does; the plain passes take 16 samples at a time, the
original's one, and 16 in its last pass. Memory is the peak of the process beyond what it took to
load the model. Written are all runs, medians and ratios. OUT is written after each round.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import llm_pruner as lp
from commands import apart, keep
from llm_pruner.runtime.attention import by_sample
from llm_pruner.runtime.precision import multiplies_bfloat16
from machine import here
from reference.mixed_taylor import mixed_scores

RESULTS = Path(__file__).parent / "results"
SAMPLES, SEQ_LEN, BATCH = 128, 128, 16


def plain(network: Any, tokens: torch.Tensor, *, weights: bool) -> None:
    """Run forward and backward, with gradients of weights or of what enters the first block."""
    network.requires_grad_(weights)
    for batch in tokens.split(BATCH):
        given: dict[str, Any] = {"input_ids": batch}
        if not weights:
            given = {"inputs_embeds": network.get_input_embeddings()(batch).requires_grad_()}
        network(**given, labels=batch, use_cache=False).loss.backward()


def run(kind: str, model: str, calibration: str) -> dict[str, float]:
    """Return seconds, and bytes beyond the loaded model, of one pass over the text."""
    loaded = lp.load(model)
    text = lp.calibration(loaded, calibration, samples=SAMPLES, seq_len=SEQ_LEN)
    network, tokens = loaded.network, text.input_ids
    jobs: dict[str, Callable[[], Any]] = {
        "activations": lambda: plain(network, tokens, weights=False),
        "activations, attention by sample": partial(
            by_sample()(plain), network, tokens, weights=False
        ),
        "weights": lambda: plain(network, tokens, weights=True),
        "original": lambda: mixed_scores(network.requires_grad_(), tokens),
        "gate": lambda: lp.score(loaded, groups, lp.Criterion("gate"), text, groups=cut),
        "taylor, mixed": lambda: lp.score(
            loaded, groups, lp.Taylor(order="mixed"), text, groups=cut
        ),
    }
    ours = kind.startswith(("gate", "taylor"))
    groups = lp.discover(loaded)
    cut = {one.name for one in groups.groups if one.kind in ("heads", "ffn")}
    before, begin = peak(), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=not ours and multiplies_bfloat16()):
        jobs[kind]()
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "bytes": peak() - before}


def peak() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run all in turn, round after round, and write what is known so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning_cost.json")
    options = parser.parse_args()
    passes = ("activations", "activations, attention by sample")
    kinds = (*passes, "gate", "weights", "taylor, mixed", "original")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind in kinds:
            runs[kind].append(apart(run, kind, options.model, options.calibration))
            print(kind, runs[kind][-1], flush=True)
        seconds = {kind: median(one["seconds"] for one in runs[kind]) for kind in kinds}
        result = {
            "settings": {
                "model": Path(options.model).name,
                "calibration": f"{Path(options.calibration).name}, {SAMPLES} x {SEQ_LEN} tokens",
                **here(),
            },
            "seconds": seconds,
            "bytes": {kind: max(one["bytes"] for one in runs[kind]) for kind in kinds},
            **{f"gate over {one}": round(seconds["gate"] / seconds[one], 3) for one in passes},
            "mixed over weights": round(seconds["taylor, mixed"] / seconds["weights"], 3),
            "original over mixed": round(seconds["original"] / seconds["taylor, mixed"], 2),
            "runs": runs,
        }
        keep(options.out, result)


if __name__ == "__main__":
    main()
