"""An option is declared once: a field, and the help, files, plans, reports and Python know it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main
import yaml
from typer.testing import CliRunner

import llm_pruner
import llm_pruner.recovery as recovery
from command import PLAIN, direct, done, save_tiny, write_text
from llm_pruner.cli.build import add
from llm_pruner.commands.prune import PruneRun
from llm_pruner.errors import UserError
from llm_pruner.recovery import recover_
from llm_pruner.report.write import write_request
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.curve import CurveSettings
from llm_pruner.settings.evaluate import BenchSettings, EvaluateSettings, InspectSettings
from llm_pruner.settings.options import Settings, option, option_of
from llm_pruner.settings.prune import MethodSettings, PruneSettings
from llm_pruner.settings.recover import RecoverSettings, TrainingSettings

COMMANDS: dict[str, type[Settings]] = {
    "prune": PruneSettings,
    "curve": CurveSettings,
    "recover": RecoverSettings,
    "compress": CompressSettings,
    "evaluate": EvaluateSettings,
    "bench": BenchSettings,
    "inspect": InspectSettings,
}
SMALL = ("--calibration", "text.txt", "--samples", 16, "--seq-len", 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with a dense model and text."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "dense", num_hidden_layers=4, initializer_range=0.2)
    write_text(folder / "text.txt", 6000)
    write_text(folder / "other.txt", 700)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.slow
def test_a_new_field_is_an_option_everywhere(place: Path) -> None:
    class More(PruneSettings):
        flavour: str = option("plain", "How it tastes.", "NAME", panel="Where from")

    def run(settings: More, json: str | None) -> None:
        """Prune with taste."""
        PruneRun(settings).carry_out()

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command("other")(lambda: None)
    add(app, "prune", More, run)
    shown = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "80"})
    assert "--flavour NAME" in shown.output
    assert "How it tastes. [default: plain]" in shown.output
    Path("more.yaml").write_text("flavour: sour\nratio: 0.2\nstructures: [ffn]\n")
    command = ["prune", "dense", "--config", "more.yaml", "--preset", str(PLAIN)]
    command += ["--criterion", "l2", "--set", "split=equal", "--flavour", "sweet", "--out", "sweet"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    plan = json.loads(Path("sweet/plan.json").read_text())
    assert plan["settings"]["flavour"] == "sweet"
    assert yaml.safe_load(Path("sweet/request.yaml").read_text())["flavour"] == "sweet"
    assert "sweet" in Path("sweet/report.json").read_text()


@pytest.mark.parametrize("kind", COMMANDS.values())
def test_every_field_says_what_it_is(kind: type[Settings]) -> None:
    for name, field in kind.model_fields.items():
        how = option_of(field)
        assert field.description, name
        assert field.description.endswith((".", ").")), name
        if not (how.hidden or how.positional) and field.annotation is not bool:
            assert how.metavar or field.annotation == bool | None, name


def test_a_request_finds_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = PruneSettings(model=f"{tmp_path}/dense", out=tmp_path / "small", plan="~/plan.json")
    write_request(tmp_path, asked)
    assert "out: ~/small\n" in (tmp_path / "request.yaml").read_text()
    again = PruneSettings.read({}, tmp_path / "request.yaml")
    assert (again.out, again.plan) == (tmp_path / "small", tmp_path / "plan.json")
    write_request(tmp_path, PruneSettings(model=str(tmp_path), out=tmp_path / "small"))
    assert 'model: "~"\n' in (tmp_path / "request.yaml").read_text().replace("'", '"')
    assert PruneSettings.read({"out": Path("~x/y")}, tmp_path / "request.yaml").out == Path("~x/y")


def test_a_request_has_nothing_that_is_asked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    asked = CompressSettings(
        model="/backup/home/me/m",
        out=tmp_path / "small",
        restart=True,
        overwrite=True,
        calibration="/home/me/a.txt:0.5,/home/me/b.txt:0.5",
    )
    write_request(tmp_path, asked)
    said = yaml.safe_load((tmp_path / "request.yaml").read_text())
    assert said == {
        "model": "/backup/home/me/m",  # which is not in the home folder
        "out": str(tmp_path / "small"),
        "calibration": "~/a.txt:0.5,~/b.txt:0.5",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--plan", "plan.json", "--compensation", "least-squares", *SMALL),
        # Fewer samples than the preset asks for, which is the preset's own affair.
        ("--ratio", 0.2, "--preset", "fast", "--calibration", "text.txt"),
    ],
)
def test_any_request_is_taken_again(place: Path, options: tuple[object, ...]) -> None:
    first = ("--ratio", 0.2, "--preset", "fast", *SMALL, "--dry-run", "--overwrite")
    done("prune", "dense", "--out", "plan.json", *first)
    done("prune", "dense", "--out", "asked", *options, "--overwrite")
    elsewhere = {"out": "again", "overwrite": True}
    PruneRun(PruneSettings.read(elsewhere, Path("asked/request.yaml"))).carry_out()
    for file in ("plan.json", "model.safetensors"):
        assert Path("asked", file).read_bytes() == Path("again", file).read_bytes()


def test_what_is_cleared_stays_so_whatever_a_preset_says(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("max_minutes: 5\n")
    given = TrainingSettings(preset=str(tmp_path / "mine.yaml"))
    assert given.max_minutes == 5
    assert given.but(max_minutes=None).with_trainer(max_steps=3).max_minutes is None
    words = llm_pruner.presets.balanced(ratio=0.2, compensation="none").written()
    assert PruneSettings(**words, model="m", out="o").compensation == "none"


@pytest.mark.slow
def test_python_and_the_command_line_give_the_same_plan(place: Path) -> None:
    model = llm_pruner.load("dense")
    text = llm_pruner.calibration(model, "text.txt", samples=10, seq_len=64)
    groups = llm_pruner.discover(model)
    settings = llm_pruner.presets.paper(ratio=0.05, protect_first=1)
    scores = llm_pruner.score(model, groups, llm_pruner.Taylor(order="first"), text)
    by_steps = llm_pruner.plan(model, groups, scores, settings).to_json()
    given = ("--ratio", 0.05, "--preset", "paper", "--protect-first", 1, "--dry-run")
    done("prune", "dense", "--out", "paper.json", *given, "--calibration", "text.txt")
    assert Path("paper.json").read_text() == by_steps
    options: dict[str, Any] = {"calibration": "text.txt", "samples": 16, "seq_len": 24}
    best = llm_pruner.presets.best(ratio=0.2, **options)
    with_trials = llm_pruner.plan(model, groups, None, best).to_json()
    done(
        *("prune", "dense", "--out", "best.json", "--ratio", 0.2, "--dry-run"),
        *("--preset", "best", *SMALL),
    )
    assert Path("best.json").read_text() == with_trials


def without_gain(*given: Any, **others: Any) -> tuple[Any, Any]:
    """Train, and say that it brought nothing."""
    network, outcome = recover_(*given, **others)
    return network, replace(outcome, gained=False)


@pytest.mark.slow
def test_the_steps_from_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lp = llm_pruner
    model = lp.load("dense")
    text = lp.calibration(model, "text.txt", samples=10, seq_len=64)
    groups = lp.discover(model)
    scores = lp.score(model, groups, lp.Criterion("fisher"), text)
    plan = lp.plan(model, groups, scores, lp.presets.balanced(ratio=0.2))
    assert model.network.num_parameters() == plan.model.parameters
    lp.prune_(model, plan, verify=True)
    with pytest.raises(UserError, match="was pruned before"):
        lp.prune_(model, plan)
    lp.refit_(model, text)
    assert all(weight.requires_grad for weight in model.network.parameters())
    with pytest.raises(UserError, match="nothing to refit"):
        lp.refit_(model, text)
    before = lp.perplexity(model, "other.txt").perplexity
    quick = lp.Lora(rank=4, trainer={"max_steps": 4, "bf16": False}, batch_size=2, seq_len=32)
    network, weights = model.network, copy.deepcopy(model.network.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "recover_", without_gain)
        assert not lp.recover_(model, "text.txt", quick).gained
    assert model.network is network
    assert all(torch.equal(one, weights[name]) for name, one in network.state_dict().items())
    outcome = lp.recover_(model, "text.txt", quick)
    assert outcome.gained
    assert lp.perplexity(model, "other.txt").perplexity < before
    model.save("by-hand")
    again = lp.load("by-hand")
    assert again.network.num_parameters() < 0.81 * plan.model.parameters
    assert lp.perplexity(again, "other.txt").perplexity == pytest.approx(
        lp.perplexity(model, "other.txt").perplexity, rel=1e-5
    )


def test_presets() -> None:
    assert set(MethodSettings.presets) == {"paper", "fast", "balanced", "best"}
    assert set(TrainingSettings.presets) == {"paper", "quick"}
    for name in MethodSettings.presets:
        assert MethodSettings(preset=name).preset == name
    assert MethodSettings().preset == MethodSettings.default_preset
    assert TrainingSettings(preset="paper", method="full").learning_rate == 2e-5
    assert TrainingSettings(preset="paper", method="full", learning_rate=1).learning_rate == 1


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nout: o\nratio: 0.2\npreset: paper\nsamples: 20\n")
    settings = PruneSettings.read({"samples": 30}, file)
    assert (settings.samples, settings.seq_len, settings.criterion) == (30, 64, "taylor")
    assert settings.but(seq_len=8).seq_len == 8
    settings = PruneSettings.read({"params": "70K"}, file)
    assert (settings.ratio, settings.params) == (None, 70_000)
    assert PruneSettings.read({"plan": "p.json"}, file).ratio is None
    settings = CompressSettings.read({"params": "70K"}, file.with_name("run.yaml"))
    assert (settings.ratio, settings.params) == (None, 70_000)
    few = tmp_path / "few.yaml"
    few.write_text("score_samples: 8\n")
    for line, said in (
        ("preset: 5", "no preset '5'; known are balanced, best"),
        (f"samples: 1e3\npreset: {few}", "--samples 1e3 should be a valid integer; correct it"),
        ("layers: {ffn: [-3, -1]}", "--layers -3 should be greater than or equal to 0"),
    ):
        file.write_text(f"model: m\nout: o\nratio: 0.2\n{line}\n")
        with pytest.raises(UserError, match=said):
            PruneSettings.read({}, file)
    file.write_text("learning_rate: {full: 1.0e-4}\n")
    trained = TrainingSettings(preset=str(file), method="lora")
    assert trained.learning_rate == TrainingSettings.model_fields["learning_rate"].default
    for preset, method in (("batch_size: 2\n", "full"), ("learning_rate: {lora: 1.0}\n", "blocks")):
        file.write_text(preset)
        trained = TrainingSettings(preset=str(file), method=method)
        assert trained.learning_rate == TrainingSettings(method=method).learning_rate < 1e-3
        file.write_text(f"{preset}method: {method}\n")
        assert TrainingSettings(preset=str(file)).learning_rate == trained.learning_rate
    file.write_text("model: m\nout: o\ndata: [{text: a.txt}]\n")
    with pytest.raises(UserError, match=r"--data .* should be a valid string; correct it"):
        RecoverSettings.read({}, file)
    file.write_text("ration: 1\n")
    with pytest.raises(UserError, match="ration is no setting; did you mean ratio"):
        PruneSettings.read({}, file)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("prune", "--spread", "2"), "--spread is a setting now: write --set spread=2"),
        (("prune", "--no-verify"), "--verify is a setting now: write --set verify=false"),
        (("evaluate", "--seq-len=64"), "--seq-len is a setting now: write --set seq_len=64"),
        (("compress", "--recipe", "best"), "--recipe went: write --preset best"),
        (("prune", "--set", "spred=2"), "--set spred=2: spred is no setting; did you mean spread?"),
        (("prune", "--set", "spread"), "--set spread has no value; write KEY=VALUE"),
        (("prune", "--set", "steps=many"), "steps many should be a valid integer; correct it"),
    ],
)
def test_earlier_options_and_slips_say_what_to_write(args: tuple[str, ...], said: str) -> None:
    result = direct(args[0], "m", "--out", "o", *args[1:])
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"llm-pruner: {said}")
    assert result.err.count("\n") == 1


def test_any_field_can_be_set() -> None:
    texts = [
        *("spread=2", "split=heads=0.1,ffn=0.9", "protect-first=1", "layer_trials=yes"),
        *("verify=false", "text_field=1", "layers=ffn=2-5", "structures=ffn"),
    ]
    found = PruneSettings.read({"model": "m", "out": "o", **PruneSettings.from_texts(texts)})
    assert (found.spread, found.split) == (2.0, {"heads": 0.1, "ffn": 0.9})
    assert (found.protect_first, found.layer_trials, found.verify) == (1, True, False)
    assert (found.text_field, found.layers, found.structures) == ("1", {"ffn": (2, 5)}, ("ffn",))
    listed = direct("prune", "--set", "help").out
    assert "\n  spread            With scope global" in listed
    assert "--ratio" not in listed


@pytest.mark.parametrize(
    ("name", "most"),
    [("prune", 30), ("recover", 25), ("evaluate", 18), ("compress", 18), ("curve", 15)],
)
def test_the_help_is_short(name: str, most: int) -> None:
    assert len(re.findall(r"^  (?:-\w, )?--", done(name, "--help").out, re.MULTILINE)) <= most
