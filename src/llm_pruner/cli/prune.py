"""``llm-pruner prune``: a checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, command_line, hand_over, upload
from llm_pruner.report.text import clean, megabytes
from llm_pruner.runtime.memory import PRUNING, keep_kernels
from llm_pruner.settings.prune import PruneSettings

if TYPE_CHECKING:
    from llm_pruner.commands.forecast import Forecast
    from llm_pruner.report.records import Pruned, Training
    from llm_pruner.search.fast_widths import Rounding
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
        from llm_pruner.runtime.processes import only_one

        only_one("prune --estimate")
        expected = forecast(settings)
        hand_over(expected, json, show_forecast)
        return
    from llm_pruner.commands.prune import PruneRun
    from llm_pruner.commands.prune_together import carry_out_together
    from llm_pruner.runtime.processes import started

    run = PruneRun(settings, command=command_line())
    done = run.carry_out() if started() == 1 else carry_out_together(run)
    if done is None:
        return
    hand_over(done, json, show, partial(upload, settings))


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


def _verified(done: Pruned) -> str:
    if done.twin_difference is None:
        return "not compared with its masked twin"
    text = f"equal to its masked twin: largest difference {done.twin_difference:.1e} on "
    text += ", ".join(done.twin_scenes)
    return text + (f"; not run: {', '.join(done.twin_skipped)}" if done.twin_skipped else "")


def show(done: Pruned) -> None:
    """Print what was done."""
    out = Screen()
    _show_widths(out, done.layers)
    if across := _across(done):
        out.print(f"Kept across layers: {across}")
    out.model(done.model, done.parameters_before, done.parameters_after)
    if done.rounding is not None:
        out.print(_rounded(done.rounding))
    elif done.round_to is not None and done.round_to > 1:
        out.print(f"channels kept in multiples of {done.round_to}")
    if done.saved_as is not None:
        out.print(_verified(done))
    if done.trials:
        out.print(f"split found by {len(done.trials)} trial removals: {_shares(done)}")
    if done.refitted:
        fitted = sum(one.changed for one in done.refitted)
        if fitted:
            out.print(f"least squares refitted {fitted} of {len(done.refitted)} consumers")
        else:
            out.print("compensation was no gain on held-out text; the weights are as they were")
    if done.repair is not None:
        out.print(_repaired(done.repair))
    if done.saved_as is None:
        out.print(f"plan written to {clean(str(done.path))}; nothing was pruned", soft_wrap=True)
        return
    out.places(done.path, done.report, done.bytes)
    out.print(f"loads with from_pretrained{_loading(done)}")
    out.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in done.seconds.items()))


def _repaired(repair: Training) -> str:
    if not repair.gained:
        return "repair was no gain on held-out text; the weights are as they were"
    return (
        f"repaired in {repair.best_step} steps: divergence from the dense model on held-out text "
        f"{repair.before:.4f} -> {repair.after:.4f}"
    )


def _shares(done: Pruned) -> str:
    taken = next((trial.split for trial in done.trials if trial.taken), {})
    return ", ".join(f"{name} {100 * share:g}%" for name, share in sorted(taken.items()))


def _loading(done: Pruned) -> str:
    """Return what ``from_pretrained`` needs to load the folder, and why."""
    if done.saved_as == "remote_code":
        installed = "where llm-pruner is installed, a model of transformers needs none"
        return f" and trust_remote_code=True; {installed}"
    said = ""
    if "trust_remote_code=True" in done.needs:
        said += " and trust_remote_code=True"
    if "import llm_pruner" in done.needs:
        why = (
            "transformers does not have the model"
            if done.saved_as == "stock"
            else "sizes differ from what a plain config can say"
        )
        said += f" after 'import llm_pruner' ({why})"
    return said or " anywhere"


def _rounded(rounding: Rounding) -> str:
    if not rounding.throughput:
        return "channels are not rounded: no multiple is fine enough for this model"
    speeds = ", ".join(f"{m} {100 * share:.0f}%" for m, share in rounding.throughput.items())
    return f"channels kept in multiples of {rounding.multiple} (speed of each here: {speeds})"


def _across(done: Pruned) -> str:
    """Return what is kept of groups that span all layers, where something was removed."""
    sizes = [size for row in done.layers if row.layer is None for size in row.sizes.items()]
    return ", ".join(
        f"{kept:,} of {dense:,} {name}" for name, (kept, dense) in sizes if kept != dense
    )


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
