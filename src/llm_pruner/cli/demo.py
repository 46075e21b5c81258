"""``llm-pruner demo``: make the embedded model smaller in minutes, and show what that did."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_pruner.cli.build import Json
from llm_pruner.cli.output import Screen, check_json, command_line, hand_over
from llm_pruner.report.text import count, megabytes
from llm_pruner.runtime.memory import PRUNING, keep_kernels

if TYPE_CHECKING:
    from llm_pruner.commands.demo import Demo
    from llm_pruner.report.records import Measured

_OUT = Path("demo-out")


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")
    ] = _OUT,
    json: Json = None,
) -> None:
    """Make the embedded SmolLM2-135M a tenth smaller, and compare what is left of it.

    The result of an earlier demo is replaced.
    """
    keep_kernels(PRUNING)
    check_json(json, out)
    from llm_pruner.commands.demo import run_demo, settings_of

    # Its own folder it may replace, but nothing else that a user gave this name.
    settings = settings_of(out, overwrite=out == _OUT and (out / "plan.json").is_file())
    show = (lambda *_: None) if json == "-" else _show_stage
    hand_over(run_demo(settings, command_line(), show), json, _show)


def _show_stage(stage: str, found: Measured) -> None:
    """Print one model's figures while the next one is made."""
    (text,) = found.perplexity
    far = "" if text.divergence is None else f", KL {text.divergence.kl:.3f}"
    print(
        f"{stage}: {count(found.parameters)} parameters, "
        f"perplexity {text.perplexity:.1f}{far}, {_decoding(found)} tokens/s"
    )
    sys.stdout.flush()


def _show(done: Demo) -> None:
    """Print the models side by side, what each answers, and what to do next."""
    from llm_pruner.commands.demo import PROMPT

    out, found = Screen(), [*done.measured.values()]
    texts = [one.perplexity[0] for one in found]
    kl = ["-" if one.divergence is None else f"{one.divergence.kl:.3f}" for one in texts]
    rows = [
        ("parameters", *(count(one.parameters) for one in found)),
        ("size in float32", *(megabytes(4 * one.parameters) for one in found)),
        ("decoding, tokens/s", *map(_decoding, found)),
        ("perplexity", *(f"{one.perplexity:.1f}" for one in texts)),
        ("KL from dense", *kl),
    ]
    out.table("Side by side", ("", *done.measured), rows)
    print(f"\nAsked: {PROMPT}")
    for stage, one in done.measured.items():
        print(textwrap.fill(f"{stage}: {one.samples[PROMPT]}", 80, subsequent_indent="  "))
    print()
    out.places(done.pruned.path, done.pruned.report)
    print("Now your own model:\n  llm-pruner prune MODEL --out small --ratio 0.2 --preset best")


def _decoding(found: Measured) -> str:
    return "-" if found.speed is None else f"{found.speed.decode_tokens_per_second:.1f}"
