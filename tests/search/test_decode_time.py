"""A share of the time of a decoding step as the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import done, run, save_tiny
from families import make
from helpers import tiny_model
from llm_pruner import Selection, Target, allocate, discover
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from llm_pruner.search import decode_time
from llm_pruner.search.decode_time import params_for_decode_time
from llm_pruner.surgery.removal import count_parameters


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Machine:
    """Takes a fixed time for a step and more for each parameter, and counts what it timed."""

    def __init__(self, fixed: float, noise: float = 0.0) -> None:
        self.fixed, self.timed = fixed, 0
        self._noise = np.random.default_rng(0).normal(scale=noise, size=100)

    def __call__(self, dense: Any, pruned: Any) -> float:
        share = parameters(pruned) / parameters(dense)
        self.timed += 1
        return float(self.fixed + (1 - self.fixed) * share + self._noise[self.timed])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.6])
def test_a_machine_with_overhead_is_asked_for_fewer_parameters(family: str, fixed: float) -> None:
    model: Any = make(family)
    discovery, machine = discover(model), Machine(fixed)
    selection = Selection(("ffn",), scope="global", spread=2)
    params, trials = params_for_decode_time(model, discovery, selection, 0.1, machine)
    dense = count_parameters(discovery)
    assert parameters(model) == dense  # left as it was
    wanted = dense * (1 - 0.1 / (1 - fixed))
    assert params == pytest.approx(wanted, abs=0.04 * dense)  # units are coarse
    assert machine.timed == len(trials) <= 3
    assert all(one.saved == pytest.approx((1 - fixed) * (1 - one.params / dense)) for one in trials)


def test_noise_ends_near_what_was_asked_for() -> None:
    model: Any = make("llama")
    discovery, machine = discover(model), Machine(0.3, noise=0.01)
    params, trials = params_for_decode_time(model, discovery, Selection(("ffn",)), 0.2, machine)
    dense = count_parameters(discovery)
    assert 0.7 * (1 - params / dense) == pytest.approx(0.2, abs=0.05)
    assert len(trials) <= decode_time.TRIALS


def test_what_cannot_be_saved_is_refused() -> None:
    model: Any = make("llama")
    discovery = discover(model)
    with pytest.raises(UserError, match=r"decode_time=0.9 was not reached in \d trials: with"):
        params_for_decode_time(model, discovery, Selection(("ffn",)), 0.9, Machine(0.3))
    with pytest.raises(UserError, match="has to become a number of parameters by timing"):
        allocate(discovery, {}, Selection(("ffn",)), Target(decode_time=0.2))


def test_a_quarter_of_the_layers_takes_less_time() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=16)
    smaller: Any = tiny_model("llama", num_hidden_layers=4)
    assert decode_time._ratio(model, smaller) < 0.7


def test_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_time, "_ratio", Machine(0.3))
    dense = save_tiny(tmp_path / "dense")
    given = ("--decode-time", 0.1, "--criterion", "l2", "--structures", "ffn")
    told = done("prune", dense, "--out", tmp_path / "out", *given, "--json", tmp_path / "run.json")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    before, after = (parameters(load_model(str(path)).model) for path in (dense, tmp_path / "out"))
    assert plan["target"]["decode_time"] == 0.1
    assert plan["target"]["params"] == pytest.approx(after, abs=0.005 * before)
    assert 1 - after / before == pytest.approx(0.1 / 0.7, abs=0.02)
    timed = json.loads((tmp_path / "run.json").read_text())["timed"]
    assert timed[-1] == {"params": plan["target"]["params"], "saved": pytest.approx(0.1, abs=0.01)}
    assert f"removed {100 * timed[-1]['saved']:.1f}%" in " ".join(told.out.split())


def test_by_command_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    for given, said in {
        ("--decode-time", 1.5): "outside (0, 1)",
        ("--decode-time", 0.2, "--ratio", 0.2): "say different things",
    }.items():
        result = run("prune", dense, "--out", tmp_path / "out", "--criterion", "l2", *given)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert said in result.err
