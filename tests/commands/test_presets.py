"""Recipes, splits, trials and compensation, through the command line on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from command import done, refused, save_tiny, write_text
from fake_discovery import fake_llama, fake_scores
from helpers import tiny_model
from llm_pruner import importance
from llm_pruner.commands import prune as pruning
from llm_pruner.commands import refitting
from llm_pruner.compensation import Refitted, refit_
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.models.linear_modules import consumers_of
from llm_pruner.planning import Numbering, Selection, Target, allocate
from llm_pruner.report.data import read_report
from llm_pruner.runtime import precision as matmul
from llm_pruner.search import structure_split as trials
from llm_pruner.search.structure_split import find_split
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.surgery.removal import count_parameters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 6000)


def small(text: Path) -> list[object]:
    return ["--calibration", text, "--samples", 16, "--seq-len", 24]


@pytest.mark.slow
@pytest.mark.parametrize("name", MethodSettings.presets)
def test_every_recipe_prunes(tiny: Path, text: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    options: dict[str, list[object]] = {
        "paper": ["--protect-first", 1, "--protect-last", 1],
        "best": ["--repair-minutes", 0.02],
    }
    more = options.get(name, [])
    result = done(
        "prune", tiny, "--out", out, "--ratio", 0.2, "--preset", name, *small(text), *more
    )
    plan = json.loads((out / "plan.json").read_text())
    recipe = MethodSettings(preset=name)
    assert plan["settings"]["criterion"] == recipe.criterion
    assert plan["settings"]["scope"] == recipe.scope
    assert plan["settings"]["samples"] == 16
    assert plan["settings"]["protect_first"] == (1 if name == "paper" else 0)
    if recipe.split == "auto":
        assert sum(plan["settings"]["split"].values()) == pytest.approx(1)
        assert "trial removals" in result.out
    assert plan["settings"]["compensation"] == recipe.compensation
    assert plan["settings"]["preset"] == name
    assert plan["settings"].get("layer_trials") == recipe.layer_trials


@pytest.mark.slow
def test_a_refit_reads_more_text_than_the_estimate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n:04d}" for n in range(1000)))
    seen: list[torch.Tensor] = []

    def refit(*args: Any, **others: Any) -> list[Refitted]:
        seen.append(args[4])
        return refit_(*args, **others)

    monkeypatch.setattr(refitting, "refit_", refit)
    options = ["--ratio", 0.2, "--preset", "balanced", "--structures", "ffn"]
    options += small(text)
    once, more = tmp_path / "once", tmp_path / "more"
    done("prune", tiny, "--out", once, *options, "--refit-text", 1)
    done("prune", tiny, "--out", more, *options)
    assert (once / "plan.json").read_bytes() == (more / "plan.json").read_bytes()
    assert [len(one) for one in seen] == [14, 14 + 32]  # two of sixteen judge
    assert torch.equal(seen[1][:14], seen[0])
    assert len({*map(tuple, seen[1].tolist())}) == 14 + 32
    first, second = (load_file(out / "model.safetensors") for out in (once, more))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    done("prune", tiny, "--out", tmp_path / "stepwise", *options, "--steps", 2)
    assert [len(one) for one in seen[2:]] == [14, 14 + 32]  # of a round that is not the last
    replay = ["--plan", once / "plan.json", "--compensation", "least-squares", *small(text)]
    done("prune", tiny, "--out", tmp_path / "again", *replay)
    assert torch.equal(seen[-1], seen[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("criterion: [", "is not YAML in line 1"),
        ("- fisher", "holds no settings"),
        (
            "critrion: fisher\nsteps: many",
            "critrion is no setting; did you mean criterion?",
        ),
        ("steps: many", "steps many should be a valid integer; correct it"),
        ("preset: best", r"mine.yaml names preset best; give this file as --config"),
    ],
)
def test_broken_recipe_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        MethodSettings(preset=str(file))
    with pytest.raises(UserError, match="no preset"):
        MethodSettings(preset=str(tmp_path / "absent.yaml"))


MODEL = fake_llama(5, hidden=60, ffn=160, kv_heads=3, repeat=3, head_dim=8)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_split_is_met(scope: Any) -> None:
    scores = fake_scores(MODEL)
    total = count_parameters(MODEL)
    for heads in (0.0, 0.3, 0.5):
        split = {"heads": heads, "ffn": 1 - heads}
        selection = Selection(("heads", "ffn"), scope=scope, split=split)
        removal = allocate(MODEL, scores, selection, Target(ratio=0.2))
        assert 1 - count_parameters(MODEL, removal) / total == pytest.approx(0.2, abs=0.005)
        ffn = {name: units for name, units in removal.items() if name.endswith("ffn")}
        share = (total - count_parameters(MODEL, ffn)) / (total - count_parameters(MODEL, removal))
        assert share == pytest.approx(1 - heads, abs=0.06)
        if not heads:
            assert removal.keys() == ffn.keys()


def test_spread_limits_what_a_layer_loses() -> None:
    scores = {
        name: values * (1e-3 if name == "layers.2.ffn" else 1.0)
        for name, values in fake_scores(MODEL).items()
    }
    lost = {}
    for spread in (None, 2.0, 1.0):
        selection = Selection(("ffn",), scope="global", spread=spread)
        removal = allocate(MODEL, scores, selection, Target(ratio=0.15))
        lost[spread] = {name: len(units) for name, units in removal.items()}
    assert max(lost[None].values()) > 140
    average = np.mean([lost[1.0][name] for name in lost[1.0]])
    assert max(lost[2.0].values()) <= 2 * average + 2
    deep = allocate(
        MODEL, scores, Selection(("ffn",), scope="global", spread=2.0), Target(ratio=0.5)
    )
    kept = [160 - len(deep.get(f"layers.{layer}.ffn", ())) for layer in range(5)]
    assert min(kept) >= np.mean(kept) / 2 - 2
    assert len(lost[1.0]) == 5
    assert np.ptp(list(lost[1.0].values())) <= 4


@pytest.mark.slow
def test_uniform_layers_load_without_the_package(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = done(
        *("prune", tiny, "--out", out, "--ratio", 0.2, "--preset", "best", "--uniform"),
        *("--structures", "ffn", "--split", "ffn=1", "--repair-minutes", 0, *small(text)),
    )
    assert "loads with from_pretrained" in result.out
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    shapes = {v.shape for k, v in load_file(out / "model.safetensors").items() if "up_proj" in k}
    assert len(shapes) == 1
    protected = ("--ratio", 0.2, "--uniform", "--protect-first", 2)
    said = refused("prune", tiny, "--out", tmp_path / "x", *protected, within=tmp_path)
    assert "uniform layers need scope local and no protected layers" in said


@pytest.mark.slow
def test_refits_that_make_held_out_text_worse_are_taken_back(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: nn.Module, *args: Any, **rest: Any) -> list[Refitted]:
        found = refit_(model, *args, **rest)
        for one in found:
            module = model.get_submodule(one.module)
            noise = torch.Generator().manual_seed(0)
            shape = module.get_parameter("weight").shape
            module.weight = nn.Parameter(torch.randn(shape, generator=noise))
        return found

    options = ("--ratio", 0.2, *small(text))
    plain, spoiled = tmp_path / "plain", tmp_path / "spoiled"
    done("prune", tiny, "--out", plain, *options)
    monkeypatch.setattr(refitting, "refit_", spoil)
    result = done("prune", tiny, "--out", spoiled, *options, "--compensation", "least-squares")
    assert "least squares refitted 0 of" in result.out
    assert read_report(spoiled / "report.json").compensation is None
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, spoiled))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_part_of_the_text_scores_and_more_of_it_is_fitted(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, tuple[int, str]] = {}

    def score(*args: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        read["score"] = (len(input_ids), torch.get_float32_matmul_precision())
        return importance.score(*args, input_ids=input_ids, **rest)

    def refit(*args: Any, **rest: Any) -> list[Refitted]:
        read["refit"] = (len(args[-1]), torch.get_float32_matmul_precision())
        return refit_(*args, **rest)

    monkeypatch.setattr(pruning, "score", score)
    monkeypatch.setattr(refitting, "refit_", refit)
    options = ("--criterion", "fisher", "--split", "equal", "--compensation", "least-squares")
    out = tmp_path / "out"
    done("prune", tiny, "--out", out, "--ratio", 0.2, *options, *small(text), "--score-samples", 4)
    # Sums of a refit are not multiplied in short formats. An eighth of the 16 samples judges it.
    assert read == {"score": (4, "medium"), "refit": (14, "highest")}
    assert torch.get_float32_matmul_precision() == "highest"
    calibration = json.loads((out / "plan.json").read_text())["settings"]
    assert (calibration["samples"], calibration["score_samples"]) == (16, 4)


def test_products_in_bfloat16_are_used_where_the_processor_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear, x = nn.Linear(8, 8), torch.randn(4, 8)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda supported=supported: supported)
        with matmul.mixed_precision(linear):
            assert linear(x).dtype == dtype
            gram = torch.zeros(8, 8).addmm_(x.T, x)
        assert torch.equal(gram, x.T @ x)
        assert linear(x).dtype == torch.float32
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: True)
    with matmul.mixed_precision(linear.half()):
        assert linear(x.half()).dtype == torch.float16


def planned(tiny: Path, out: Path, *options: object) -> tuple[dict[str, Any], str]:
    """Plan without pruning; return the plan and what was printed."""
    result = done("prune", tiny, "--out", out, "--dry-run", "--overwrite", *options)
    return dict(json.loads(out.read_text())["settings"]), result.out


@pytest.mark.slow
def test_the_split_is_found_unless_it_is_said(tiny: Path, text: Path, tmp_path: Path) -> None:
    out, some = tmp_path / "plan.json", small(text)
    selection, shown = planned(tiny, out, "--ratio", 0.2, *some)
    assert sum(selection["split"].values()) == pytest.approx(1)
    assert "split found by" in shown
    one = ("--calibration", text, "--samples", 1, "--seq-len", 24)
    for options in (
        ("--ratio", 0.2, "--split", "equal", *some),
        ("--ratio", 0.2, "--criterion", "l2"),  # reads no text
        ("--ratio", 0.2, "--structures", "ffn", *some),
        ("--ratio", 0.2, *one),  # nothing to hold out
        ("--unit-ratio", 0.4, *some),
        ("--ratio", 0.2, "--preset", "paper", "--protect-first", 1, "--protect-last", 1, *some),
    ):
        selection, shown = planned(tiny, out, *options)
        assert selection.get("split") is None, options
        assert "trial" not in shown


def test_trials_on_logits_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    discovery = discover(model)
    scores = {group.name: np.arange(1.0, group.size + 1) for group in discovery.groups}
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    held_out, numbering = torch.arange(3, 35).reshape(2, 16), Numbering.dense(discovery)
    chosen = Selection(("heads", "ffn"))
    with pytest.raises(UserError, match="not finite, so no split can be judged"):
        find_split(model, discovery, scores, chosen, Target(ratio=0.2), numbering, held_out)


def test_a_target_that_no_structure_reaches_alone_is_shared_out_by_one_ranking() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    discovery = discover(model)
    numbering = Numbering.dense(discovery)
    scores = {group.name: np.arange(1.0, group.size + 1) for group in discovery.groups}
    chosen, held_out = Selection(("heads", "ffn"), scope="global"), torch.arange(3, 35)[None]
    target = Target(ratio=0.55)
    for share in (0.0, 1.0):
        alone = replace(chosen, split={"heads": share, "ffn": 1 - share})
        with pytest.raises(UserError, match="cannot be reached"):
            allocate(discovery, scores, alone, target, numbering)
    found, tried = find_split(model, discovery, scores, chosen, target, numbering, held_out)
    assert found == chosen
    assert tried == []
    more = Target(ratio=0.95)
    with pytest.raises(UserError, match="cannot be reached"):
        find_split(model, discovery, scores, chosen, more, numbering, held_out)


def test_a_share_too_small_for_a_unit_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    discovery = discover(model)
    numbering = Numbering.dense(discovery)
    scores = {group.name: np.arange(1.0, group.size + 1) for group in discovery.groups}
    found = iter([3.0, 2.0, 2.0, 1.5, 1.8])  # heads, FFN channels, then 5%, 10% and 20% of heads
    monkeypatch.setattr(trials, "allocate", lambda *_: {})
    monkeypatch.setattr(trials.DivergenceMeter, "of", lambda *_: next(found))
    about = Selection(("heads", "ffn"), scope="global"), Target(ratio=0.1), numbering
    chosen, tried = find_split(model, discovery, scores, *about, torch.arange(3, 35)[None])
    assert chosen.split == {"heads": 0.1, "ffn": 0.9}
    assert len(tried) == 5


def test_a_mixed_split_must_also_win_after_a_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=6, max_position_embeddings=512)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    discovery = discover(model)
    text = torch.randint(3, 100, (24, 16), generator=torch.Generator().manual_seed(0))
    # One head of each layer counts for nothing, so that giving heads a share of the budget helps.
    with torch.no_grad():
        for group in discovery.groups:
            if group.kind == "heads":
                (consumer,) = consumers_of(model, group)
                weight = model.get_submodule(consumer.module).weight
                weight[:, consumer.index[0]] = 0
    scores = {group.name: np.arange(1.0, group.size + 1) for group in discovery.groups}
    settings = (Selection(("heads", "ffn")), Target(ratio=0.2), Numbering.dense(discovery))
    arguments = (model, discovery, scores, *settings, text[:4])
    _, plain = find_split(*arguments)
    assert not any(trial.refitted for trial in plain)
    found, tried = find_split(*arguments, refit_on=text[4:])
    assert [trial for trial in tried if not trial.refitted] == plain
    refitted = [trial for trial in tried if trial.refitted]
    mixed = min(plain, key=lambda trial: trial.divergence).split
    assert 0 < mixed["heads"] < 1
    assert [dict(trial.split) for trial in refitted][1] == mixed
    assert len(refitted) == 2
    alone, shared = (trial.divergence for trial in refitted)
    assert shared < (1 - trials.MARGIN) * alone
    assert found.split == mixed
    assert [trial.taken for trial in refitted] == [False, True]
    # A gain that is no clear one is left.
    monkeypatch.setattr(trials, "MARGIN", 1 - 0.999 * shared / alone)
    found, tried = find_split(*arguments, refit_on=text[4:])
    assert found.split == refitted[0].split
    assert [trial.taken for trial in tried if trial.refitted] == [True, False]
    assert all(
        torch.equal(value, before[key])
        for key, value in model.state_dict().items()
        if "o_proj" not in key
    )


@pytest.mark.slow
def test_a_model_that_is_no_chain_goes_without_a_refit(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_chain(*_: object, **__: object) -> None:
        raise refitting.NotBlockwise("block 1 depends on more than its hidden state and weights")

    monkeypatch.setattr(refitting, "find_chain", no_chain)
    options = ("--ratio", 0.2, "--preset", "balanced", *small(text))
    said = done("prune", tiny, "--out", tmp_path / "out", *options, "--json", "-").out
    assert "no refit, which goes block by block: block 1 depends on more" in caplog.text
    assert json.loads(said)["refitted"] == []
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["settings"]["compensation"] == "none"
