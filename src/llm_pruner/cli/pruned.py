"""What ``llm-pruner prune`` says of a run, to people and to scripts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llm_pruner.cli.output import clean, console, count, megabytes, print_table, table

if TYPE_CHECKING:
    from llm_pruner.commands.pruned import Pruned
    from llm_pruner.search.fast_widths import Rounding
    from llm_pruner.surgery.verify import Verified


def as_data(done: Pruned) -> dict[str, Any]:
    """Return the outcome of a run for scripts."""
    return {
        "model": done.plan.model.name,
        "parameters_before": done.parameters[0],
        "parameters_after": done.parameters[1],
        "ratio": 1 - done.parameters[1] / done.parameters[0],
        "saved_as": done.kind,
        "needs": list(done.needs),
        "path": None if done.path is None else str(done.path),
        "bytes": done.bytes,
        "report": None if done.report is None else str(done.report),
        "twin_difference": None if done.verified is None else done.verified.difference,
        "twin_scenes": [] if done.verified is None else list(done.verified.scenes),
        "twin_skipped": [] if done.verified is None else list(done.verified.skipped),
        "round_to": done.plan.settings.get("round_to"),
        "rounding": None if done.rounding is None else asdict(done.rounding),
        "seconds": done.seconds,
        "refitted": [asdict(one) for one in done.refitted],
        "trials": [asdict(one) for one in done.trials],
        "layers": [asdict(row) for row in done.rows],
    }


def _verified(verified: Verified | None) -> str:
    if verified is None:
        return "not compared with its masked twin"
    text = f"equal to its masked twin: largest difference {verified.difference:.1e} on "
    text += ", ".join(verified.scenes)
    return text + (f"; not run: {', '.join(verified.skipped)}" if verified.skipped else "")


def show(done: Pruned) -> None:
    """Print what was done."""
    out = console()
    widths = _widths(done)
    if widths is not None:
        print_table(out, widths)
    if across := _across(done):
        out.print(f"Kept across layers: {across}")
    before, after = done.parameters
    out.print(
        f"{clean(done.plan.model.name)}: {count(before)} -> {count(after)} parameters "
        f"({100 * (1 - after / before):.1f}% removed)"
    )
    if done.rounding is not None:
        out.print(_rounded(done.rounding))
    if done.kind is not None:
        out.print(_verified(done.verified))
    if done.trials:
        out.print(f"split found by {len(done.trials)} trial removals: {_shares(done)}")
    if done.refitted:
        fitted = sum(one.changed for one in done.refitted)
        if fitted:
            out.print(f"least squares refitted {fitted} of {len(done.refitted)} consumers")
        else:
            out.print("compensation was no gain on held-out text; the weights are as they were")
    if done.kind is None:
        out.print(f"plan written to {clean(str(done.path))}; nothing was pruned", soft_wrap=True)
        return
    saved = f"saved to {clean(str(done.path))} ({megabytes(done.bytes or 0)})"
    out.print(saved, soft_wrap=True)
    if done.report is not None:
        out.print(f"report: {clean(str(done.report))}", soft_wrap=True)
    out.print(f"loads with from_pretrained{_loading(done)}")
    out.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in done.seconds.items()))


def _shares(done: Pruned) -> str:
    split = done.plan.settings.get("split")
    shares = split.items() if isinstance(split, dict) else ()
    return ", ".join(
        f"{name} {100 * share:g}%" for name, share in shares if isinstance(share, float)
    )


def _loading(done: Pruned) -> str:
    """Return what ``from_pretrained`` needs to load the folder, and why."""
    said = ""
    if "trust_remote_code=True" in done.needs:
        said += " and trust_remote_code=True"
    if "import llm_pruner" in done.needs:
        why = (
            "transformers does not have the model"
            if done.kind == "stock"
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
    sizes = [size for row in done.rows if row.layer is None for size in row.sizes.items()]
    return ", ".join(
        f"{kept:,} of {dense:,} {name}" for name, (kept, dense) in sizes if kept != dense
    )


def _widths(done: Pruned) -> Any:
    """Return kept widths, with runs of equal layers in one row; None if no layer changed."""
    layers = [row for row in done.rows if row.layer is not None]
    changed = dict.fromkeys(
        name
        for row in layers
        for name, (kept, dense) in row.sizes.items()
        if kept != dense and not row.removed
    )
    if not changed and not any(row.removed for row in layers):
        return None
    runs: list[tuple[list[int], tuple[str, ...]]] = []
    for row in layers:
        if row.removed:
            cells = ("removed", *("" for _ in changed))[: max(len(changed), 1)]
        else:
            cells = tuple(_cell(row.sizes.get(name)) for name in changed) or ("whole",)
        if runs and runs[-1][1] == cells:
            runs[-1][0].append(row.layer or 0)
        else:
            runs.append(([row.layer or 0], cells))
    rows = [(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]), *cells) for run, cells in runs]
    return table("Units kept", ("layer", *(changed or ("",))), rows)


def _cell(sizes: tuple[int, int] | None) -> str:
    return "" if sizes is None else "{} of {}".format(*sizes)
