"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, .gguf file, or 'default' for the embedded SmolLM2-135M.",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto for what the checkpoint has.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, auto.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the results for scripts; - for stdout."),
]
