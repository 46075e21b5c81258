"""``llm-pruner compress``: prune, recover, evaluate and report, in one command that can go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_pruner.cli.output import (
    clean,
    command_line,
    console,
    count,
    megabytes,
    print_table,
    table,
    warn,
    write_json,
)
from llm_pruner.cli.training_lines import Narrator
from llm_pruner.errors import Interrupted
from llm_pruner.runtime.memory import BOTH, keep_kernels
from llm_pruner.settings.compress import CompressSettings

if TYPE_CHECKING:
    from llm_pruner.commands.compress import Compressed

EXAMPLES = """\b
Examples:
  llm-pruner compress default --out small --time-budget 30m
  llm-pruner compress ./llama --out small --ratio 0.3 --data alpaca.jsonl
  llm-pruner compress ./llama --out small --calibration c4 \\
      --perplexity wikitext2 --tasks paper
"""


def run(settings: CompressSettings, json: str | None) -> None:
    """Make a smaller model: prune, recover, evaluate, report.

    An interrupted run goes on when the same command is given again.
    """
    keep_kernels(BOTH)
    settings.check()
    from llm_pruner.commands.compress import compress
    from llm_pruner.evaluation.result_cache import shared_corpora

    done = watched(lambda **telling: compress(settings, command=command_line(), **telling))
    done.notes.extend(shared_corpora(str(settings.out), settings.perplexity))
    finish(done, json)


def watched(run: Callable[..., Compressed]) -> Compressed:
    """Run and tell standard error how it goes; say how to go on if it is interrupted."""
    live = sys.stderr.isatty()

    def tell(stage: str) -> None:
        if live:
            print(f"llm-pruner: {stage}", file=sys.stderr, flush=True)

    def going_on(folder: Path) -> None:
        name = clean(folder.name)
        print(f"llm-pruner: going on with the run in {name}", file=sys.stderr, flush=True)

    try:
        return run(tell=tell, say=Narrator(quiet=True), going_on=going_on)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on from here") from None


def finish(done: Compressed, json: str | None) -> None:
    """Print or write what a run did."""
    write_json(as_data(done), json)
    if json != "-":
        show(done)
    for note in done.notes:
        warn(note)


def as_data(done: Compressed) -> dict[str, Any]:
    """Return the outcome of a run for scripts."""
    data = asdict(done)
    data["path"] = str(done.path)
    data["report"] = None if done.report is None else str(done.report)
    data["parameters"] = {"before": done.parameters[0], "after": done.parameters[1]}
    data["ratio"] = 1 - done.parameters[1] / done.parameters[0]
    return data


def show(done: Compressed) -> None:
    """Print the models beside each other, and what it took."""
    out = console()
    before, after = done.parameters
    out.print(
        f"{clean(done.model)}: {count(before)} -> {count(after)} parameters "
        f"({100 * (1 - after / before):.1f}% removed)"
    )
    found = list(done.measured.values())
    rows = [
        ("parameters", *(count(one["parameters"]) for one in found)),
        ("size on disk", *(megabytes(one["bytes"]) if one["bytes"] else "-" for one in found)),
    ]
    for number, text in enumerate(found[0]["perplexity"]):
        values = (one["perplexity"][number] for one in found)
        rows.append((f"perplexity, {text['corpus']}", *map(_perplexity, values)))
    rows += _tasks(found)
    for stage in ("prefill", "decode"):
        speeds = (one["speed"][f"{stage}_tokens_per_second"] for one in found)
        rows.append((f"{stage} tokens/s", *(f"{speed:.1f}" for speed in speeds)))
    print_table(out, table("Before and after", ("", *done.measured), rows))
    for text in found[0]["perplexity"]:
        out.print(f"{text['corpus']}: {text['tokens']:,} tokens in windows of {text['window']}")
    times = {name: seconds for name, seconds in done.seconds.items() if seconds >= 0.5}
    took = ", ".join(f"{_STAGES.get(name, name)} {seconds:.0f}" for name, seconds in times.items())
    out.print(f"seconds: {took}; {sum(done.seconds.values()):.0f} in all", soft_wrap=False)
    if done.peak_bytes:
        out.print(f"peak memory: {megabytes(done.peak_bytes)}")
    out.print(f"saved to {clean(str(done.path))}", soft_wrap=True)
    if done.report is not None:
        out.print(f"report: {clean(str(done.report))}", soft_wrap=True)


_STAGES = {
    "dense": "measuring the dense model",
    "pruned": "the pruned one",
    "recovered": "the recovered one",
    "prune": "pruning",
    "recover": "recovery",
    "text": "writing text",
}


def _perplexity(found: dict[str, Any]) -> str:
    spread = found["stderr"]
    return f"{found['perplexity']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _tasks(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for the chosen metric of each task."""
    rows = []
    shown = [
        {one["task"]: one for one in (each["zero_shot"] or {"tasks": []})["tasks"]}
        for each in found
    ]
    for task, first in shown[0].items():
        metric = first["paper_metric"] or next(iter(first["metrics"]), None)
        if metric is not None:
            values = (each[task]["metrics"][metric]["value"] for each in shown)
            rows.append((f"{task}, {metric}", *(f"{value:.4f}" for value in values)))
    return rows
