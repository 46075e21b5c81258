"""``llm-pruner prune`` in two processes that torchrun starts: the plan of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from command import done, save_tiny, write_text
from two_processes import in_two_processes

pytestmark = pytest.mark.slow

SCRIPT = """
from llm_pruner.errors import UserError
from llm_pruner.importance import boundary_pass
from two_processes import carry_out

own = boundary_pass.loss_cotangent

def unsound(logits, ids, first):
    if first >= 32:  # in the second process
        raise UserError(f"the loss of calibration sample {first} is nan")
    return own(logits, ids, first)

def prepare(command):
    boundary_pass.loss_cotangent = unsound if command["fails"] else own
    return list

carry_out(prepare)
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
    return in_two_processes(made, SCRIPT, commands)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_plan_of_one(two: SimpleNamespace, made: Path, name: str) -> None:
    assert two.ends[0][:-1] == two.ends[1][:-1] == [[0]] * len(RUNS)
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
    assert [ends[-1] for ends in two.ends] == [[2], [2]]
    said = [line for line in two.err.splitlines() if "the loss of calibration sample" in line]
    assert set(said) == {"llm-pruner: the loss of calibration sample 32 is nan"}
    assert not (made / "failed").exists()
