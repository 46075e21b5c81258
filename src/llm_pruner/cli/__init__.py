"""The command ``llm-pruner``: parses, calls a command, prints.

Exit codes: 0 done, 2 the user must change something, 1 anything else, 130 interrupted, 143 ended by
SIGTERM or SIGHUP.

The commands are imported when they run: PyTorch and transformers take seconds to import,
which help and typing errors should not wait for.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from llm_pruner.cli import (
    bench,
    compare,
    compress,
    curve,
    demo,
    evaluate,
    export,
    inspect,
    prune,
    recover,
    vocab,
)
from llm_pruner.cli.build import GroupedCommand, add
from llm_pruner.cli.output import fail, one_line
from llm_pruner.errors import Interrupted, LLMPrunerError, PlanError, UserError
from llm_pruner.files.disk import placed
from llm_pruner.runtime.memory import keep_large_blocks
from llm_pruner.runtime.signals import INTERRUPTED, deaf_at_the_end, ended_alike, exit_code
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.curve import CurveSettings
from llm_pruner.settings.evaluate import BenchSettings, EvaluateSettings, InspectSettings
from llm_pruner.settings.export import ExportSettings
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.settings.vocab import VocabSettings
from llm_pruner.version import __version__

app = typer.Typer(
    name="llm-pruner",
    help="Make large language models smaller by removing whole structures: heads, FFN channels, "
    "hidden channels, layers. The result is a dense model that from_pretrained loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
add(app, "compress", CompressSettings, compress.run, compress.EXAMPLES)
add(app, "inspect", InspectSettings, inspect.run, inspect.EXAMPLES)
add(app, "prune", PruneSettings, prune.run, prune.EXAMPLES)
add(app, "curve", CurveSettings, curve.run, curve.EXAMPLES)
add(app, "vocab", VocabSettings, vocab.run, vocab.EXAMPLES)
add(app, "recover", RecoverSettings, recover.run, recover.EXAMPLES)
add(app, "evaluate", EvaluateSettings, evaluate.run, evaluate.EXAMPLES)
app.command("compare", cls=GroupedCommand, epilog=compare.EXAMPLES)(compare.command)
add(app, "bench", BenchSettings, bench.run, bench.EXAMPLES)
add(app, "export", ExportSettings, export.run, export.EXAMPLES)
app.command("demo", cls=GroupedCommand)(demo.command)


def _version(asked: bool) -> None:
    if asked:
        print(f"llm-pruner {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make large language models smaller by removing whole structures."""


def main() -> None:
    """Run the command line and exit."""
    with ended_alike():
        try:
            _run()
        except KeyboardInterrupt:
            fail(_interrupted(), exit_code())
        finally:
            deaf_at_the_end()


def _run() -> None:
    placed.clear()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    keep_large_blocks()
    # Tokenizers would warn about every process that is started after they were used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # DDP notes in each process that no weight was left out; read when PyTorch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except PlanError as error:
        head, *more = str(error).split("\n")
        fail("\n".join([one_line(head), *more]), 2)
    except Interrupted as error:
        fail(one_line(str(error)), exit_code())
    except LLMPrunerError as error:
        fail(one_line(str(error)), 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        fail(one_line(re.sub(r"^\[Errno \d+\] ", "", str(error))), 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch is not imported to ask
            raise
        fail(
            "the memory of the GPU is full; free some, or use --memory, --dtype bfloat16, "
            "--device cpu, a smaller --batch-size, --trainer gradient_checkpointing=true, or "
            "--set seq_len=N with a smaller N",
            1,
        )
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:
            fail(_interrupted(), exit_code())
        raise


def _interrupted() -> str:
    """Say what is left; all that is not complete is gone."""
    if not placed:
        return "interrupted; nothing was written"
    return f"interrupted; {one_line(str(placed[-1]))} is complete"
