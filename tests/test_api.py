"""The steps from Python in other orders, with other things than the command line gives them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import llm_pruner as lp
import llm_pruner.recovery as recovery
from command import save_tiny, write_text
from llm_pruner.commands import refitting
from llm_pruner.data.text import load_evaluation_text
from llm_pruner.errors import InfeasibleError, UserError
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.models.forward import module_of
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.types import Edits

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_tiny(folder / "dense", num_hidden_layers=2)
    write_text(folder / "text.txt", 20_000)
    write_text(folder / "other.txt", 6000)
    return folder


@pytest.fixture
def model(place: Path) -> lp.Model:
    return lp.load(place / "dense", device="cpu")


def removal(model: lp.Model) -> dict[str, Any]:
    return {"layers.0.ffn": np.arange(4), "layers.1.ffn": np.arange(8)}


def test_groups_by_hand_are_as_good_as_a_plan(model: lp.Model, place: Path, tmp_path: Path) -> None:
    text = lp.calibration(model, place / "text.txt", samples=8, seq_len=32)
    edits = lp.prune_(model, lp.discover(model), {"layers.0.ffn": (0, 1), "layers.1.ffn": [2, 3]})
    assert edits is not None
    with pytest.raises(UserError, match="was pruned before"):
        lp.prune_(model, lp.discover(model), removal(model))
    lp.refit_(model, text)
    model.save(tmp_path / "small")
    again = lp.load(tmp_path / "small", device="cpu")
    assert lp.perplexity(again, place / "other.txt").perplexity == pytest.approx(
        lp.perplexity(model, place / "other.txt").perplexity, rel=1e-5
    )


def test_all_steps_under_another_default_device(model: lp.Model, place: Path) -> None:
    before = lp.perplexity(model, place / "other.txt").perplexity
    small = lp.presets.fast(calibration=str(place / "text.txt"), samples=8, seq_len=32, ratio=0.2)
    with torch.device("meta"):  # as set_default_device, of which a GPU is the usual one
        text = lp.calibration(model, place / "text.txt", samples=8, seq_len=32)
        assert lp.perplexity(model, place / "other.txt").perplexity == before
        lp.prune_(model, lp.plan(model, lp.discover(model), None, small.but(protect_last=0)))
        lp.refit_(model, text)
        lp.recover_(model, place / "text.txt", lp.Lora(trainer={"max_steps": 1}, seq_len=32))
    assert all(one.device.type == "cpu" for one in model.network.parameters())


def test_a_group_that_is_not_there(model: lp.Model) -> None:
    with pytest.raises(InfeasibleError, match=r"layers.0.fnn is no group .* did you mean layers"):
        lp.prune_(model, lp.discover(model), {"layers.0.fnn": np.arange(4)})


def test_what_was_trained_is_what_the_next_step_sees(
    model: lp.Model, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gained(network: Any, *_: Any, **__: Any) -> Any:
        trained = copy.deepcopy(network)
        trained.lm_head.weight.data *= 0.5
        return trained, SimpleNamespace(gained=True)

    monkeypatch.setattr(recovery, "recover_", gained)
    other, text = place / "other.txt", place / "text.txt"
    tokens = lp.calibration(model, text, samples=8, seq_len=32)
    train = lp.Lora(trainer={"max_steps": 1}, seq_len=32)
    lp.recover_(model, text, train)
    settings = lp.presets.fast(calibration=str(text), samples=8, seq_len=32, protect_last=0)
    for _, point in lp.curve(model, settings, ratios=(0.1,), text=str(other), measured_tokens=1024):
        divergence = point.measured.divergence
        assert divergence is not None
        asked = PerplexitySettings(seq_len=512, max_tokens=1024)
        read = load_evaluation_text(str(other), asked)
        now = perplexity(model.network, model.tokenizer, read, asked).perplexity
        assert divergence.perplexity == pytest.approx(now, rel=1e-5)
    lp.prune_(model, lp.discover(model), removal(model))
    lp.refit_(model, tokens)  # what was trained, not what it was before
    widths = {one.mlp.down_proj.in_features for one in model.network.model.layers}
    assert len(widths) == 2
    again = lp.load(place / "dense", device="cpu")
    lp.prune_(again, lp.discover(again), removal(again))
    lp.recover_(again, text, train)
    with pytest.raises(UserError, match="refit it before training"):
        lp.refit_(again, tokens)


def test_a_preset_says_the_rank_and_the_method(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.yaml")
    Path(file).write_text("method: full\nlora_r: 32\n")
    found = [lp.Lora(**said) for said in ({}, {"preset": file}, {"preset": file, "rank": 4})]
    assert [(one.method, one.lora_r) for one in found] == [("lora", 8), ("full", 32), ("full", 4)]


def test_whole_settings_of_recover_are_taken(model: lp.Model, place: Path) -> None:
    text = str(place / "text.txt")
    known: Any = {"model": "dense", "out": place / "out", "data": (text,), "held_out": 2}
    quick = lp.RecoverSettings(**known, trainer={"max_steps": 1}, seq_len=32)
    assert lp.recover_(model, text, quick).steps == 1


def test_an_optimizer_is_made_of_the_weights_that_are_trained(model: lp.Model, place: Path) -> None:
    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **others: Any) -> None:
            seen.append(type(others["optimizer"].optimizer))

    seen: list[Any] = []
    train, text = lp.Lora(trainer={"max_steps": 1}, seq_len=32), place / "text.txt"
    given = (torch.optim.SGD, {"lr": 0.1})
    lp.recover_(model, text, train, optimizer_cls_and_kwargs=given, callbacks=[Watch()])
    assert seen == [torch.optim.SGD]


def test_an_interrupted_refit_leaves_the_model_as_the_cut_did(
    model: lp.Model, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = lp.calibration(model, place / "text.txt", samples=8, seq_len=32)
    lp.prune_(model, lp.discover(model), removal(model))
    before = {name: one.clone() for name, one in model.network.named_parameters()}
    refit_ = refitting.refit_

    def broken_off(*given: Any, **named: Any) -> None:
        assert any(one.changed for one in refit_(*given, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(refitting, "refit_", broken_off)
    with pytest.raises(KeyboardInterrupt):
        lp.refit_(model, tokens)
    for name, one in model.network.named_parameters():
        assert torch.equal(one, before[name]), name
        assert one.requires_grad
    monkeypatch.setattr(refitting, "refit_", refit_)
    lp.refit_(model, tokens)
    assert any(not torch.equal(o, before[n]) for n, o in model.network.named_parameters())


def test_scores_of_bare_tokens_need_no_other_text(
    model: lp.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("text is read for scores that are there")

    monkeypatch.setattr("llm_pruner.commands.prune.read_calibration", read)
    groups = lp.discover(model)
    scores = lp.score(model, groups, lp.Taylor(), IDS)
    plan = lp.plan(
        model, groups, scores, lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    )
    assert plan.groups
    names = (group.name for group in groups.groups if group.kind == "ffn")
    assert set(lp.score(model, groups, lp.Criterion("l2"), groups=names)) == {
        "layers.0.ffn",
        "layers.1.ffn",
    }


def test_the_seed_of_random_scores_is_in_the_plan(model: lp.Model, place: Path) -> None:
    groups = lp.discover(model)
    text = lp.calibration(model, place / "text.txt", samples=8, seq_len=32)
    scores = lp.score(model, groups, lp.Criterion("random"), text, seed=7)
    settings = lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    plan = lp.plan(model, groups, scores, settings)
    assert plan.settings["seed"] == 7
    text = lp.calibration(model, place / "text.txt", samples=8, seq_len=32, seed=np.int64(0))
    scores = lp.score(model, groups, lp.Criterion("random"), text, seed=np.int64(7))
    assert lp.plan(model, groups, scores, settings).to_json() == plan.to_json()
    again = lp.Scores(dict(scores), lp.Criterion("random"), None, 7)
    assert lp.plan(model, groups, again, settings).groups


def test_what_is_refused_in_one_line(model: lp.Model, place: Path) -> None:
    groups, text = lp.discover(model), str(place / "text.txt")
    scores = lp.score(model, groups, lp.Criterion("l2"))
    settings = lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    for ids in (IDS + 10**6, -IDS):
        with pytest.raises(UserError, match=r"token ids run from .* belongs to the model"):
            lp.score(model, groups, lp.Taylor(), ids)
    with pytest.raises(UserError, match="is the calibration text"):
        lp.curve(model, lp.presets.fast(calibration=text), text=text)
    lp.prune_(model, groups, removal(model))
    for step in (
        lambda: lp.score(model, groups, lp.Criterion("l2")),
        lambda: lp.plan(model, groups, scores, settings),
        lambda: lp.curve(model),
        lambda: lp.discover(model, tokens=IDS),
    ):
        with pytest.raises(UserError, match="was pruned before; load the dense one again"):
            step()


def test_a_model_without_tokenizer_reads_no_text(model: lp.Model, place: Path) -> None:
    text, other = place / "text.txt", place / "other.txt"
    settings = lp.presets.fast(calibration=str(text), protect_last=0)
    bare = lp.Model(dataclasses.replace(model.loaded, tokenizer=None))
    for step in (
        lambda: lp.calibration(bare, text),
        lambda: lp.perplexity(bare, text),
        lambda: lp.health(bare, ["Why?"]),
        lambda: lp.curve(bare, settings, ratios=0.1, text=other),
        lambda: lp.recover_(bare, text, lp.Lora(trainer={"max_steps": 1}, seq_len=32)),
    ):
        with pytest.raises(UserError, match="has no tokenizer, so no text can be read; add one"):
            step()


def test_whole_settings_stand_for_their_part(model: lp.Model, place: Path) -> None:
    groups = lp.discover(model)
    scores = lp.score(model, groups, lp.Criterion("l2"))
    asked = {"ratio": 0.1, "protect_first": 0, "protect_last": 0, "preset": "paper"}
    whole = lp.PruneSettings(model="elsewhere", out=Path("x"), **asked)
    part = lp.PlanSettings(**asked)
    plans = [lp.plan(model, groups, scores, one).groups for one in (whole, part)]
    assert plans[0] == plans[1]


def test_a_network_is_taken_in_whatever_holds_it(model: lp.Model) -> None:
    groups = lp.discover(model)
    names = [group.name for group in groups.groups]
    scores = lp.score(model, groups, lp.Criterion("l2"))
    units = {"layers.0.ffn": {0, 1}}
    for one in (model, model.current, model.network):
        assert [group.name for group in lp.discover(one).groups] == names
        found = lp.score(one, groups, "l2")
        assert all(np.array_equal(found[name], scores[name]) for name in scores)
        assert lp.twin_logits(one, groups, units, IDS)[0].shape == (4, 15, 259)
    settings = lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    made = lp.plan(lp.Model(model.current), groups, scores, settings)
    for one in (model.current, model.network):
        other = copy.deepcopy(one)
        assert lp.prune_(other, made)
        left = sum(each.numel() for each in module_of(other).parameters())
        assert left == lp.count_parameters(groups, made.removal(groups))


def test_token_ids_in_any_form_stand_for_a_text(model: lp.Model, place: Path) -> None:
    text = lp.calibration(model, place / "text.txt", samples=4, seq_len=16)
    ids, groups = text.input_ids, lp.discover(model)
    name = "layers.0.ffn"
    wanted = lp.score(model, groups, "gate", text, groups=name)
    assert wanted.text is text
    assert wanted.criterion == lp.Criterion("gate")
    for bare in (ids, ids.numpy(), ids.tolist(), ids.int(), text):
        found = lp.score(model, groups, "gate", bare, groups=[groups.group(name)])
        assert [*found] == [name]
        np.testing.assert_array_equal(found[name], wanted[name])
        assert found.text is (text if bare is text else None)
    as_lists = lp.Scores(
        {one: [*values] for one, values in lp.score(model, groups, "l2").items()}, "l2", None, 0
    )
    settings = lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    made = lp.plan(model, groups, as_lists, settings)
    assert made == lp.plan(model, groups, lp.score(model, groups, "l2"), settings)
    lp.prune_(model, made)
    before = model.network.model.layers[0].mlp.down_proj.weight.clone()
    lp.refit_(model, lp.calibration(model, place / "text.txt", samples=8).input_ids.tolist())
    assert not torch.equal(before, model.network.model.layers[0].mlp.down_proj.weight)


def test_a_checkpoint_of_a_whole_model_and_of_one_share(model: lp.Model, place: Path) -> None:
    saved = lp.save_checkpoint(model, place / "whole", edits=Edits(), tokenizer=model.tokenizer)
    assert saved.kind == "stock"
    text = place / "other.txt"
    settings = lp.presets.fast(
        calibration=str(place / "text.txt"), samples=8, seq_len=32, protect_last=0
    )
    for ratio in (0.1, np.float32(0.1)):
        points = lp.curve(model, settings, ratios=ratio, text=text, measured_tokens=512)
        assert len(points) == 1
    with pytest.raises(UserError, match="should be less than 1"):
        lp.curve(model, settings, ratios=1, text=text)


@pytest.mark.parametrize("pruned", [False, True])
def test_nothing_holds_the_network_before_training(
    model: lp.Model, place: Path, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gained(network: Any, *_: Any, **__: Any) -> Any:
        return copy.deepcopy(network), SimpleNamespace(gained=True)

    monkeypatch.setattr(recovery, "recover_", gained)
    groups = lp.discover(model)
    before = [weakref.ref(one) for one in (model.network, *model.network.parameters())]
    if pruned:
        lp.prune_(model, groups, removal(model))
        before += [weakref.ref(one) for one in model.network.parameters()]
    lp.recover_(model, place / "text.txt", lp.Lora(trainer={"max_steps": 1}, seq_len=32))
    gc.collect()
    assert not any(one() is not None for one in before)
    assert model.loaded.model is model.network
    model.save(place / f"trained-{pruned}")
