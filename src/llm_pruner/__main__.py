"""``python -m llm_pruner``: the command line."""

from __future__ import annotations

import os
import sys

from llm_pruner.cli import main


def run() -> None:
    """Run the command.

    Of several processes that a launcher started, each ends at once when it is done: threads that
    libraries leave running may abort an interpreter that is being taken down, which the launcher
    would take for a failure of the run.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        main()
        return
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
