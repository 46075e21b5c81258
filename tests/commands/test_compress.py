"""``llm-pruner compress``: all stages in one command, killed in each of them, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

import llm_pruner.commands.compress as stages
import llm_pruner.commands.evaluate
import llm_pruner.commands.prune
import llm_pruner.commands.prune_result
import llm_pruner.commands.recover
from command import (
    contents,
    done,
    figures,
    interrupt,
    measured_here,
    refused,
    run,
    save_tiny,
    write_text,
)
from llm_pruner.commands.workdir import opened
from llm_pruner.errors import UserError
from llm_pruner.files.disk import placed
from llm_pruner.files.outputs import MANIFEST, atomic_directory
from llm_pruner.models.load import load_model
from llm_pruner.recovery.trainer import RecoveryTrainer
from llm_pruner.report.data import read_report
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.words import parse_duration

pytestmark = pytest.mark.slow

RECIPE = """
structures: [ffn]
protect_first: 0
protect_last: 0
criterion: fisher
samples: 8
seq_len: 24
compensation: least-squares
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a recipe, and what a run that nothing disturbs makes of them."""
    folder = tmp_path_factory.mktemp("compress")
    save_tiny(folder / "dense", num_hidden_layers=4, initializer_range=0.2)
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "few.yaml").write_text("samples: 128\n")
    write_text(folder / "text.txt", 3000)
    whole = folder / "whole"
    whole.mkdir()
    with pytest.MonkeyPatch.context() as patch, measured_here():
        patch.chdir(whole)
        result = done(*command(folder), "--json", "result.json")
    assert result.err == ""
    (folder / "shown.txt").write_text(result.out)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; models are measured in this process."""
    monkeypatch.chdir(tmp_path)
    with measured_here():
        yield tmp_path


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take figures of nothing for what is measured, where they do not matter."""
    monkeypatch.setattr(stages, "measure_apart", figures)


def command(made: Path, *more: object) -> tuple[object, ...]:
    """Return the command line of the run that nothing disturbs."""
    options = ("--preset", made / "tiny.yaml", "--perplexity", made / "text.txt")
    options += ("--config", made / "few.yaml")
    return ("compress", made / "dense", "--out", "small", *options, *more)


def same_files(one: Path, two: Path) -> None:
    """Compare two results; times, and what is made from them, may differ."""
    first, second = contents(one), contents(two)
    assert first.keys() == second.keys()
    for name in first:
        if name in ("report.html", "README.md", MANIFEST):
            continue
        if name in ("report.json", "recovery.json"):
            assert _timeless(json.loads(first[name])) == _timeless(json.loads(second[name])), name
        else:
            assert first[name] == second[name], name


def _timeless(data: Any) -> Any:
    if isinstance(data, dict):
        if str(data.get("unit", "")).startswith("tokens/s"):
            return data["name"]
        volatile = ("seconds", "peak memory", "card_digest")
        return {key: _timeless(value) for key, value in data.items() if key not in volatile}
    if isinstance(data, list):
        return [_timeless(one) for one in data]
    return data


def test_all_stages(made: Path) -> None:
    shown = (made / "shown.txt").read_text()
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[0].startswith("dense: 99.0K -> 79.")
    assert "dense pruned recovered" in lines
    for label in ("parameters 99.0K", "size on disk 0.4 MB", "perplexity, text.txt ", "prefill"):
        assert any(line.startswith(label) for line in lines), label
    assert "text.txt: 2,555 tokens in windows of 512" in lines
    assert lines[-1] == "report: small/report.html"
    whole = made / "whole"
    assert sorted(path.name for path in whole.iterdir()) == ["result.json", "small"]
    result = json.loads((whole / "result.json").read_text())
    assert abs(result["ratio"] - 0.2) < 0.005
    assert result["recovery"]["gained"]
    assert result["recovery"]["after"] < result["recovery"]["before"]
    assert result["peak_bytes"] > 100e6
    files = {"dense": made / "dense", "recovered": whole / "small"}
    for name, folder in files.items():
        of = (folder / "model.safetensors").stat().st_size
        assert result["measured"][name]["bytes"] == of, name
    model = load_model(str(whole / "small")).model
    assert model.num_parameters() == result["parameters"]["after"]


def test_the_report_has_all_three_models(made: Path) -> None:
    small = made / "whole" / "small"
    report = read_report(small / "report.json")
    assert report.final == "recovered"
    assert list(report.evaluations) == list(report.sizes) == ["dense", "pruned", "recovered"]
    for found in report.evaluations.values():
        assert found.of("perplexity")[0].stderr is not None
        assert len(found.samples) == 3
    assert report.importance
    assert report.recovery is not None
    steps = [one for one in report.recovery.loss if one.train is not None]
    assert len(steps) == 31  # 122 texts, 4 a step
    assert report.recovery.loss[0].validation is not None
    said = " ".join(map(str, command(made, "--json", "result.json")))
    assert report.command == f"llm-pruner {said}"
    assert report.settings["Run"]["preset"]["criterion"] == "fisher"
    assert {"Model", "Plan", "Recovery"} <= report.settings.keys()
    page = (small / "report.html").read_text()
    assert "Loss of the recovery training by step" in page
    assert "Then it was recovered by LoRA of rank 8 on 122 texts that dense wrote, 31" in page
    assert len(page) < 3e6


def test_the_dense_model_with_the_same_training(work: Path, made: Path, unmeasured: None) -> None:
    result = done(*command(made, "--data", made / "text.txt", "--control", "--json", "r.json"))
    recovery = json.loads(Path("r.json").read_text())["recovery"]
    (text,) = recovery["control"]["texts"]
    assert recovery["control"]["steps"] == recovery["steps"] > 0
    assert f"pruned + training is {text['damage']:.3f} times dense + training" in result.out
    (four,) = read_report(Path("small/report.json")).recovery.control
    assert [row[0] for row in four.cells][1::2] == ["dense + training", "pruned + training"]
    assert "Beside the dense model with the same training" in Path("small/report.html").read_text()


PLACES: tuple[tuple[Any, str, int], ...] = (
    (stages, "measure_apart", 1),
    (llm_pruner.commands.prune, "score", 1),
    (llm_pruner.commands.prune_result, "save_checkpoint", 1),
    (stages, "measure_apart", 1),
    (llm_pruner.commands.recover, "recover_", 1),
    (RecoveryTrainer, "training_step", 5),
    (llm_pruner.commands.recover, "save_checkpoint", 1),
    (stages, "measure_apart", 1),
    (stages, "write_report", 1),
    (stages, "move_result", 1),
)
"""Where the run is interrupted, in the order in which it gets there."""


def test_interrupted_when_all_is_in_place(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: CompressSettings, **_: Any) -> None:
        placed.append(settings.out)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "compress", interrupted)
    result = run("compress", "m", "--out", "small", "--ratio", 0.2)
    assert (result.code, result.err) == (130, "llm-pruner: interrupted; small is complete\n")


def test_a_run_that_is_killed_everywhere_ends_the_same(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_pruner.commands.prune, "KEPT_AFTER", 0)  # however long it took
    for number, (place, name, call) in enumerate(PLACES):
        with monkeypatch.context() as patch:
            interrupt(patch, place, name, call)
            result = run(*command(made, "--json", "result.json"))
        assert result.code == 130, (number, result)
        *began, last = result.err.splitlines()
        assert last == "llm-pruner: interrupted; the same command goes on from here"
        assert began == ["llm-pruner: going on with the run in small.compressing"] * (number > 0)
        assert [path.name for path in work.iterdir()] == ["small.compressing"]
    # The last one: moved, and not cleared away.
    with monkeypatch.context() as patch:
        interrupt(patch, stages.Work, "remove")
        assert run(*command(made, "--json", "result.json")).code == 130
    assert sorted(path.name for path in work.iterdir()) == ["small", "small.compressing"]
    done(*command(made, "--json", "result.json"))
    assert sorted(path.name for path in work.iterdir()) == ["result.json", "small"]
    same_files(work / "small", made / "whole" / "small")


def test_a_preset_says_how_much_and_the_size_of_files_holds(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("criterion: l2\nratio: 0.4\n")
    asked: dict[str, Any] = {"model": "m", "out": "o", "preset": str(preset)}
    found = CompressSettings(**asked, max_shard_size="20KB").pruning(Path("p"))
    assert (found.ratio, found.max_shard_size) == (0.4, "20KB")
    assert CompressSettings(**asked, ratio=0.1).pruning(Path("p")).ratio == 0.1
    found = CompressSettings(**asked, params="3M").pruning(Path("p"))
    assert (found.ratio, found.params) == (None, 3_000_000)
    preset.write_text("criterion: l2\nkv_cache: 0.5\n")
    with pytest.raises(UserError, match="says how much by kv_cache, which compress does not know"):
        CompressSettings(**asked)
    assert CompressSettings(**asked, ratio=0.1).pruning(Path("p")).kv_cache is None


@pytest.mark.parametrize(
    ("said", "plan", "wanted"),
    [
        ({"max_minutes": 5.0}, (None, 1.0), (5.0, 1.0)),
        ({"max_minutes": 5.0, "epochs": 2.0}, (3.0, 3.0), (3.0, 2.0)),
        ({}, (None, 1.0), (None, 1.0)),
    ],
)
def test_what_a_file_says_of_training_holds(
    said: dict[str, float],
    plan: tuple[float | None, float],
    wanted: tuple[float | None, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def recover(settings: Any, **_: Any) -> None:
        seen.append(settings)
        raise UserError("enough")

    monkeypatch.setattr(stages, "recover_checkpoint", recover)
    asked = CompressSettings(model="m", out=tmp_path / "o", training=said)
    with opened(tmp_path / "work", {}, restart=False) as work:
        made = stages._Stages(asked, work, None, lambda _: None, lambda _: None, None)
        amount = {"samples": 9, "minutes": plan[0], "epochs": plan[1]}
        monkeypatch.setattr(made, "_amount", lambda: amount)
        assert made.recover() is None
        assert made.notes == ["recovery was refused, so the pruned model is the result: enough"]
        monkeypatch.setattr(stages, "last_checkpoint", lambda folder: folder / "step-00001")
        with pytest.raises(UserError, match="enough"):  # what was learned is kept
            made.recover()
    assert (seen[0].max_minutes, seen[0].epochs) == wanted


def test_other_settings_are_refused_and_restarted(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, stages, "measure_apart", 2)
        assert run(*command(made)).code == 130
    kept = (work / "small.compressing" / "pruned" / "plan.json").stat().st_mtime_ns
    assert refused(*command(made, "--ratio", 0.3)) == (
        "the interrupted run has ratio=0.2 and this one ratio=0.3; give the same options and "
        "files, or begin anew (--set restart=true; recover: --overwrite)"
    )
    said = refused(*command(made, "--max-shard-size", "1GB"))
    assert said.startswith("the interrupted run has max_shard_size=5GB and this one max_")
    other = save_tiny(work / "dense", num_hidden_layers=4, seed=1)
    said = refused("compress", other, *command(made)[2:])
    assert said.startswith("the interrupted run has model content=")
    text, before = made / "text.txt", (made / "text.txt").read_text()
    text.write_text(before[::-1])
    said = refused(*command(made))
    assert said.startswith(f"the interrupted run has content of {text}=")
    text.write_text(before)
    plan = work / "small.compressing" / "pruned" / "plan.json"
    assert plan.stat().st_mtime_ns == kept
    options = ("--ratio", 0.1, "--restart", "--time-budget", "1s", "--json", "r.json")
    result = done(*command(made, *options))
    assert result.err.startswith("llm-pruner: warning: the time budget leaves 0 s for recovery, ")
    assert result.err.endswith("are not worth it: the pruned model is the result\n")
    found = json.loads(Path("r.json").read_text())
    assert found["recovery"] is None
    assert list(found["measured"]) == ["dense", "pruned"]
    report = read_report(Path("small/report.json"))
    assert report.final == "pruned"
    assert abs(report.sizes["pruned"].total / report.sizes["dense"].total - 0.9) < 0.005


def test_no_gain_gives_the_pruned_model(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(Path("small"), overwrite=False) as small:
        (small / "old").write_text("old")
    assert "exists and is not empty" in refused(*command(made))
    # Steps that no weight can take in; large ones may by chance find something better.
    still = "samples: 128\ntraining: {learning_rate: 1.0e-30, trainer: {max_steps: 3}}\n"
    Path("still.yaml").write_text(still)
    result = done(*command(made, "--overwrite", "--config", "still.yaml"))
    Path("still.yaml").unlink()
    assert "warning: training brought no gain (held-out loss " in result.err
    assert "so the pruned model is the result" in result.err
    report = read_report(Path("small/report.json"))
    assert report.final == "pruned"
    assert report.recovery is not None
    assert "which brought no gain" in Path("small/report.html").read_text()
    assert not Path("small/old").exists()
    assert [path.name for path in work.iterdir()] == ["small"]


def test_what_has_no_room_to_train_gives_the_pruned_model(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm_pruner.commands.recover, "recover_", full)
    said = "so the pruned model is the result: the GPU has no room to train in"
    assert said in done(*command(made)).err
    assert read_report(Path("small/report.json")).final == "pruned"
    assert [path.name for path in work.iterdir()] == ["small"]


def test_a_loss_that_is_infinite_can_be_read_again() -> None:
    said = {"gained": False, "steps": 1, "best_step": 0, "stopped": None, "tokens": 1, "seconds": 1}
    read = TypeAdapter(stages._TRAINING).validate_python(said | {"loss": [2.5, None]})
    assert (read.before, read.after) == (2.5, math.inf)


def test_a_time_budget_is_divided_once(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHORTEST", 1.0)
    monkeypatch.setattr(stages, "MOST_SAMPLES", 128)
    patient = ("--time-budget", "60s", "--config", made / "patient.yaml")
    (made / "patient.yaml").write_text("training: {patience: 100}\n")
    # Steps that take no time: all fit, however busy the machine is.
    ticks = SimpleNamespace(monotonic=count(step=0.001).__next__)
    monkeypatch.setattr("llm_pruner.recovery.callbacks.time", ticks)
    with monkeypatch.context() as patch:
        interrupt(patch, RecoveryTrainer, "training_step", 6)
        assert run(*command(made, *patient)).code == 130
    decided = json.loads(Path("small.compressing/amount.json").read_text())
    assert (decided["samples"], decided["written"]) == (None, 72)
    assert 0 < decided["minutes"] < 0.95

    def decide(*_: object) -> float:
        raise AssertionError("decided again")

    monkeypatch.setattr(stages._Stages, "_around", decide)
    done(*command(made, *patient))
    assert json.loads(Path("small/recovery.json").read_text())["steps"] > 40


def test_durations() -> None:
    for text, seconds in (("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400)):
        assert parse_duration(text) == seconds
    for text in ("", "30", "0s", "m", "-5m", "5 minutes"):
        with pytest.raises(UserError, match="is no time; write such as 90s, 30m or 2h"):
            parse_duration(text)


def test_what_the_model_refuses_leaves_nothing(work: Path, made: Path) -> None:
    said = refused(*command(made, "--ratio", 0.95))
    assert "0.95" in said
    text = write_text(work / "short.txt", 40)
    said = refused(*command(made, "--calibration", text))
    assert said.startswith("short.txt gives ")
