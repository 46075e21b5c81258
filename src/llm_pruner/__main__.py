"""``python -m llm_pruner``: the command line."""

from __future__ import annotations

import os
import sys

from llm_pruner.cli import main
from llm_pruner.runtime.signals import INTERRUPTED, TERMINATED


def run() -> None:
    """Run the command.

    Of several processes that a launcher started, each ends at once when it is done: threads that
    libraries leave running may abort an interpreter that is being taken down, which the launcher
    would take for a failure of the run. One that was interrupted does as well: where Python was in
    code that a library in C had it run, it would end itself by a signal in place of its exit code.
    """
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    if os.environ.get("WORLD_SIZE", "1") == "1" and code not in (INTERRUPTED, TERMINATED):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
