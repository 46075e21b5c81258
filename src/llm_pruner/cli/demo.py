"""``llm-pruner demo``: ``compress`` on the embedded model, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_pruner.cli import options
from llm_pruner.cli.compress import finish, watched
from llm_pruner.cli.output import check_json, command_line
from llm_pruner.runtime.memory import BOTH, keep_kernels

_OUT = Path("demo-out")


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")
    ] = _OUT,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace --out, if llm-pruner wrote all in it; an earlier demo-out always is.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an interrupted demo away.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is drawn.")] = 0,
    json: options.Json = None,
) -> None:
    """Compress the embedded model by 20%: prune, recover, compare.

    An interrupted demo goes on when it is started again.
    """
    check_json(json, out=out)

    keep_kernels(BOTH)
    from llm_pruner.commands.compress import compress
    from llm_pruner.commands.demo import demo_settings

    # The folder that the demo chooses by itself, it may replace by itself: but only a checkpoint
    # that was pruned, nothing else that a user may have called by this name.
    earlier = out == _OUT and (out / "plan.json").is_file()
    settings = demo_settings(out, overwrite=overwrite or earlier, restart=restart, seed=seed)
    done = watched(lambda **telling: compress(settings, command=command_line(), **telling))
    finish(done, json)
