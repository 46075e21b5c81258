"""Runs commands, one after the other, in two processes that meet as those of torchrun do."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from new_processes import start

Command = dict[str, Any]
"""The ``words`` of a command, and what else its script reads."""


def in_two_processes(
    folder: Path, script: str, commands: Sequence[Command], **environment: str
) -> SimpleNamespace:
    """Run commands in each of two processes; the script hands `carry_out` what prepares them.

    Returns:
        ``out`` and ``err`` of both together, and ``ends``: of each process, of each command a list
        of its exit code and what the script adds.
    """
    (folder / "commands.json").write_text(json.dumps(commands))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    processes = {}
    for rank in ("0", "1"):
        said = folder / f"out-{rank}"
        processes[said] = start(script, folder, said=said, RANK=rank, LOCAL_RANK=rank, **shared)
    for said, process in processes.items():
        process.join(600)
        assert process.exitcode == 0, said.read_text() + said.with_name("err-0").read_text()
    out, err = (
        "".join((folder / f"{name}-{rank}").read_text() for rank in (0, 1))
        for name in ("out", "err")
    )
    ends = [
        [json.loads(line) for line in (folder / f"ends-{rank}").read_text().splitlines()]
        for rank in (0, 1)
    ]
    return SimpleNamespace(out=out, err=err, ends=ends)


def carry_out(prepare: Callable[[Command], Callable[[], list[Any]]]) -> NoReturn:
    """Run all commands in this process, and end it.

    Args:
        prepare: is called before each, and returns what tells more of its end.
    """
    here, rank = Path(sys.argv[1]), os.environ["RANK"]
    with (here / f"err-{rank}").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())

    from accelerate.state import PartialState

    from command import with_set
    from llm_pruner.cli import main, output

    output._PATIENCE = 0
    PartialState(cpu=True)  # they part at the end of all commands
    for command in json.loads((here / "commands.json").read_text()):
        more = prepare(command)
        sys.argv, code = ["llm-pruner", *with_set(command["words"])], 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        with (here / f"ends-{rank}").open("a") as file:
            print(json.dumps([code, *more()]), file=file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
