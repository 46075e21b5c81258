"""``llm-pruner compress``: all stages in one command, killed in each of them, and refusals."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
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
from helpers import tiny_tokenizer
from llm_pruner.cli.compress import show
from llm_pruner.commands.compress import chunks_in_time, time_to_recover, trainings
from llm_pruner.commands.workdir import content, opened
from llm_pruner.errors import UserError
from llm_pruner.files.disk import placed
from llm_pruner.files.outputs import MANIFEST, atomic_directory
from llm_pruner.models.load import load_model
from llm_pruner.recovery.trainer import RecoveryTrainer
from llm_pruner.report.data import read_report
from llm_pruner.report.records import Change, Compressed, Measured, Weighed
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.words import parse_duration
from llm_pruner.types import Size
from new_processes import start

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
UNMEASURED = """
from command import figures
from llm_pruner.cli import main
from llm_pruner.commands import compress
compress.measure_apart = figures
main()
"""
"""A process that measures nothing: each one that would takes seconds to import PyTorch."""


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
        assert found.perplexity[0].stderr is not None
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
    assert [row.model for row in four.rows][1::2] == ["dense + training", "pruned + training"]
    assert "Beside the dense model with the same training" in Path("small/report.html").read_text()


def test_the_control_has_a_share_of_the_time() -> None:
    sizes: Any = {"dense": Size(total=1000), "pruned": Size(total=800)}
    assert trainings(sizes, control=True) == 2.25
    assert trainings(sizes, control=False) == 1
    assert trainings({}, control=True) == 2  # where no report could be drawn


PLACES: tuple[tuple[Any, str, int], ...] = (
    (llm_pruner.commands.prune, "score", 1),
    (llm_pruner.commands.prune, "save_checkpoint", 1),
    (stages, "measure_apart", 1),
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


def test_a_run_that_is_killed_as_it_trains_ends_the_same(
    work: Path, made: Path, unmeasured: None
) -> None:
    args = command(made, "--json", "result.json")
    process = start(UNMEASURED, *args, said=made / "said.txt")
    end = time.monotonic() + 300
    training = work / "small.compressing" / "recovered.recovering"
    while not list(training.glob("step-*")) and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (made / "said.txt").read_text()
    assert not (work / "small").exists()
    result = done(*args)
    assert result.err == "llm-pruner: going on with the run in small.compressing\n"
    whole = made / "whole" / "small"
    for name in ("report.json", "report.html", "README.md"):  # hold what was measured
        (work / "small" / name).write_bytes((whole / name).read_bytes())
    same_files(work / "small", whole)


def test_samples_that_changed_before_training_began_are_no_refusal(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, llm_pruner.commands.recover, "recover_")
        assert run(*command(made)).code == 130
    kept = work / "small.compressing" / "recovered.recovering" / "run.json"
    asked = json.loads(kept.read_text())
    # As of a chat template that writes the date.
    kept.write_text(json.dumps(asked | {"data_fingerprint": "of yesterday"}))
    result = done(*command(made))
    assert result.err == "llm-pruner: going on with the run in small.compressing\n"
    assert read_report(Path("small/report.json")).final == "recovered"


def test_what_goes_on_after_a_restart_is_the_command_without_it(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, stages, "measure_apart")
        result = run(*command(made, "--restart"))
    assert result.code == 130
    said = "interrupted; the same command without --restart goes on from here\n"
    assert result.err.endswith(said)


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


@pytest.mark.parametrize("said", [{}, {"seed": 1}])
def test_text_is_written_under_the_seed_that_it_is_read_by(
    said: dict[str, int], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(stages, "write_text_cached", lambda *_, seed, **__: seeds.append(seed))
    dense, out = str(made / "dense"), tmp_path / "o"
    asked = CompressSettings(model=dense, out=out, preset=str(made / "tiny.yaml"), training=said)
    with opened(tmp_path / "work", {}, restart=False) as work:
        run = stages._Stages(asked, work, None, lambda _: None, lambda _: None, None)
        assert run._calibrated() == (0 if said else 8)
        shutil.copytree(dense, work.path("pruned"))
        monkeypatch.setattr(run, "_sample_length", lambda: 24)
        run._write(0.0)
    assert set(seeds) == {said.get("seed", 0)} == {run._recovering(run.training).seed}


def test_a_packed_file_has_no_size_to_compare_with(tmp_path: Path) -> None:
    """What its weights take on disk says nothing of pruning."""
    packed = tmp_path / "m.gguf"
    packed.write_bytes(b"GGUF")
    asked = CompressSettings(model=str(packed), out=tmp_path / "out", ratio=0.2)
    with opened(tmp_path / "work", {}, restart=False) as work:
        made = stages._Stages(asked, work, None, lambda _: None, lambda _: None, None)
        work.once("dense", Measured, lambda: Measured("m", 9, None, None, []))
        assert made._weighed("dense").bytes is None


def test_the_content_of_a_file_is_not_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(3 * 2**20))
    wanted = hashlib.sha256(text.read_bytes()).hexdigest()[:16]
    monkeypatch.delattr(Path, "read_bytes")
    assert content(str(text)) == wanted
    assert content(str(tmp_path)) is None


def test_other_items_of_a_task_are_another_run(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "dense")
    items = tmp_path / "boolq.jsonl"
    asked: dict[str, Any] = {"model": str(model), "out": tmp_path / "o", "tasks_data": tmp_path}
    seen = []
    for text in ("one", "two"):
        items.write_text(text)
        seen.append(stages.about(CompressSettings(**asked, tasks="boolq")))
    assert seen[0] != seen[1]


def test_other_settings_are_refused_and_restarted(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, stages, "measure_apart")
        assert run(*command(made)).code == 130
    kept = (work / "small.compressing" / "pruned" / "plan.json").stat().st_mtime_ns
    assert refused(*command(made, "--ratio", 0.3)) == (
        "small.compressing holds an interrupted run with ratio=0.2 and not 0.3; give the same "
        "options to go on, or --restart to throw it away"
    )
    said = refused(*command(made, "--max-shard-size", "1GB"))
    assert said.startswith(
        "small.compressing holds an interrupted run with max_shard_size=5GB and not 1GB; give"
    )
    other = save_tiny(work / "dense", num_hidden_layers=4, seed=1)
    said = refused("compress", other, *command(made)[2:])
    assert said.startswith("small.compressing holds an interrupted run with model content=")
    assert "--seed" not in said
    text, before = made / "text.txt", (made / "text.txt").read_text()
    text.write_text(before[::-1])
    said = refused(*command(made))
    assert said.startswith(f"small.compressing holds an interrupted run with content of {text}=")
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


def test_two_runs_do_not_share_a_folder(work: Path, made: Path, unloaded: None) -> None:
    with opened(work / "small.compressing", {"ratio": 0.2}, restart=False):
        said = refused(*command(made))
    assert said == ("another process is at work in small.compressing; wait for it, or end it")
    (work / "small.compressing" / "settings.json").write_text("{")
    assert refused(*command(made)).endswith("settings.json is damaged; begin anew with --restart")
    (work / "small.compressing" / "settings.json").unlink()
    (work / "small.compressing" / "mine").touch()
    said = "small.compressing holds mine, which no run wrote, and a run would keep its work there; "
    for more in ((), ("--restart",)):
        assert refused(*command(made, *more)).startswith(said)


def test_no_gain_gives_the_pruned_model(
    work: Path, made: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(Path("small"), overwrite=False) as small:
        (small / "old").write_text("old")
    assert "exists and is not empty" in refused(*command(made))
    # Steps that no weight can take in; large ones may by chance find something better.
    still = "samples: 128\ntraining: {learning_rate: 1.0e-30, max_steps: 3}\n"
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


def test_weights_that_are_read_block_by_block_have_no_speed(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_pruner.commands.evaluate, "is_model_streamed", lambda _: True)
    said = refused("evaluate", made / "dense", "--speed")
    assert said.startswith("--speed would time how fast the weights of ")
    shown = done(*command(made, "--no-recover")).out
    assert re.search(r"prefill tokens/s +- +-\n", shown)


def test_speeds_of_two_machines_do_not_stand_beside_each_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(**where: Any) -> Weighed:
        found = figures()
        return Weighed(**{**vars(found), "speed": replace(found.speed, **where)}, bytes=1)

    models: dict[Any, Weighed] = {
        "dense": measured(threads=8),
        "pruned": measured(threads=4),
        "recovered": measured(threads=8),
    }
    show(Compressed(Path("small"), "m", Change(9, 8), 0.1, models, None, [], 0))
    assert re.search(r"decode tokens/s +1\.0 +- +1\.0\n", capsys.readouterr().out)


def test_a_text_too_short_to_measure_on_is_refused_at_once(
    work: Path, made: Path, unloaded: None
) -> None:
    short = write_text(work / "short.txt", 60)
    options = ("--preset", made / "tiny.yaml", "--perplexity", short)
    said = refused("compress", made / "dense", "--out", "small", *options)
    assert said.startswith("short.txt gives ")
    assert said.endswith("the text is too short; use more text")
    said = refused(*command(made, "--calibration", write_text(work / "short.txt", 30)))
    where = "(compress has that from its --preset: name another, or a YAML file)"
    assert "--seq-len" in said or "--samples" in said
    assert said.endswith(where)


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
    assert (decided["samples"], decided["written"]) == (None, 128)
    assert 0 < decided["minutes"] < 0.95
    # The number of steps was chosen after a few of them, and kept at once.
    (state,) = Path("small.compressing/recovered.recovering").glob("step-*/state.json")
    planned = json.loads(state.read_text())["run"]
    assert planned["planned"]

    def decide(*_: object) -> float:
        raise AssertionError("decided again")

    monkeypatch.setattr(stages, "time_to_recover", decide)
    done(*command(made, *patient))
    assert (
        json.loads(Path("small/recovery.json").read_text())["steps"] == planned["total"] == 93
    )  # 3 passes over 122 or more texts


def test_durations() -> None:
    for text, seconds in (("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400)):
        assert parse_duration(text) == seconds
    for text in ("", "30", "0s", "m", "-5m", "5 minutes"):
        with pytest.raises(UserError, match="is no time; write such as 90s, 30m or 2h"):
            parse_duration(text)


def test_what_is_kept_back() -> None:
    pruning = {"load": 5.0, "save": 3.0, "estimate": 60.0}
    left = time_to_recover(600, 100, {"prune": 70, "pruned": 20}, pruning)
    assert left == pytest.approx(600 - 100 - 22 - 15 - 3 - 10)


def test_text_is_written_while_time_lasts() -> None:
    now = 0.0

    def write(_: int) -> None:
        nonlocal now
        now += 4

    for there, most, seconds, wanted in ((0, 9, 0, 1), (1, 9, 0, 1), (1, 9, 10, 3), (0, 2, 99, 2)):
        found = chunks_in_time(there, most, seconds, write, lambda: now, longest=4)
        assert found == wanted, (there, most, seconds)


def test_chats_that_the_template_refuses_are_found_before_pruning(
    work: Path, made: Path, unloaded: None
) -> None:
    dense = work / "dense"
    shutil.copytree(made / "dense", dense)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' and loop.index > 1 %}"
        "{{ raise_exception('2') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    )
    tokenizer.save_pretrained(dense)
    turns = [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]
    rows = [{"messages": turns[1:]}] * 1200 + [{"messages": turns}]
    (work / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused("compress", dense, "--out", "small", "--data", "chats.jsonl")
    said = said.removeprefix("chats.jsonl: record 1201: ")
    assert said.startswith("the tokenizer's chat template rejects a chat (2)")


def test_data_of_one_sample_is_found_before_pruning(work: Path, made: Path, unloaded: None) -> None:
    (work / "few.txt").write_text("A line of a few words.")
    said = refused("compress", made / "dense", "--out", "small", "--data", "few.txt")
    assert said.startswith("few.txt gives 1 samples and 1 of them are to be held out")


def test_what_the_model_refuses_leaves_nothing(work: Path, made: Path) -> None:
    said = refused(*command(made, "--ratio", 0.95))
    assert "0.95" in said
    text = write_text(work / "short.txt", 40)
    said = refused(*command(made, "--calibration", text))
    assert said.startswith("short.txt gives ")
