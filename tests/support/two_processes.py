"""Runs commands, one after the other, in two processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

Command = dict[str, Any]
"""The ``words`` of a command, and what else its script reads."""

_LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def in_two_processes(
    folder: Path, script: str, commands: Sequence[Command], **environment: str
) -> SimpleNamespace:
    """Run commands in each of two processes; the script hands `carry_out` what prepares them.

    Returns:
        ``out`` and ``err`` of both together, and ``ends``: of each process, of each command a list
        of its exit code and what the script adds.
    """
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "script.py").write_text(script)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as logs:
        result = subprocess.run(
            [sys.executable, "-m", *_LAUNCHER, "--log-dir", logs, folder / "script.py", folder],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                **environment,
            },
            timeout=600,
        )
    assert result.returncode == 0, result.stderr
    ends = [
        [json.loads(line) for line in (folder / f"ends-{rank}").read_text().splitlines()]
        for rank in (0, 1)
    ]
    return SimpleNamespace(out=result.stdout, err=result.stderr, ends=ends)


def carry_out(prepare: Callable[[Command], Callable[[], list[Any]]]) -> NoReturn:
    """Run all commands in this process, and end it.

    Args:
        prepare: is called before each, and returns what tells more of its end.
    """
    from accelerate.state import PartialState

    from llm_pruner.cli import main, output

    output._PATIENCE = 0
    PartialState(cpu=True)  # they part at the end of all commands
    here = Path(sys.argv[1])
    for command in json.loads((here / "commands.json").read_text()):
        more = prepare(command)
        sys.argv, code = ["llm-pruner", *command["words"]], 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        with (here / f"ends-{os.environ['RANK']}").open("a") as file:
            print(json.dumps([code, *more()]), file=file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
