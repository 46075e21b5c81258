"""``llm-pruner demo``: the main job on the embedded model, and a table of before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import (
    check_json,
    clean,
    command_line,
    console,
    count,
    megabytes,
    print_table,
    table,
    write_json,
)
from llm_pruner.cli.prune import as_data, show

if TYPE_CHECKING:
    from llm_pruner.pipeline.demo import Demo

_OUT = Path("demo-out")


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")
    ] = _OUT,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace what --out holds; not needed for an earlier demo-out."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the calibration text.")] = 0,
    json: options.Json = None,
) -> None:
    """Prune the embedded model by 20% and compare before and after."""
    check_json(json)

    from llm_pruner.pipeline.demo import run_demo

    # The folder that the demo chooses by itself, it may replace by itself: but only a checkpoint
    # that was pruned, nothing else that a user may have called by this name.
    earlier = out == _OUT and (out / "plan.json").is_file()
    done = run_demo(out, overwrite=overwrite or earlier, seed=seed, command=command_line())
    write_json({"prune": as_data(done.pruned), "before": done.before, "after": done.after}, json)
    if json != "-":
        show(done.pruned)
        _compare(done)


def _compare(done: Demo) -> None:
    before, after = done.before, done.after
    old, new = before["perplexity"][0], after["perplexity"][0]
    rows = [
        _row("parameters", before["parameters"], after["parameters"], count),
        _row("size on disk", before["bytes"], after["bytes"], megabytes),
        _row("perplexity", old["perplexity"], new["perplexity"], _two_places),
        _row("prefill tokens/s", *_speeds(done, "prefill"), _one_place),
        _row("decode tokens/s", *_speeds(done, "decode"), _one_place),
    ]
    out = console()
    print_table(out, table("Before and after", ("", "dense", "pruned", "ratio"), rows))
    out.print(
        f"perplexity: {old['corpus']}, {old['tokens']:,} tokens in windows of "
        f"{old['window']}; float32, batch 1"
    )
    for name, found in (("dense", before), ("pruned", after)):
        for prompt, text in found["samples"].items():
            out.print(f"{name}: {clean(prompt)}|{clean(text)}")
    if done.pruned.report is not None:
        page = clean(str(done.pruned.report))
        out.print(f"all of this, to read in a browser: {page}", soft_wrap=True)


def _row(
    label: str, before: float, after: float, form: Callable[[Any], str]
) -> tuple[str, str, str, str]:
    return label, form(before), form(after), f"{after / before:.2f}"


def _speeds(done: Demo, stage: str) -> tuple[float, float]:
    key = f"{stage}_tokens_per_second"
    return done.before["speed"][key], done.after["speed"][key]


def _one_place(value: float) -> str:
    return f"{value:.1f}"


def _two_places(value: float) -> str:
    return f"{value:.2f}"
