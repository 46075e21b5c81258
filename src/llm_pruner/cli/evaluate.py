"""``llm-pruner evaluate``: perplexity and zero-shot tasks, with what a comparison needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import (
    check_json,
    clean,
    console,
    count,
    print_table,
    table,
    warn,
    write_json,
)
from llm_pruner.errors import UserError

if TYPE_CHECKING:
    from llm_pruner.evaluation.perplexity import Protocol

EXAMPLES = """\b
Examples:
  llm-pruner evaluate ./small --perplexity wikitext2 --perplexity c4
  llm-pruner evaluate ./small --perplexity text.txt --protocol paper
  llm-pruner evaluate ./small --perplexity c4 --report ./small
  llm-pruner evaluate ./small --tasks paper
  llm-pruner evaluate ./small --tasks paper --tasks-data tasks/ --limit 200
"""

TASKS = "Zero-shot tasks"
"""Heading of the options that say which tasks are run."""

PAPER = "paper"
"""The word for the seven tasks of the paper."""


def command(
    model: options.Model,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Corpus: wikitext2, ptb, c4, another hub dataset, a local file, or 'demo' for the "
            "text that the package ships. May be given several times.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="standard: long windows; paper: windows of 128, as LLM-Pruner does.",
        ),
    ] = "standard",
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in a window. [default: 2048 or the model's maximum; 128 for paper]",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read only this many tokens.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, such as boolq,piqa; 'paper' for the seven of "
            "LLM-Pruner: boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.",
            show_default=False,
            rich_help_panel=TASKS,
        ),
    ] = None,
    tasks_data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with boolq.jsonl and so on, to run the seven without a network. "
            "[default: the datasets on the hub]",
            show_default=False,
            rich_help_panel=TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Only the first N items of each task. [default: all]",
            show_default=False,
            rich_help_panel=TASKS,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(metavar="N", help="Sequences at once, or auto: as fits the memory."),
    ] = "auto",
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Run tasks again whose results for this model are known, keep none.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of a hub dataset.", show_default=False),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Field that holds the text.", show_default=False),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Show what the model writes after this text. May be given several times.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="Ask the prompt in the tokenizer's chat template, if it has one, or continue it.",
        ),
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Add the results to the report in this folder, which prune wrote; MODEL is this "
            "folder, or the dense model that it was made of.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure perplexity, zero-shot tasks, speed, samples."""
    if not (perplexity or tasks is not None or speed or prompt):
        raise UserError(
            "nothing to measure; give --perplexity SRC, --tasks NAMES, --speed or --prompt TEXT"
        )
    for option, given in (("--tasks-data", tasks_data), ("--limit", limit)):
        if given is not None and tasks is None:
            raise UserError(f"{option} {given} is about tasks; add --tasks NAMES or leave it out")
    check_json(json, (model, *(perplexity or ()), tasks_data), report)
    if report is not None:
        from llm_pruner.report.write import report_in

        report_in(report)  # what cannot be read is said before the model is loaded
    sequences = _batch_size(batch_size)

    from llm_pruner.commands.evaluate import PerplexitySettings, measure
    from llm_pruner.commands.zero_shot import ZeroShotSettings
    from llm_pruner.evaluation.contamination import shared_corpora
    from llm_pruner.settings.common import ModelSettings

    settings = PerplexitySettings(
        cast("Protocol", protocol),
        seq_len,
        max_tokens,
        sequences,
        split,
        text_field,
    )
    for warning in shared_corpora(model, perplexity or []):
        warn(warning)
    found = measure(
        ModelSettings(model, revision, dtype, device, trust_remote_code),
        perplexity or [],
        settings,
        zero_shot=None
        if tasks is None
        else ZeroShotSettings(
            task_names(tasks),
            None if tasks_data is None else Path(tasks_data),
            limit,
            sequences,
            not no_cache,
        ),
        prompts=prompt or [],
        chat=chat,
        speed=speed,
    )
    data = asdict(found)
    write_json(data, json)
    if report is not None:
        from llm_pruner.report.write import add_evaluations, report_in, variant_of

        variant = variant_of(report, report_in(report), model, found.parameters)
        add_evaluations(report, {variant: data})
    if json != "-":
        show(data)
        if report is not None:
            page = clean(str(report / "report.html"))
            console().print(f"added to {page}", soft_wrap=True)


def task_names(text: str) -> tuple[str, ...]:
    """Return the tasks that ``--tasks`` names: ``paper``, or names with commas between them."""
    from llm_pruner.data.task_files import LOCAL_TASKS

    return LOCAL_TASKS if text == PAPER else tuple(name.strip() for name in text.split(","))


def _batch_size(text: str) -> int | None:
    """Return the number that was given, None for ``auto``."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size {text} is no number of sequences; use 1 or more, or auto")
    return int(text)


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    out = console()
    out.print(f"{clean(found['model'])}: {count(found['parameters'])} parameters")
    if found["perplexity"]:
        rows = [
            (
                result["corpus"],
                result["split"] or "-",
                result["protocol"],
                result["window"],
                f"{result['tokens']:,}",
                f"{result['perplexity']:.2f}",
                "-" if result["stderr"] is None else f"{result['stderr']:.2f}",
            )
            for result in found["perplexity"]
        ]
        columns = ("corpus", "split", "protocol", "window", "tokens", "perplexity", "stderr")
        print_table(out, table("Perplexity", columns, rows))
    if found["zero_shot"]:
        show_tasks(found["zero_shot"])
    if found["speed"]:
        out.print(
            f"prefill {found['speed']['prefill_tokens_per_second']:.1f} tokens/s, "
            f"decode {found['speed']['decode_tokens_per_second']:.1f} tokens/s"
        )
    for text, continuation in found["samples"].items():
        out.print(f"> {clean(text)}{clean(continuation)}")


def show_tasks(found: dict[str, Any]) -> None:
    """Print a line for each metric of each task, and the means."""
    out = console()
    rows = [
        (
            result["task"] if number == 0 else "",
            f"{result['documents']:,}" if number == 0 else "",
            f"{name} *" if name == result["paper_metric"] else name,
            f"{metric['value']:.4f}",
            "-" if metric["stderr"] is None else f"{metric['stderr']:.4f}",
        )
        for result in found["tasks"]
        for number, (name, metric) in enumerate(result["metrics"].items())
    ]
    title = f"Zero-shot (lm-evaluation-harness {found['versions']['lm_eval']})"
    columns = ("task", "items", "metric", "value", "stderr")
    print_table(out, table(title, columns, rows, text=("metric",)))
    for key, words in (("mean", "seven tasks"), ("mean_without_boolq", "six without boolq")):
        mean = found[key]
        if mean is not None:
            spread = "" if mean["stderr"] is None else f" +- {mean['stderr']:.4f}"
            out.print(f"mean of the {words}: {mean['value']:.4f}{spread}")
    if any(result["paper_metric"] for result in found["tasks"]):
        out.print("* the metric that LLM-Pruner reports, and that a mean takes")
    cut = {result["task"]: result["truncated"] for result in found["tasks"] if result["truncated"]}
    if cut:
        names = ", ".join(f"{count:,} of {task}" for task, count in cut.items())
        out.print(f"longer than the model reads, so their start was cut: {clean(names)}")
    if found["cached"]:
        out.print(f"known from an earlier run: {clean(', '.join(found['cached']))}")
