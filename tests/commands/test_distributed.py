"""``recover`` in two processes that torchrun starts: the run of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm_pruner.recovery.run
from command import WORDS, done, save_tiny
from llm_pruner.data.sequences import make_sequence
from llm_pruner.recovery.packing import lay_out
from llm_pruner.runtime.processes import Processes
from two_processes import in_two_processes

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


SCRIPT = """
import os
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
import llm_pruner.recovery.run as recovery
from llm_pruner.recovery.trainer import RecoveryTrainer
from two_processes import carry_out

plain, place = PartialState._prepare_backend, PartialState.set_device
step, micro_tokens = RecoveryTrainer.training_step, recovery.micro_tokens

def prepare(command):
    kinds = set()

    def watched(self, model, *args, **keywords):
        kinds.update(type(one).__name__ for one in model.parameters())
        if self.state.global_step == command.get("stop"):
            raise KeyboardInterrupt
        return step(self, model, *args, **keywords)

    RecoveryTrainer.training_step = watched
    recovery.micro_tokens = (lambda *_: 64) if command.get("small") else micro_tokens
    sharded = command.get("sharded", False)
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    # accelerate gives parts of the weights to GPUs alone: it is told that these have some.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._prepare_backend = (
        (lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)) if sharded else plain
    )
    PartialState.set_device = (
        (lambda self: setattr(self, "device", torch.device("cpu"))) if sharded else place
    )
    return lambda: ["DTensor" in kinds]

carry_out(prepare)
"""


Options = tuple[object, ...]


@pytest.fixture(scope="module")
def runs(made: Path) -> dict[str, Options]:
    """The options of each run that two processes are asked for, by its name."""
    data: Options = ("--data", made / "rows.jsonl", *QUICK, "--trainer", "bf16=false")
    taught = (*data, "--trainer", "save_steps=1", "--teacher", made / "dense", "--epochs", 2)
    return {
        "plain": (*data, "--keep-adapter", "--perplexity", "demo", "--perplexity-seq-len", 512),
        "full": (*taught, "--method", "full"),
        "parts": (*data, "--trainer", "save_steps=2"),
    }


@pytest.fixture(scope="module")
def two(made: Path, runs: dict[str, Options]) -> SimpleNamespace:
    """What became of runs in two processes: their output, and how each command ended in each.

    All together: to load PyTorch in each takes longer than the runs.
    """

    def command(name: str, *more: object, **how: object) -> dict[str, object]:
        words = ("recover", made / "small", "--out", made / f"two-{name}", *runs[name], *more)
        return {"words": list(map(str, words)), **how}

    commands = [command("plain", "--json", "-")]
    # Interrupted after three steps, and then gone on with; refused in both processes.
    commands.append(command("full", stop=3, small=True))
    commands.append(command("full", "--resume", small=True))
    commands.append(command("plain", "--seq-len", 513, "--overwrite"))
    commands.append(command("parts", stop=3, sharded=True))
    commands.append(command("parts", "--resume", sharded=True))
    return in_two_processes(
        made,
        SCRIPT,
        commands,
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
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


def test_every_command_ends_alike_in_both_processes(two: SimpleNamespace, made: Path) -> None:
    first, second = two.ends
    assert first == second
    assert [code for code, _ in first] == [0, 130, 0, 2, 130, 0]
    assert [spread for _, spread in first] == [False] * 4 + [True] * 2
    assert two.err.count("interrupted; go on with --resume") == 2
    assert not [*made.glob("*.recovering"), *made.glob(".*partial*")]


def test_one_process_speaks(two: SimpleNamespace) -> None:
    assert two.out.count('"saved_as"') == 1
    assert two.out.count("saved to ") == 2


def test_two_processes_train_as_one(
    two: SimpleNamespace, made: Path, runs: dict[str, Options]
) -> None:
    said, _ = json.JSONDecoder().raw_decode(two.out)
    assert said["saved_as"] == "stock"
    done("recover", made / "small", "--out", made / "one-plain", *runs["plain"])
    assert check_same(made / "two-plain", made / "one-plain")["perplexity"]


def test_teacher_small_batches_and_resume(
    two: SimpleNamespace,
    made: Path,
    runs: dict[str, Options],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm_pruner.recovery.run, "micro_tokens", lambda *_: 64)
    done("recover", made / "small", "--out", made / "one-full", *runs["full"])
    found = check_same(made / "two-full", made / "one-full")
    assert found["settings"]["teacher"] == "dense"


def test_weights_in_parts_train_as_whole_ones(
    two: SimpleNamespace, made: Path, runs: dict[str, Options]
) -> None:
    done("recover", made / "small", "--out", made / "one-parts", *runs["parts"])
    check_same(made / "two-parts", made / "one-parts")


def test_each_process_gets_a_share_of_a_step() -> None:
    sequences = [make_sequence([3] * length, [True] * length, 0) for length in range(3, 15)]
    chosen = range(len(sequences))
    for packed in (True, False):
        for shares in (1, 2, 3, 5):
            batches = lay_out(
                sequences, chosen, packed=packed, capacity=200, micro_tokens=400, shares=shares
            )
            assert len(batches) >= shares
            assert sorted(sample for one in batches for sample in one.samples) == list(chosen)
            dealt = [Processes(rank, shares).share(batches) for rank in range(shares)]
            assert sum(map(len, dealt)) == len(batches)
    (only,) = lay_out(sequences, [5], packed=True, capacity=20, micro_tokens=20, shares=3)
    assert [Processes(rank, 3).share([only]) for rank in range(3)] == [[only], [None], [None]]
    parts = [Processes(rank, 2, sharded=True).share([1, 2, 3]) for rank in (0, 1)]
    assert parts == [[1, 3], [2, None]]
