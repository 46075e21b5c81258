"""``llm-pruner evaluate``: perplexity of a model, with all that a reader needs to compare it."""

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
"""


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
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Windows at once. [default: as memory for the logits allows]",
            show_default=False,
        ),
    ] = None,
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
    """Measure the perplexity of a model on text."""
    if not (perplexity or speed or prompt):
        raise UserError("nothing to measure; give --perplexity SRC, --speed or --prompt TEXT")
    check_json(json)
    if report is not None:
        from llm_pruner.pipeline.report import report_in

        report_in(report)  # what cannot be read is said before the model is loaded

    from llm_pruner.pipeline.evaluate import PerplexitySettings, measure
    from llm_pruner.pipeline.settings import ModelSettings

    settings = PerplexitySettings(
        cast("Protocol", protocol),
        seq_len,
        max_tokens,
        batch_size,
        split,
        text_field,
    )
    found = measure(
        ModelSettings(model, revision, dtype, device, trust_remote_code),
        perplexity or [],
        settings,
        prompts=prompt or [],
        chat=chat,
        speed=speed,
    )
    data = asdict(found)
    write_json(data, json)
    if report is not None:
        from llm_pruner.pipeline.report import add_evaluations, report_in, variant_of

        variant = variant_of(report, report_in(report), model, found.parameters)
        add_evaluations(report, {variant: data})
    if json != "-":
        show(data)
        if report is not None:
            page = clean(str(report / "report.html"))
            console().print(f"added to {page}", soft_wrap=True)


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
    if found["speed"]:
        out.print(
            f"prefill {found['speed']['prefill_tokens_per_second']:.1f} tokens/s, "
            f"decode {found['speed']['decode_tokens_per_second']:.1f} tokens/s"
        )
    for text, continuation in found["samples"].items():
        out.print(f"> {clean(text)}{clean(continuation)}")
