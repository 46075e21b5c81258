"""How much worse each way of pruning makes a model at the same size, without training.

    python benchmarks/least_damage.py --calibration c4_first_100.jsonl --c4 c4_last_50.jsonl \
        --wikitext wikitext2_test.txt --ptb ptb_test.txt

Prunes SmolLM2-135M through the same functions as ``llm-pruner prune`` and measures perplexity in
windows of 1,024 tokens on the first 65,536 tokens of WikiText-2 test, on held-out C4, and on Penn
Treebank, beside the dense model. Rows (``--rows``): ``recipes`` (each recipe at four sizes),
``table`` (every criterion, uniform and global, without and with least squares, at 20% and 50% of
the block parameters, on ``--screen`` tokens of each text), ``text`` (calibrated on each of
``--texts``; self-made without), ``uniform`` (equal layers). ``--sizes`` and ``--only`` take some of
them, ``--seeds`` repeats them. Writes benchmarks/results/least_damage.json after each row, and goes
on from there when it is run again; a row that was measured on fewer texts is made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from corpora import TOKENS, WINDOW, perplexities, read_texts
from llm_pruner import Target
from llm_pruner.commands import stepwise
from llm_pruner.commands.by_preset import calibration_of, prune_arguments
from llm_pruner.commands.prune import prune_checkpoint
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import EvaluationText
from llm_pruner.runtime.memory import PRUNING, keep_kernels, keep_large_blocks
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.presets import NAMES, Recipe, read_recipe

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "20% of the blocks": 113_300_000,
    "10% of all": 121_063_000,
    "20% of all": 107_612_000,
    "50% of the blocks": 81_430_000,
}
"""Parameters left, of 134.5M; the blocks hold 106.2M."""

CRITERIA = (
    *("random", "l1", "l2", "taylor", "gate", "fisher", "wanda", "fluctuation", "contribution"),
    *("obs", "leverage", "fisher-obs"),
)


@dataclass(frozen=True)
class Run:
    """One row: a recipe, or what the table varies."""

    rows: str
    size: str
    recipe: str
    seed: int = 0
    calibration: str | None = None
    criterion: str | None = None
    scope: str | None = None
    compensation: str | None = None
    structures: tuple[str, ...] | None = None
    split: Mapping[str, float] | None = None
    spread: float | None = None
    steps: int | None = None
    samples: int | None = None
    score_samples: int | None = None
    seq_len: int | None = None


def runs(
    rows: str,
    texts: Sequence[str] = ("self",),
    samples: int | None = None,
    scored: int | None = None,
) -> list[Run]:
    """Return the runs behind one set of rows; ``samples`` are fitted and ``scored`` of them.

    Their seed is the default's.
    """
    sizes = list(SIZES)
    if samples is not None and scored is None:
        scored = min(samples, read_recipe("best").samples)
    if rows == "recipes":
        return [Run(rows, size, name) for size, name in product(sizes, ("best", "paper"))] + [
            Run(rows, "20% of the blocks", name) for name in NAMES if name not in ("best", "paper")
        ]
    if rows == "text":
        return [
            Run(rows, size, "best", calibration=text, samples=samples, score_samples=scored)
            for size, text in product(sizes, texts)
        ]
    if rows == "uniform":
        return [
            Run(rows, size, "best", scope="uniform")
            for size in ("20% of the blocks", "50% of the blocks")
        ]
    return [
        Run(rows, size, "balanced", 0, None, name, scope, repair, ("ffn",), {"ffn": 1.0}, None)
        for size, name, scope, repair in product(
            ("20% of the blocks", "50% of the blocks"),
            CRITERIA,
            ("local", "global"),
            ("none", "least-squares"),
        )
    ]


def _keep_scores(file: Path) -> bool:
    """Have the pruning of this process read scores from a file, or write them; if it is there."""
    known, estimate = file.is_file(), stepwise.score

    def score(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        if known:
            with np.load(file) as arrays:
                return dict(arrays)
        found = estimate(*arguments, **keywords)
        np.savez(file, **found)
        return found

    stepwise.score = score
    return known


def scores_name(recipe: Recipe, source: str, seed: int) -> str:
    """Return what tells apart the scores of runs whose recipes take one step."""
    criterion = (recipe.criterion, recipe.order, recipe.reduction, recipe.aggregate)
    text = "+".join(Path(part).stem for part in source.split(","))
    read = f"{recipe.score_samples or recipe.samples}-of-{recipe.samples}x{recipe.seq_len}"
    parts = (*criterion, *(recipe.structures or ()), text, read, f"seed-{seed}")
    return "-".join(part for part in parts if part is not None)


def prune(
    model: str, run: Run, calibration: str, out: Path, kept: Path | None = None
) -> dict[str, Any]:
    """Carry out one run; return what it cost and found.

    Args:
        kept: folder of scores, for runs in which a criterion finds the same scores.
    """
    said = {
        **{name: getattr(run, name) for name in ("criterion", "compensation", "structures")},
        **{name: getattr(run, name) for name in ("steps", "samples", "score_samples", "seq_len")},
        "scope": None if run.scope == "uniform" else run.scope,
        "split": run.split,
    }
    changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if run.criterion is not None:
        changes["spread"] = None
    recipe = read_recipe(run.recipe).model_copy(update=changes)
    arguments = prune_arguments(recipe)
    if run.scope == "uniform":
        arguments["selection"] = replace(
            arguments["selection"], scope="local", spread=None, uniform=True
        )
    source = run.calibration or calibration
    known = kept is not None and _keep_scores(kept / f"{scores_name(recipe, source, run.seed)}.npz")
    begin = time.perf_counter()
    done = prune_checkpoint(
        ModelSettings(model),
        out,
        target=Target(params=SIZES[run.size]),
        calibration=calibration_of(recipe, source=source),
        seed=run.seed,
        verify=False,
        overwrite=True,
        **arguments,
    )
    selection = done.plan.selection
    return {
        "parameters": done.parameters[1],
        **({"scores_known": True} if known else {}),
        "split": selection.split if selection else None,
        "saved_as": done.kind,
        "seconds": {name: round(value, 2) for name, value in done.seconds.items()},
        "total_seconds": round(time.perf_counter() - begin, 1),
    }


def measure(
    model: str,
    run: Run,
    calibration: str,
    texts: Mapping[str, EvaluationText],
    tokens: int,
    kept: Path | None,
) -> dict[str, Any]:
    """Carry out one run and score the model that comes out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        try:
            found = prune(model, run, calibration, out, kept)
        except UserError as error:
            return {"error": str(error)}
        used = resource.getrusage(resource.RUSAGE_SELF)
        found["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
        found["peak_bytes"] = used.ru_maxrss * 1024
        found["perplexity"] = perplexities(str(out), texts, tokens)
    return found


def apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own, whose peak memory is nobody else's.

    Forked: this process has imported everything and computed nothing, so it has no threads.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--c4", required=True)
    parser.add_argument("--ptb")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", default="recipes", help="comma-separated sets of rows")
    parser.add_argument(
        "--texts", nargs="+", default=["self"], help="calibration texts; a,b: equal parts of both"
    )
    parser.add_argument("--samples", type=int, help="of each of --texts")
    parser.add_argument(
        "--score-samples", type=int, help="of --samples; as many as the recipe has unless given"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--only", help="comma-separated recipes, of those in the rows")
    parser.add_argument(
        "--screen", type=int, default=8192, help="tokens of each text for the table"
    )
    parser.add_argument(
        "--scores",
        type=Path,
        help="folder that keeps scores, so that runs that differ in what follows share them",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "least_damage.json")
    options = parser.parse_args()
    keep_large_blocks()
    keep_kernels(PRUNING)
    texts = read_texts({"wikitext2": options.wikitext, "c4": options.c4, "ptb": options.ptb})
    results: dict[str, Any] = {"settings": {}, "dense": {}, "rows": []}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    results["settings"] = {
        "model": "SmolLM2-135M-Instruct, float32",
        "calibration": Path(options.calibration).name,
        "windows": WINDOW,
        "tokens": TOKENS,
        "screen_tokens": options.screen,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }

    if options.scores is not None:
        options.scores.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    for rows in options.rows.split(","):
        tokens = options.screen if rows == "table" else TOKENS
        some = {k: v for k, v in texts.items() if rows != "table" or k != "ptb"}
        if not some.keys() <= results["dense"].get(str(tokens), {}).keys():
            results["dense"][str(tokens)] = apart(perplexities, options.model, some, tokens)
            save()
        dense = results["dense"][str(tokens)]
        chosen = runs(rows, options.texts, options.samples, options.score_samples)
        for seed, one in product(options.seeds.split(","), chosen):
            run = replace(one, seed=int(seed))
            key = {k: v for k, v in json.loads(json.dumps(run.__dict__)).items() if v is not None}
            if "calibration" in key:
                parts = key["calibration"].split(",")
                key["calibration"] = ",".join(Path(part).name for part in parts)
            left_out = options.only is not None and run.recipe not in options.only.split(",")
            if (
                run.size not in options.sizes.split(",")
                or left_out
                or any(
                    row["run"] == key and ("error" in row or some.keys() <= row["ratio"].keys())
                    for row in results["rows"]
                )
            ):
                continue
            found = apart(
                measure, options.model, run, options.calibration, some, tokens, options.scores
            )
            results["rows"] = [row for row in results["rows"] if row["run"] != key]
            if "error" in found:
                results["rows"].append({"run": key, **found})
                save()
                continue
            measured = found["perplexity"]
            found["ratio"] = {name: value / dense[name] for name, value in measured.items()}
            results["rows"].append({"run": key, **found})
            save()
            ratios = ", ".join(f"{k} x{v:.3f}" for k, v in found["ratio"].items())
            print(f"{run.recipe} {run.size} {key}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
