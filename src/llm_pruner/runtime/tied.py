"""Runs a command, and ends it and all that it started when it, this process or its parent ends.

    python -I tied.py PARENT COMMAND ...

A script for `evaluation.serving`, in a session of its own; PARENT is the id of the process that
started it. It imports nothing but Python's own library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress

_DIE_WITH_PARENT = 1  # sys/prctl.h
_PATIENCE = 10.0
"""Seconds in which the command may end by itself."""


def main() -> None:
    """Run the command; the last thing done is to kill the whole session, this process included."""
    parent, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    running = None
    try:
        if os.getppid() == int(parent):  # else it has ended already
            running = subprocess.Popen(command)
            running.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if running is not None:
            running.terminate()
            with suppress(subprocess.TimeoutExpired):
                running.wait(_PATIENCE)
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
