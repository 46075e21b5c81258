"""How much worse each way of pruning makes a model at the same size, without training.

    python benchmarks/least_damage.py --calibration c4_first_100.jsonl --c4 c4_last_50.jsonl \
        --wikitext wikitext2_test.txt --ptb ptb_test.txt

Prunes SmolLM2-135M through the same functions as ``llm-pruner prune`` and measures perplexity in
windows of 1,024 tokens on the first 65,536 tokens of WikiText-2 test, on held-out C4, and on Penn
Treebank, beside the dense model. Rows (``--rows``): ``presets`` (``best`` and ``paper`` at four
sizes, the others at one), ``table`` (every criterion, uniform and global, without and with least
squares, at 20% and 50% of the block parameters, on ``--screen`` tokens of each text), ``text``
(calibrated on each of ``--texts``; self-made without), ``uniform`` (equal layers). ``--sizes`` and
``--only`` take some of them, ``--seeds`` repeats them. Writes
benchmarks/results/least_damage.json after each row, and goes on from there when it is run again; a
row that was measured on fewer texts is made again.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from commands import apart, keep, name_of, put, results_in, stamp
from corpora import TOKENS, WINDOW, perplexities, read_texts
from llm_pruner import Criterion, Discovery, PlanSettings, PruneSettings, UserError, read_plan
from llm_pruner.commands.prune import PruneRun
from llm_pruner.data.text import EvaluationText
from llm_pruner.importance import score
from llm_pruner.runtime.memory import PRUNING, keep_kernels, keep_large_blocks
from llm_pruner.runtime.precision import fast_matmul
from llm_pruner.settings.registry import CRITERIA

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results", HERE / "criteria_table.yaml"
SIZES = {
    "20% of the blocks": 113_300_000,
    "10% of all": 121_063_000,
    "20% of all": 107_612_000,
    "50% of the blocks": 81_430_000,
}
"""Parameters left, of 134.5M; the blocks hold 106.2M."""

PRESETS = tuple(PlanSettings.presets)


@dataclass(frozen=True)
class Run:
    """One row: a preset, or what the table varies."""

    rows: str
    size: str
    preset: str | None = None
    seed: int = 0
    calibration: str | None = None
    criterion: str | None = None
    scope: str | None = None
    compensation: str | None = None
    samples: int | None = None
    score_samples: int | None = None


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
        scored = min(samples, PlanSettings(preset="best").samples)
    if rows == "presets":
        return [Run(rows, size, name) for size, name in product(sizes, ("best", "paper"))] + [
            Run(rows, sizes[0], name) for name in PRESETS if name not in ("best", "paper")
        ]
    if rows == "text":
        return [
            Run(rows, size, "best", calibration=text, samples=samples, score_samples=scored)
            for size, text in product(sizes, texts)
        ]
    ends = ("20% of the blocks", "50% of the blocks")
    if rows == "uniform":
        return [Run(rows, size, "best", scope="uniform") for size in ends]
    return [
        Run(rows, size, criterion=name, scope=scope, compensation=repair)
        for size, name, scope, repair in product(
            ends, CRITERIA, ("local", "global"), ("none", "least-squares")
        )
    ]


def key_of(run: Run) -> dict[str, Any]:
    """Return what tells a row from the others in the file of results."""
    key = {name: value for name, value in asdict(run).items() if value is not None}
    if run.calibration is not None:
        key["calibration"] = ",".join(Path(part).name for part in run.calibration.split(","))
    return key


def known_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as they are written now; they called presets recipes once."""
    found = []
    for row in rows:
        key = dict(row["run"])
        if "recipe" in key:
            preset = key.pop("recipe")
            key = {**key, "rows": {"recipes": "presets"}.get(key["rows"], key["rows"])}
            if key["rows"] == "table":
                key = {k: v for k, v in key.items() if k not in ("structures", "split")}
            else:
                key["preset"] = preset
        found.append({**row, "run": key})
    return found


def settings_of(model: str, run: Run, calibration: str, out: Path) -> PruneSettings:
    """Return how a run prunes."""
    names = ("criterion", "compensation", "samples", "score_samples")
    scope: dict[str, Any] = {"uniform": True} if run.scope == "uniform" else {"scope": run.scope}
    return PruneSettings(
        model=model,
        dtype="float32",
        out=out,
        overwrite=True,
        verify=False,
        preset=run.preset or str(TABLE),
        params=SIZES[run.size],
        calibration=run.calibration or calibration,
        seed=run.seed,
        repair_minutes=0.0,  # nothing is trained
        **{name: getattr(run, name) for name in names},
        **scope,
    )


class Kept:
    """Estimates importance once, and reads it from a file from then on.

    Attributes:
        known: whether it was there before.
    """

    def __init__(self, folder: Path, settings: PruneSettings) -> None:
        self.settings = settings
        self.file = folder / f"{scores_name(settings)}.npz"
        self.known = self.file.is_file()

    def __call__(
        self, model: nn.Module, groups: Discovery, names: Set[str], tokens: torch.Tensor | None
    ) -> dict[str, Any]:
        """Return the importance of the units; presets take one step, so there is one of each."""
        if self.known:
            with np.load(self.file) as arrays:
                return dict(arrays)
        how = self.settings
        criterion = Criterion(how.criterion, how.order, how.reduction, how.aggregate)
        with fast_matmul(model):
            found = score(model, groups, criterion, input_ids=tokens, seed=how.seed, groups=names)
        np.savez(self.file, **found)
        return found


def scores_name(settings: PruneSettings) -> str:
    """Return what tells apart the scores of runs that take one step."""
    criterion = (settings.criterion, settings.order, settings.reduction, settings.aggregate)
    text = "+".join(Path(part).stem for part in settings.calibration.split(","))
    scored = settings.score_samples or settings.samples
    read = f"{scored}-of-{settings.samples}x{settings.seq_len}"
    made = stamp(settings.model, settings.calibration)
    return "-".join((*criterion, *settings.structures, text, read, f"seed-{settings.seed}", made))


def prune(settings: PruneSettings, kept: Path | None = None) -> dict[str, Any]:
    """Carry out one run; return what it cost and found.

    Args:
        settings: of the run.
        kept: folder of scores, for runs in which a criterion finds the same scores.
    """
    estimate = None if kept is None else Kept(kept, settings)
    begin = time.perf_counter()
    done = PruneRun(settings, estimate=estimate).carry_out()
    return {
        "parameters": done.parameters_after,
        **({"scores_known": True} if estimate is not None and estimate.known else {}),
        "split": read_plan(settings.out / "plan.json").settings.get("split"),
        "saved_as": done.saved_as,
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
            found = prune(settings_of(model, run, calibration, out), kept)
        except UserError as error:
            return {"error": str(error)}
        used = resource.getrusage(resource.RUSAGE_SELF)
        found["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
        found["peak_bytes"] = used.ru_maxrss * 1024
        found["perplexity"] = perplexities(str(out), texts, tokens)
    return found


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--c4", required=True)
    parser.add_argument("--ptb")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", default="presets", help="comma-separated sets of rows")
    parser.add_argument(
        "--texts", nargs="+", default=["self"], help="calibration texts; a,b: equal parts of both"
    )
    parser.add_argument("--samples", type=int, help="of each of --texts")
    parser.add_argument(
        "--score-samples", type=int, help="of --samples; as many as the preset has unless given"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--only", help="comma-separated presets, of those in the rows")
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
    settings = {
        "model": f"{name_of(options.model)}, float32",
        "calibration": Path(options.calibration).name,
        "windows": WINDOW,
        "tokens": TOKENS,
        "screen_tokens": options.screen,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    results = results_in(options.out, settings, parser, dense={}, rows=[])
    results["rows"] = known_rows(results["rows"])

    if options.scores is not None:
        options.scores.mkdir(parents=True, exist_ok=True)

    for rows in options.rows.split(","):
        tokens = options.screen if rows == "table" else TOKENS
        some = {k: v for k, v in texts.items() if rows != "table" or k != "ptb"}
        if not some.keys() <= results["dense"].get(str(tokens), {}).keys():
            results["dense"][str(tokens)] = apart(perplexities, options.model, some, tokens)
            keep(options.out, results)
        dense = results["dense"][str(tokens)]
        chosen = runs(rows, options.texts, options.samples, options.score_samples)
        for seed, one in product(options.seeds.split(","), chosen):
            run = replace(one, seed=int(seed))
            key = key_of(run)
            left_out = options.only is not None and run.preset not in options.only.split(",")
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
            if "error" not in found:
                measured = found["perplexity"]
                found["ratio"] = {name: value / dense[name] for name, value in measured.items()}
                ratios = ", ".join(f"{k} x{v:.3f}" for k, v in found["ratio"].items())
                print(f"{key}: {ratios}", flush=True)
            put(results["rows"], {"run": key, **found}, "run")
            keep(options.out, results)


if __name__ == "__main__":
    main()
