"""``llm-pruner demo``: the main job on the embedded model, and a table of before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import clean, console, count, megabytes, table, write_json
from llm_pruner.cli.prune import as_data, show
from llm_pruner.pipeline.demo import Demo, run_demo


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo-out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --out holds.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the calibration text.")] = 0,
    json: options.Json = None,
) -> None:
    """Prune the embedded default model by 20% and compare before and after."""
    done = run_demo(out, overwrite=overwrite, seed=seed)
    write_json({"prune": as_data(done.pruned), "before": done.before, "after": done.after}, json)
    if json != "-":
        show(done.pruned)
        _compare(done)


def _compare(done: Demo) -> None:
    before, after = done.before, done.after
    results = before["perplexity"][0], after["perplexity"][0]
    rows: list[tuple[str, Any, Any, str]] = [
        _row("parameters", before["parameters"], after["parameters"], count),
        _row("size on disk", before["bytes"], after["bytes"], megabytes),
        _row("perplexity", *(r["perplexity"] for r in results), lambda x: f"{x:.2f}"),
    ]
    for label, key in (("prefill tokens/s", "prefill"), ("decode tokens/s", "decode")):
        rates = (m["speed"][f"{key}_tokens_per_second"] for m in (before, after))
        rows.append(_row(label, *rates, lambda x: f"{x:.1f}"))
    out = console()
    out.print(table("Before and after", ("", "dense", "pruned", "ratio"), rows))
    out.print(
        f"perplexity: {results[0]['corpus']}, {results[0]['tokens']} tokens in windows of "
        f"{results[0]['window']}; float32, batch 1"
    )
    for name, found in (("dense", before), ("pruned", after)):
        for prompt, text in found["samples"].items():
            out.print(f"{name}: {clean(prompt)}|{clean(text)}")


def _row(label: str, before: float, after: float, form: Any) -> tuple[str, Any, Any, str]:
    return label, form(before), form(after), f"{after / before:.2f}"
