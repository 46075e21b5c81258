"""``llm-pruner recover`` in two processes that torchrun starts: the run of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm_pruner.recovery.run
from command import WORDS, done, save_tiny
from llm_pruner.data.sequences import make_sequence
from llm_pruner.recovery.packing import lay_out
from llm_pruner.recovery.processes import Processes

pytestmark = pytest.mark.slow

QUICK = ("--seq-len", "64", "--batch-size", "10", "--evaluations", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its teacher, and data of which the last step is a small one."""
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny(folder / "small", num_hidden_layers=2)
    save_tiny(folder / "dense", num_hidden_layers=3)
    rows = [{"text": (WORDS[n:] + WORDS)[: 20 + n]} for n in range(43)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def started(*command: object) -> subprocess.CompletedProcess[str]:
    """Start two processes of ``python`` with these arguments, and wait for them."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as logs:
        return subprocess.run(
            [sys.executable, "-m", *launcher, "--log-dir", logs, *map(str, command)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )


def check_same(two: Path, one: Path) -> dict[str, Any]:
    """Check that two folders hold the same run; return the record of the first."""
    assert sorted(path.name for path in two.rglob("*")) == sorted(
        path.name for path in one.rglob("*")
    )
    found, wanted = (json.loads((path / "recovery.json").read_text()) for path in (two, one))
    assert len(found["losses"]) == len(wanted["losses"]) > 2
    assert np.abs(np.subtract(found["losses"], wanted["losses"])).max() < 1e-4
    assert found["losses"][-1] < found["losses"][0]
    assert np.abs(np.subtract(found["evaluations"], wanted["evaluations"])).max() < 1e-4
    for key in ("tokens", "steps", "best_step", "gained", "trained", "packed", "settings"):
        assert found[key] == wanted[key], key
    weights, others = (load_file(path / "model.safetensors") for path in (two, one))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], rtol=0, atol=1e-5), name
    return dict(found)


def test_two_processes_train_as_one(tmp_path: Path, made: Path) -> None:
    options: Sequence[object] = (
        "--data",
        made / "rows.jsonl",
        *QUICK,
        "--no-bf16",
        "--keep-adapter",
    )
    options = (*options, "--perplexity", "demo", "--perplexity-seq-len", 512)
    command = ("recover", made / "small", "--out")
    result = started("-m", "llm_pruner", *command, tmp_path / "two", *options, "--json", "-")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)  # one process speaks
    assert said["saved_as"] == "stock"
    done(*command, tmp_path / "one", *options)
    found = check_same(tmp_path / "two", tmp_path / "one")
    assert found["perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_teacher_small_batches_and_resume(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options: Sequence[object] = (
        "--data",
        made / "rows.jsonl",
        *QUICK,
        "--no-bf16",
        "--save-every",
        "1",
    )
    options = (*options, "--teacher", made / "dense", "--epochs", "2", "--method", method)
    two = ["recover", made / "small", "--out", tmp_path / "two", *options]
    commands = [
        # Interrupted after three steps, and then gone on with.
        two,
        [*two, "--resume"],
        # Refused in both processes.
        ["recover", made / "small", "--out", tmp_path / "no", *options, "--seq-len", "513"],
    ]
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "import llm_pruner.recovery.run as recovery\n"
        "from llm_pruner.cli import main, output\n"
        "from llm_pruner.recovery.trainer import RecoveryTrainer\n"
        "recovery.micro_tokens = lambda *_: 64\n"
        "output._PATIENCE = 0\n"
        "real = RecoveryTrainer.training_step\n"
        "def interrupted(self, *args, **keywords):\n"
        "    if self.state.global_step == 3:\n"
        "        raise KeyboardInterrupt\n"
        "    return real(self, *args, **keywords)\n"
        "RecoveryTrainer.training_step = interrupted\n"
        f"for command in json.loads({json.dumps(json.dumps(commands, default=str))}):\n"
        "    sys.argv = ['llm-pruner', *command]\n"
        "    code = 0\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stopped:\n"
        "        code = stopped.code or 0\n"
        "    RecoveryTrainer.training_step = real\n"
        f"    with open({str(tmp_path)!r} + '/ends-' + os.environ['RANK'], 'a') as file:\n"
        "        print(code, file=file)\n"
        "sys.stderr.flush()\n"
        "os._exit(0)\n"
    )
    result = started(script)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        assert (tmp_path / f"ends-{rank}").read_text().split() == ["130", "0", "2"]
    assert result.stderr.count("interrupted; go on with --resume") == 1
    assert not (tmp_path / "no.recovering").exists()
    monkeypatch.setattr(llm_pruner.recovery.run, "micro_tokens", lambda *_: 64)
    done("recover", made / "small", "--out", tmp_path / "one", *options)
    found = check_same(tmp_path / "two", tmp_path / "one")
    assert found["settings"]["teacher"] == "dense"


def test_each_process_gets_a_share_of_a_step() -> None:
    sequences = [make_sequence([3] * length, [True] * length, 0) for length in range(3, 15)]
    chosen = range(len(sequences))
    for packed in (True, False):
        for shares in (1, 2, 3, 5):
            batches = lay_out(
                sequences, chosen, packed=packed, capacity=200, micro_tokens=400, shares=shares
            )
            assert len(batches) >= shares
            assert sorted(part.sample for one in batches for part in one.parts) == list(chosen)
            dealt = [Processes(rank, shares).share(batches) for rank in range(shares)]
            assert sum(map(len, dealt)) == len(batches)
    (only,) = lay_out(sequences, [5], packed=True, capacity=20, micro_tokens=20, shares=3)
    assert [len(Processes(rank, 3).share([only])) for rank in range(3)] == [1, 0, 0]
