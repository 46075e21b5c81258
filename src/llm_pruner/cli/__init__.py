"""The command ``llm-pruner``: parses, calls the pipeline, prints.

Exit codes: 0 done, 2 the user must change something, 1 anything else.
"""

from __future__ import annotations

import os
import sys

import typer

from llm_pruner.cli import demo, evaluate, inspect, prune
from llm_pruner.cli.output import fail
from llm_pruner.errors import LLMPrunerError, UserError

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
app.command("inspect")(inspect.command)
app.command("prune")(prune.command)
app.command("evaluate")(evaluate.command)
app.command("demo")(demo.command)


@app.callback()
def _root() -> None:
    """Make large language models smaller by removing whole structures."""


def main() -> None:
    """Run the command line and exit."""
    # Tokenizers would warn about every process that is started after they were used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        fail(str(error), 2)
    except LLMPrunerError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error}; free space or give another place, then run again", 1)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)
    sys.exit(0)
