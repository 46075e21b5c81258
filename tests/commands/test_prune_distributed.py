"""``llm-pruner prune`` in two processes that torchrun starts: the plan of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from command import done, save_tiny, write_text

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path
from accelerate.state import PartialState
from llm_pruner.cli import main, output
from llm_pruner.errors import UserError
from llm_pruner.importance import boundary_pass

output._PATIENCE = 0
PartialState(cpu=True)  # they part at the end of all commands
here = Path(sys.argv[1])
own = boundary_pass.loss_cotangent

def unsound(logits, ids, first):
    if first >= 32:  # in the second process
        raise UserError(f"the loss of calibration sample {first} is nan")
    return own(logits, ids, first)

for command in json.loads((here / "commands.json").read_text()):
    boundary_pass.loss_cotangent = unsound if command["fails"] else own
    sys.argv, code = ["llm-pruner", *command["words"]], 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    with open(here / f"ends-{os.environ['RANK']}", "a") as file:
        print(code, file=file)
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""

# 3,072 tokens: a batch for each process.
TEXT = ("--calibration", "text.txt", "--samples", 48, "--seq-len", 64, "--ratio", 0.2)
PAPER = ("--preset", "paper", "--protect-first", 0, "--protect-last", 0)
RUNS: dict[str, tuple[object, ...]] = {
    "mixed": (*PAPER, "--order", "mixed", "--dry-run"),
    "best": ("--preset", "best", "--dry-run"),
    "streamed": ("--preset", "fast", "--memory", "100KB", "--dry-run"),
    "paper": (*PAPER, "--json", "-"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny(folder / "dense", num_hidden_layers=2)
    write_text(folder / "text.txt", 16_000)
    return folder


def words(made: Path, name: str, out: str) -> list[str]:
    """Return the command of a run."""
    given = [made / "text.txt" if word == "text.txt" else word for word in TEXT]
    return [*map(str, ("prune", made / "dense", "--out", made / out, *RUNS[name], *given))]


@pytest.fixture(scope="module")
def two(made: Path) -> SimpleNamespace:
    """What two processes left and said; the last command fails in the second one."""
    commands = [{"words": words(made, name, f"two-{name}"), "fails": False} for name in RUNS]
    commands.append({"words": words(made, "mixed", "failed"), "fails": True})
    (made / "commands.json").write_text(json.dumps(commands))
    (made / "script.py").write_text(SCRIPT)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with tempfile.TemporaryDirectory() as logs:
        result = subprocess.run(
            [sys.executable, "-m", *launcher, "--log-dir", logs, made / "script.py", made],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=180,
        )
    assert result.returncode == 0, result.stderr
    ends = [[*map(int, (made / f"ends-{rank}").read_text().split())] for rank in (0, 1)]
    return SimpleNamespace(out=result.stdout, err=result.stderr, ends=ends)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_plan_of_one(two: SimpleNamespace, made: Path, name: str) -> None:
    assert two.ends[0][:-1] == two.ends[1][:-1] == [0] * len(RUNS)
    done(*words(made, name, f"one-{name}"))
    one, both = made / f"one-{name}", made / f"two-{name}"
    if name == "paper":
        importance = [
            json.loads((folder / "report.json").read_text())["importance"] for folder in (one, both)
        ]
        assert importance[0] == importance[1] != []
        one, both = one / "plan.json", both / "plan.json"
    assert both.read_bytes() == one.read_bytes()


def test_one_process_speaks_and_writes(two: SimpleNamespace, made: Path) -> None:
    assert two.out.count("plan written to") == 3
    assert two.out.count('"saved_as"') == 1
    assert not [*made.glob(".*partial*")]


def test_what_fails_in_one_is_said_once(two: SimpleNamespace, made: Path) -> None:
    assert [ends[-1] for ends in two.ends] == [2, 2]
    said = [line for line in two.err.splitlines() if "the loss of calibration sample" in line]
    assert set(said) == {"llm-pruner: the loss of calibration sample 32 is nan"}
    assert not (made / "failed").exists()
