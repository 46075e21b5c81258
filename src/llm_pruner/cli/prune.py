"""``llm-pruner prune``: a checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, command_line, hand_over
from llm_pruner.report.text import clean, megabytes
from llm_pruner.runtime.memory import PRUNING, keep_kernels
from llm_pruner.settings.prune import PruneSettings

if TYPE_CHECKING:
    from llm_pruner.commands.forecast import Forecast
    from llm_pruner.report.records import Pruned
    from llm_pruner.types import Layer

EXAMPLES = """\b
Examples:
  llm-pruner prune default --out small --ratio 0.2
  llm-pruner prune ./llama --out small --ratio 0.2 --preset paper
  llm-pruner prune ./llama --out small --params 5.4B --calibration c4
  llm-pruner prune ./llama --out plan.json --ratio 0.2 --dry-run
  llm-pruner prune ./llama --out small --plan plan.json
"""


def run(settings: PruneSettings, json: str | None) -> None:
    """Remove the least important structures and save a smaller model."""
    keep_kernels(PRUNING)
    settings.check()
    if settings.estimate:
        from llm_pruner.commands.forecast import forecast

        expected = forecast(settings)
        hand_over(expected, json, show_forecast)
        return
    from llm_pruner.commands.prune import PruneRun
    from llm_pruner.runtime.processes import only_one

    only_one("prune")
    done = PruneRun(settings, command=command_line()).carry_out()
    hand_over(done, json, show)


def show_forecast(expected: Forecast) -> None:
    """Print what a run will take."""
    out = Screen()
    rows = [
        (name, _time(one.seconds), megabytes(one.bytes)) for name, one in expected.stages.items()
    ]
    rows.append(("all", _time(expected.seconds), megabytes(expected.peak_bytes)))
    out.table(f"Expected of {expected.model}", ("stage", "time", "peak memory"), rows)
    how = "are read block by block" if expected.streamed else "stay in memory"
    out.print(f"weights {how}: {expected.why}")
    if expected.saved_bytes:
        out.print(f"weights that are saved: {megabytes(expected.saved_bytes)}")
    out.print("nothing was done; leave --estimate out to do it")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def show(done: Pruned) -> None:
    """Print what was done."""
    out = Screen()
    _show_widths(out, done.layers)
    sizes = [item for row in done.layers if row.layer is None for item in row.sizes.items()]
    across = [f"{kept:,} of {dense:,} {name}" for name, (kept, dense) in sizes if kept != dense]
    if across:
        out.print(f"kept across layers: {', '.join(across)}")
    out.model(done.model, done.parameters_before, done.parameters_after)
    if done.round_to is not None and done.round_to > 1:
        out.print(f"channels kept in multiples of {done.round_to}")
    if done.trials:
        taken = next((trial.split for trial in done.trials if trial.taken), {})
        split = ", ".join(f"{name} {100 * share:g}%" for name, share in sorted(taken.items()))
        out.print(f"split found by {len(done.trials)} trial removals: {split}")
    if done.refitted:
        fitted = sum(one.changed for one in done.refitted)
        out.print(f"least squares refitted {fitted} of {len(done.refitted)} consumers")
    if done.repair is not None:
        out.print(
            f"repaired in {done.repair.best_step} steps: divergence from the dense model on "
            f"held-out text {done.repair.before:.4f} -> {done.repair.after:.4f}"
            if done.repair.gained
            else "repair was no gain on held-out text; the weights are as they were"
        )
    if done.saved_as is None:
        out.print(f"plan written to {clean(str(done.path))}; nothing was pruned", soft_wrap=True)
        return
    out.print(_verified(done))
    out.places(done.path, done.report, done.bytes)
    out.loads(done.needs)
    out.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in done.seconds.items()))


def _verified(done: Pruned) -> str:
    if done.twin_difference is None:
        return "not compared with its masked twin"
    text = f"equal to its masked twin: largest difference {done.twin_difference:.1e} on "
    text += ", ".join(done.twin_scenes)
    return text + (f"; not run: {', '.join(done.twin_skipped)}" if done.twin_skipped else "")


def _show_widths(out: Screen, rows: Sequence[Layer]) -> None:
    """Print kept widths, with runs of equal layers in one row; nothing if no layer changed."""
    layers = [row for row in rows if row.layer is not None]
    changed = dict.fromkeys(
        name
        for row in layers
        for name, (kept, dense) in row.sizes.items()
        if kept != dense and not row.removed
    )
    if not changed and not any(row.removed for row in layers):
        return

    def cells(row: Layer) -> tuple[str, ...]:
        if row.removed:
            return ("removed", *("" for _ in changed))[: max(len(changed), 1)]
        sizes = (row.sizes.get(name) for name in changed)
        return tuple("{} of {}".format(*size) if size else "" for size in sizes) or ("whole",)

    lines = []
    for shown, run in groupby(layers, cells):
        numbers = [row.layer for row in run]
        last = f"-{numbers[-1]}" if len(numbers) > 1 else ""
        lines.append((f"{numbers[0]}{last}", *shown))
    out.table("Units kept", ("layer", *(changed or ("",))), lines)
