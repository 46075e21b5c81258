"""``llm-pruner compress``: prune, recover, evaluate and report, in one command that can go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_pruner.cli import options
from llm_pruner.cli.evaluate import task_names
from llm_pruner.cli.output import (
    check_json,
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
from llm_pruner.errors import Interrupted, UserError
from llm_pruner.runtime.memory import BOTH, keep_kernels

if TYPE_CHECKING:
    from llm_pruner.commands.compress import Compressed

EXAMPLES = """\b
Examples:
  llm-pruner compress default --out small --time-budget 30m
  llm-pruner compress ./llama --out small --ratio 0.3 --data alpaca.jsonl
  llm-pruner compress ./llama --out small --calibration c4 \\
      --perplexity wikitext2 --tasks paper
"""

_HOW, _MEASURE = "What to do", "What to measure"


def command(
    model: options.Model,
    out: options.Out,
    overwrite: options.Overwrite = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Throw an interrupted run away, which the same command would go on with.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    json: options.JsonBesideOut = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of all parameters to remove. [default: 0.2]",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Parameters to keep, such as 5.4B, instead of --ratio.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How to prune: paper, balanced, best, fast, or a YAML file.",
            rich_help_panel=_HOW,
        ),
    ] = "best",
    time_budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="For everything, such as 30m or 2h; what pruning and measuring leave goes to "
            "recovery. [default: one pass over the data, or over 256 texts of self]",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Text to estimate importance on, as for prune. [default: self, the model's own]",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Text to recover on, as for recover; MODEL is the teacher. May be given several "
            "times. [default: self, what MODEL writes]",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    no_recover: Annotated[
        bool,
        typer.Option("--no-recover", help="Prune and measure alone.", rich_help_panel=_HOW),
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of all that is drawn.", rich_help_panel=_HOW)
    ] = 0,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Corpus to measure perplexity on, as for evaluate. May be given several times. "
            "[default: demo, a text that the package ships]",
            show_default=False,
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Zero-shot tasks to measure, such as boolq,piqa; paper for the paper's seven.",
            show_default=False,
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with boolq.jsonl and so on, to run the seven without a network.",
            show_default=False,
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Only the first N items of each task.",
            show_default=False,
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Make a smaller model: prune, recover, evaluate, report.

    An interrupted run goes on when the same command is given again.
    """
    keep_kernels(BOTH)
    from llm_pruner.settings.presets import recipe_file

    reads = (model, *(calibration or "").split(","), *(data or ()), *(perplexity or ()))
    check_json(json, (*reads, tasks_data, recipe_file(recipe)), out)
    if ratio is not None and params is not None:
        raise UserError("--ratio and --params say different things; give one of them")
    for option, given in (("--tasks-data", tasks_data), ("--limit", limit)):
        if given is not None and tasks is None:
            raise UserError(f"{option} {given} is about tasks; add --tasks NAMES or leave it out")
    for option, asked in (("--data", data), ("--time-budget", time_budget)):
        if no_recover and asked:
            raise UserError(f"{option} is about recovery; leave it or --no-recover out")
    from llm_pruner.commands.time_budget import parse_duration

    budget = None if time_budget is None else parse_duration(time_budget)
    from llm_pruner.planning import Target, parse_count

    if params is None:
        target = Target(ratio=0.2 if ratio is None else ratio)
    else:
        target = Target(params=parse_count(params))

    from llm_pruner.commands.compress import compress
    from llm_pruner.commands.compress_settings import CompressSettings, default_recovery
    from llm_pruner.commands.zero_shot import ZeroShotSettings
    from llm_pruner.settings.common import ModelSettings

    zero_shot = None
    if tasks is not None:
        zero_shot = ZeroShotSettings(task_names(tasks), tasks_data, limit)
    settings = CompressSettings(
        model=ModelSettings(model, revision, dtype, device, trust_remote_code),
        target=target,
        recipe=recipe,
        calibration=calibration,
        data=tuple(dict.fromkeys(data or ("self",))),
        recovery=None if no_recover else default_recovery(seed),
        time_budget=budget,
        perplexity=tuple(dict.fromkeys(perplexity or ("demo",))),
        zero_shot=zero_shot,
        seed=seed,
    )
    done = watched(
        lambda **telling: compress(
            settings, out, overwrite=overwrite, restart=restart, command=command_line(), **telling
        )
    )
    from llm_pruner.evaluation.contamination import shared_corpora

    done.notes.extend(shared_corpora(str(out), settings.perplexity))
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
