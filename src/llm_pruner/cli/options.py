"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LOADING = "Loading"
"""Heading of the options that say how a model is loaded."""

OUTPUT = "Output"
"""Heading of the options that say what is written."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, .gguf file, or 'default' for the embedded SmolLM2-135M.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Branch, tag or commit on the hub.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="float32, bfloat16, float16, or auto for what the checkpoint has.",
        rich_help_panel=LOADING,
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="Where to run: cpu, cuda or auto.", rich_help_panel=LOADING),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=LOADING,
    ),
]
_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def _standard_output(file: str | None) -> str | None:
    """Return ``-`` for the names that systems have for it."""
    return "-" if file in _STDOUT else file


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the results for scripts; - for stdout.",
        callback=_standard_output,
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="Folder to write.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace --out, if llm-pruner wrote all in it.", rich_help_panel=OUTPUT
    ),
]
MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest weight file.", rich_help_panel=OUTPUT)
]
JsonBesideOut = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the results for scripts; - for stdout.",
        callback=_standard_output,
        rich_help_panel=OUTPUT,
    ),
]
