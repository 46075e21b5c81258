"""What it costs to keep FFN widths that servers and packed files like.

    python benchmarks/rounding.py --work FOLDER --calibration FILE --text FILE

Prunes MODEL by a fifth at each multiple, by the same importance and with the split between heads
and FFN channels that trials found without rounding, into FOLDER, where ``serve_llamacpp.py`` finds
the models again. Writes perplexity and KL divergence from the dense model, in windows of 1,024
tokens on the first ``--max-tokens``, to benchmarks/results/rounding.json. A model or a row that is
there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from commands import keep, results_in, stamp
from corpora import WINDOW
from least_damage import prune
from llm_pruner import PruneSettings
from llm_pruner.evaluation.divergence import compare, divergence
from llm_pruner.models.load import load_model
from machine import machine

RESULTS = Path(__file__).parent / "results"
MULTIPLES = (1, 32, 256)


def main() -> None:
    """Prune at each multiple, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--max-tokens", type=int, default=8_192)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounding.json")
    options = parser.parse_args()
    settings = {
        "model": options.model,
        "prune": f"--preset {options.preset} --ratio 0.2",
        "calibration": Path(options.calibration).name,
        "text": f"{Path(options.text).name}, first {options.max_tokens} tokens",
        "window": WINDOW,
        "machine": machine(),
    }
    result = results_in(options.out, settings, parser, rows={})
    rows, made = result["rows"], stamp(options.model, options.calibration, options.preset)
    (options.work / "scores").mkdir(parents=True, exist_ok=True)
    meter = None
    for multiple in MULTIPLES:
        folder = options.work / f"rounded-{multiple}-{made}"
        if folder.exists() and str(multiple) in rows:
            continue
        split = next((row["split"] for row in rows.values()), "auto")
        asked = PruneSettings(
            model=options.model,
            out=folder,
            preset=options.preset,
            ratio=0.2,
            round_to=multiple,
            split=split,
            calibration=options.calibration,
            overwrite=True,
        )
        done = prune(asked, options.work / "scores")
        if str(multiple) in rows:
            continue
        meter = meter or Meter(options.model, options.text, options.max_tokens)
        kept = {name: done[name] for name in ("parameters", "split")}
        rows[str(multiple)] = {**kept, **meter.of(str(folder))}
        keep(options.out, result)
        print(multiple, json.dumps(rows[str(multiple)]), flush=True)


class Meter:
    """Perplexity of models, and their divergence from the dense one, on the same windows."""

    def __init__(self, dense: str, text: str, tokens: int) -> None:
        loaded = load_model(dense)
        assert loaded.tokenizer is not None
        read = Path(text).read_text(encoding="utf-8")[: 8 * tokens]
        ids = torch.tensor(loaded.tokenizer(read).input_ids[:tokens])
        self._windows = ids.view(-1, WINDOW)
        self._dense = [logits.half() for logits in self._logits(dense)]

    def _logits(self, model: str) -> Any:
        network = load_model(model).model
        with torch.no_grad():
            for window in self._windows:
                yield network(window[None]).logits[0, :-1]

    def of(self, model: str) -> dict[str, float | None]:
        """Return perplexity, and KL(dense || model) in nats a token with its standard error."""
        sums, losses = [], []
        for window, before, after in zip(
            self._windows, self._dense, self._logits(model), strict=True
        ):
            sums.append(compare(before, after, window[1:]))
            losses.append(float(cross_entropy(after, window[1:])))
        found = divergence("dense", torch.stack(sums), WINDOW - 1)
        return {
            "perplexity": math.exp(sum(losses) / len(losses)),
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "dense_perplexity": found.perplexity,
        }


if __name__ == "__main__":
    main()
