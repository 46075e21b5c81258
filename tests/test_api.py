"""The steps from Python in other orders, with other things than the command line gives them."""

from __future__ import annotations

import copy
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
from llm_pruner.models.forward import evaluating
from llm_pruner.settings.evaluate import PerplexitySettings

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


def test_every_public_name_is_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in lp.__all__ if f"`{name}`" not in page] == ["__version__"]


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
        lp.recover_(model, place / "text.txt", lp.Lora(max_steps=1, seq_len=32))
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
    train = lp.Lora(max_steps=1, seq_len=32)
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
    with pytest.raises(UserError, match="refit it once, before it is trained"):
        lp.refit_(again, tokens)


def test_a_preset_says_the_rank_and_the_method(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.yaml")
    Path(file).write_text("method: full\nlora_r: 32\n")
    found = [lp.Lora(**said) for said in ({}, {"preset": file}, {"preset": file, "rank": 4})]
    assert [(one.method, one.lora_r) for one in found] == [("lora", 8), ("full", 32), ("full", 4)]


def test_what_is_not_done_in_memory_is_refused(model: lp.Model, place: Path) -> None:
    text = str(place / "text.txt")
    known: Any = {"model": "dense", "out": place / "out", "data": (text,), "held_out": 2}
    with pytest.raises(UserError, match="does nothing with control, resume, teacher; leave that"):
        lp.recover_(model, text, lp.RecoverSettings(**known, teacher="d", control="d", resume=True))
    quick = lp.RecoverSettings(**known, max_steps=1, seq_len=32)
    assert lp.recover_(model, text, quick).steps == 1


def test_an_optimizer_is_made_of_the_weights_that_are_trained(model: lp.Model, place: Path) -> None:
    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **others: Any) -> None:
            seen.append(type(others["optimizer"].optimizer))

    seen: list[Any] = []
    own = torch.optim.SGD(model.network.parameters(), lr=0.1)
    train, text = lp.Lora(max_steps=1, seq_len=32), place / "text.txt"
    with pytest.raises(UserError, match=r"not trained, .* as optimizer_cls_and_kwargs="):
        lp.recover_(model, text, train, optimizers=(own, None))
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
    scores = lp.score(model, groups, lp.Taylor(), input_ids=IDS)
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
    assert lp.plan(model, groups, scores, settings).settings["seed"] == 7
    again = lp.Scores(dict(scores), lp.Criterion("random"), None, 7)
    assert lp.plan(model, groups, again, settings).groups


def test_what_is_refused_in_one_line(model: lp.Model, place: Path) -> None:
    groups, text = lp.discover(model), str(place / "text.txt")
    scores = lp.score(model, groups, lp.Criterion("l2"))
    settings = lp.presets.paper(ratio=0.1, protect_first=0, protect_last=0)
    with pytest.raises(UserError, match="do not say what they are of; give what score returned"):
        lp.plan(model, groups, {**scores}, settings)  # type: ignore[arg-type]
    for ids in (IDS + 10**6, -IDS):
        with pytest.raises(UserError, match=r"token ids run from .* belongs to the model"):
            lp.score(model, groups, lp.Taylor(), input_ids=ids)
    for prompts in ([], "Why?"):
        with pytest.raises(UserError, match="health is measured on a list of prompts"):
            lp.health(model, prompts)
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


def test_whole_settings_stand_for_their_part(model: lp.Model, place: Path) -> None:
    groups = lp.discover(model)
    scores = lp.score(model, groups, lp.Criterion("l2"))
    asked = {"ratio": 0.1, "protect_first": 0, "protect_last": 0, "preset": "paper"}
    whole = lp.PruneSettings(model="elsewhere", out=Path("x"), **asked)
    part = lp.PlanSettings(**asked)
    plans = [lp.plan(model, groups, scores, one).groups for one in (whole, part)]
    assert plans[0] == plans[1]


def test_modules_get_the_mode_that_each_had(model: lp.Model) -> None:
    network = model.network.train()
    network.model.layers[0].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert network.model.layers[1].training
    assert not network.model.layers[0].training
