"""How shares are laid over layers: profiles, and the search that moves units between layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from command import done, run, save_tiny, write_text
from fake_discovery import fake_llama, fake_scores
from helpers import tiny_model
from llm_pruner import Criterion, Selection, Target, discover, score
from llm_pruner.errors import UserError
from llm_pruner.planning import TOLERANCE, check, find_allocation
from llm_pruner.search.layer_allocation import AllocationSearch, search_allocation
from llm_pruner.search.moves import Moves
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Removal

MODEL = fake_llama(6, hidden=64, ffn=200, kv_heads=4, repeat=2, head_dim=8)


def shares(discovery: Discovery, removal: Removal, kind: str = "ffn") -> list[float]:
    groups = [group for group in discovery.groups if group.kind == kind]
    return [len(removal.get(group.name, ())) / group.size for group in groups]


def test_log_takes_more_from_later_layers_and_as_much_in_all() -> None:
    scores = fake_scores(MODEL)
    target = Target(ratio=0.2)
    selection = Selection(("ffn",), profile="log")
    removal = find_allocation(MODEL, scores, selection, target).removal()
    found = np.array(shares(MODEL, removal))
    assert (np.diff(found) > 0).all()
    assert found[0] == pytest.approx(found.mean() / 2, rel=0.05)
    rise = np.log(np.arange(1, 7)) / np.log(6)
    expected = found.mean() * (0.5 + 0.5 * rise / rise.mean())
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert 1 - count_parameters(MODEL, removal) / count_parameters(MODEL) == pytest.approx(
        0.2, abs=TOLERANCE
    )


def test_owl_spares_the_layer_with_outliers() -> None:
    scores = dict(fake_scores(MODEL))
    for group in MODEL.groups:
        scores[group.name] = np.ones(group.size) + np.arange(group.size) / group.size
        if group.kind == "ffn" and group.layer == 3:
            scores[group.name][-10:] = 100.0
    for target in (Target(ratio=0.15), Target(unit_ratio=0.3)):
        selection = Selection(("ffn",), profile="owl")
        found = shares(MODEL, find_allocation(MODEL, scores, selection, target).removal())
        others = found[:3] + found[4:]
        assert found[3] == pytest.approx(np.mean(found) * 0.6, rel=0.05)
        assert max(others) - min(others) < 0.01


def test_a_profile_and_a_ranking_say_different_things() -> None:
    for given in ({"scope": "global"}, {"uniform": True}):
        with pytest.raises(UserError, match="both say what each layer loses"):
            Selection(("ffn",), profile="log", **given)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("structures", [("ffn",), ("heads", "ffn"), ("heads", "ffn", "layers")])
def test_every_move_keeps_the_number_of_parameters(
    structures: tuple[str, ...], within: bool
) -> None:
    selection = Selection(structures, scope="global")
    start = find_allocation(MODEL, fake_scores(MODEL), selection, Target(ratio=0.25))
    total = count_parameters(MODEL, start.removal())
    moves = Moves(start, within_structures=within, seed=0)
    steps, drawn = dict(start.steps), 0
    for number in range(200):
        found = moves.draw(steps, (0.25, 0.05, 0.01)[number % 3])
        if found is None:
            continue
        drawn += 1
        assert found != steps
        removal = replace(start, steps=found).removal()
        assert not check(MODEL, removal)
        assert abs(count_parameters(MODEL, removal) - total) <= 3 * 64
        steps = found
    assert drawn > 50
    if within and structures == ("heads", "ffn"):
        gone = replace(start, steps=steps).removal()
        assert sum(shares(MODEL, gone, "heads")) == sum(shares(MODEL, start.removal(), "heads"))


def planted() -> tuple[nn.Module, Discovery]:
    """Return a model in which the FFN of layer 1 matters far more than the others."""
    torch.manual_seed(0)
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("1.mlp.down_proj"):
                module.weight.mul_(20.0)
    return model, discover(model)


def test_a_search_spares_the_layer_that_matters_and_repeats_itself() -> None:
    model, discovery = planted()
    scores = score(model, discovery, Criterion("random"), input_ids=None, seed=0)
    start = find_allocation(discovery, scores, Selection(("ffn",)), Target(ratio=0.15))
    held_out = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    results = [
        search_allocation(
            model,
            discovery,
            start,
            held_out,
            AllocationSearch(trials=40),
            within_structures=True,
            seed=3,
        )
        for _ in range(2)
    ]
    (found, searched), (again, _) = results
    assert found.steps == again.steps
    assert searched.taken
    assert searched.steps > 0
    assert searched.divergence[1] < 0.8 * searched.divergence[0]
    assert searched.confirmed is not None
    assert searched.confirmed[1] < searched.confirmed[0]
    before, after = (shares(discovery, one.removal()) for one in (start, found))
    assert max(before) - min(before) < 0.1
    assert after[1] == min(after)
    assert after[1] < before[1]


def test_a_search_without_a_gain_leaves_the_start() -> None:
    model, discovery = planted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every model is as good
    scores = score(model, discovery, Criterion("random"), input_ids=None, seed=0)
    start = find_allocation(discovery, scores, Selection(("ffn",)), Target(ratio=0.15))
    held_out = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    found, searched = search_allocation(
        model,
        discovery,
        start,
        held_out,
        AllocationSearch(trials=5),
        within_structures=True,
        seed=0,
    )
    assert found is start
    assert not searched.taken


def test_nothing_to_move_is_said() -> None:
    discovery = fake_llama(1)
    start = find_allocation(
        discovery, fake_scores(discovery), Selection(("ffn",)), Target(ratio=0.1)
    )
    with pytest.raises(UserError, match="no two groups here can exchange any"):
        search_allocation(
            nn.Linear(1, 1),
            discovery,
            start,
            torch.zeros(1, 4, dtype=torch.long),
            AllocationSearch(),
            within_structures=True,
            seed=0,
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("search")
    return save_tiny(folder / "dense"), write_text(folder / "text.txt", 4000)


def test_the_command_searches_and_its_plan_repeats(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, text = checkpoint
    given = ("--ratio", 0.1, "--calibration", text, "--samples", 16, "--seq-len", 32)
    given += ("--protect-first", 0, "--protect-last", 0, "--allocate", "search")
    given += ("--search-trials", 12, "--scope", "global", "--criterion", "fisher")
    for name in ("one", "two"):
        shown = done("prune", dense, "--out", tmp_path / name, *given).out
        assert "search between layers: divergence" in shown
    plans = [(tmp_path / name / "plan.json").read_bytes() for name in ("one", "two")]
    assert plans[0] == plans[1]
    assert 1 <= json.loads(plans[0])["search_trials"] <= 12
    assert "search between layers" in (tmp_path / "one" / "report.html").read_text().lower()
    done("prune", dense, "--out", tmp_path / "three", "--plan", tmp_path / "one" / "plan.json")
    assert (tmp_path / "three" / "plan.json").read_bytes() == plans[0]


@pytest.mark.parametrize(
    "asked", [("--allocate", "search", "--search-trials", 3), ("--split", "auto")]
)
def test_random_units_are_judged_without_a_cut(
    checkpoint: tuple[Path, Path], tmp_path: Path, asked: tuple[object, ...]
) -> None:
    dense, text = checkpoint
    given = ("--ratio", 0.1, "--criterion", "random", "--dry-run", *asked)
    given += ("--calibration", text, "--samples", 8, "--seq-len", 32)
    done("prune", dense, "--out", tmp_path / "plan.json", *given)
    assert (tmp_path / "plan.json").is_file()


def test_profiles_reach_the_plan(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    dense, _ = checkpoint
    given = ("--ratio", 0.1, "--criterion", "l2", "--structures", "ffn", "--dry-run")
    given += ("--protect-first", 0, "--protect-last", 0)
    done("prune", dense, "--out", tmp_path / "log.json", *given, "--allocate", "log")
    plan = json.loads((tmp_path / "log.json").read_text())
    assert plan["selection"]["profile"] == "log"
    counts = [sum(_count(part) for part in row["removed"].split(",")) for row in plan["groups"]]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def _count(part: str) -> int:
    first, _, last = part.partition("-")
    return int(last or first) - int(first) + 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--allocate", "serch"), "did you mean search?"),
        (("--allocate", "search", "--uniform"), "uniform layers lose the same"),
        (("--search-trials", 5), "are for --allocate search"),
        (("--allocate", "search", "--search-trials", 0), "search_trials=0 searches nothing"),
        (("--allocate", "search", "--search-minutes", 0), "search_minutes=0.0 searches nothing"),
        (("--allocate", "log", "--scope", "global"), "both say what each layer loses"),
    ],
)
def test_what_contradicts_itself_is_one_line(
    checkpoint: tuple[Path, Path], tmp_path: Path, given: tuple[object, ...], said: str
) -> None:
    result = run("prune", checkpoint[0], "--out", tmp_path / "out", "--ratio", 0.1, *given)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert said in result.err
    assert not (tmp_path / "out").exists()
    result = run(
        "prune",
        checkpoint[0],
        "--out",
        tmp_path / "out",
        "--unit-ratio",
        0.2,
        "--allocate",
        "search",
    )
    assert result.code == 2
    assert "give a target in parameters" in result.err
