"""Reports of real runs, through the command line: prune, evaluate --report, compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import llm_pruner.models.load
import llm_pruner.report.facts
import llm_pruner.report.write
from command import contents, done, refused, run, save_tiny, write_text
from llm_pruner.cli.output import command_line
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.speed import Speed
from llm_pruner.evaluation.zero_shot import MetricResult, TaskResult
from llm_pruner.report.data import read_report
from llm_pruner.report.facts import evaluation_of, source_of
from llm_pruner.report.records import Measured, Weighed, ZeroShot
from llm_pruner.report.write import digest, render_card, render_html

pytestmark = pytest.mark.slow

REPORT = ("report.html", "report.json", "README.md")


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder, which tests copy before they change it."""
    folder = tmp_path_factory.mktemp("pruned") / "small"
    text = write_text(folder.parent / "text.txt")
    options = ("--ratio", 0.2, "--calibration", text, "--samples", 4, "--seq-len", 24)
    done("prune", tiny, "--out", folder, *options)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: Path) -> Path:
    """A current folder with a copy of the pruned folder."""
    shutil.copytree(pruned, tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_run_leaves_a_report(tiny: Path, pruned: Path) -> None:
    assert {path.name for path in pruned.iterdir()} >= set(REPORT)
    report = read_report(pruned / "report.json")
    weights = load_file(pruned / "model.safetensors")
    assert report.sizes["pruned"].total == sum(weight.numel() for weight in weights.values())
    assert report.sizes["dense"].total == 136_080
    assert report.sizes["dense"].bytes == 4 * 136_080
    assert (report.saved_as, report.needs) == ("remote_code", ("trust_remote_code=True",))
    assert 0 <= report.twin_difference <= 1e-5
    # What is left, and what was removed, agree with the plan.
    plan = json.loads((pruned / "plan.json").read_text())
    removed = {group["name"]: group["removed"] for group in plan["groups"]}
    for layer in report.layers:
        if layer.layer is not None:
            kept, dense = layer.sizes["ffn"]
            assert (kept < dense) == (f"layers.{layer.layer}.ffn" in removed)
    maps = {found.kind: found.rows for found in report.importance}
    assert set(maps) == {"heads", "ffn"}
    # One layer in six is protected at the start and one at the end.
    assert [row.layer for row in maps["ffn"]] == [1, 2, 3, 4]
    for row in maps["ffn"]:
        kept, dense = report.layers[1 + row.layer].sizes["ffn"]
        assert (row.units, row.removed) == (dense, dense - kept)
        assert all(value > 0 for value in row.bins)
    assert report.criterion.endswith("on 4 × 24 tokens of text.txt")
    assert report.settings["Calibration text"]["samples"] == 4
    assert report.settings["Where from"]["structures"] == ["heads", "ffn"]
    assert report.settings["Model"]["dtype"] == "auto"
    assert report.versions["torch"]
    assert report.command.startswith(f"llm-pruner prune {tiny} --out {pruned} --ratio 0.2")
    # What was not measured is not there.
    assert report.evaluations == {}
    assert report.recovery is None
    page, card = ((pruned / name).read_text() for name in ("report.html", "README.md"))
    assert page == render_html(report)
    assert card == render_card(report)
    assert digest(card) == report.card_digest
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert "import llm_pruner" not in card
    assert card.count("trust_remote_code=True)") == 2
    modes = {(pruned / name).stat().st_mode & 0o044 for name in REPORT}
    assert modes == {0o044}


def test_prune_says_where_the_report_is(tiny: Path, work: Path) -> None:
    options = ("--ratio", 0.2, "--criterion", "l1", "--no-verify")
    assert "\nreport: out/report.html\n" in done("prune", tiny, "--out", "out", *options).out
    done("prune", tiny, "--out", "plan.json", *options, "--dry-run")
    assert not Path("report.html").exists()
    # A plan that is replayed estimates nothing, so there is no importance to show.
    done("prune", tiny, "--out", "again", "--plan", "plan.json", "--no-verify")
    report = read_report(Path("again/report.json"))
    assert report.importance == ()
    assert report.criterion == "L1 importance (aggregate sum)"
    # A pruned model can be pruned again, and its old report does not come along.
    done("prune", "out", "--out", "third", "--ratio", 0.1, "--criterion", "l1", "--no-verify")
    report = read_report(Path("third/report.json"))
    assert report.source.name == "out"


def test_a_report_that_fails_costs_no_checkpoint(
    tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(report: object) -> dict[str, str]:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(llm_pruner.report.write, "files", files)
    options = ("--ratio", 0.2, "--criterion", "l2", "--no-verify")
    with pytest.warns(UserWarning, match=r"no report was written \(RuntimeError: no fonts\); the"):
        result = done("prune", tiny, "--out", "out", *options, "--json", "-")
    assert json.loads(result.out)["report"] is None
    assert Path("out/model.safetensors").is_file()
    assert not Path("out/report.html").exists()


def test_evaluate_adds_to_the_report(tiny: Path, work: Path) -> None:
    text = write_text(Path("own.txt"))
    before = contents(Path())
    options = ("--perplexity", text, "--seq-len", 100, "--report", "small")
    shown = done("evaluate", "small", *options, "--prompt", "the old", "--new-tokens", 3).out
    assert shown.endswith("added to small/report.html\n")
    done("evaluate", tiny, *options, "--json", "dense.json")
    report = read_report(Path("small/report.json"))
    dense, small = (report.evaluations[of].of("perplexity")[0] for of in ("dense", "pruned"))
    said = json.loads(Path("dense.json").read_text())
    assert dense.value == said["perplexity"][0]["perplexity"]
    assert small.value != dense.value
    assert list(report.evaluations["pruned"].samples) == ["the old"]
    assert len(report.evaluations["pruned"].samples["the old"]) <= 3  # a character is a token
    page, card = (Path("small", name).read_text() for name in ("report.html", "README.md"))
    assert page == render_html(report)
    assert "own.txt" in page
    assert "own.txt" in card
    # All else is as it was: measuring leaves the checkpoint alone.
    after = contents(Path())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"small/{name}" for name in REPORT}


def test_a_card_that_was_edited_is_left_alone(work: Path) -> None:
    write_text(Path("own.txt"))
    edited = Path("small/README.md").read_text() + "\nMine.\n"
    Path("small/README.md").write_text(edited)
    done("evaluate", "small", "--perplexity", "own.txt", "--seq-len", 64, "--report", "small")
    assert Path("small/README.md").read_text() == edited
    assert "own.txt" in Path("small/report.html").read_text()


def test_evaluate_refuses_reports_of_other_models(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny(tmp_path_factory.mktemp("other") / "other", num_hidden_layers=2)
    before = contents(work)
    result = run("evaluate", other, "--prompt", "the", "--report", "small")
    assert (result.code, contents(work)) == (2, before)
    assert "other: 62.0K parameters" not in result.out  # nothing was measured
    assert f"{other} has 61,968 parameters and is " in result.err
    asked = "neither the model in small nor tiny, of which it was made; name"
    assert asked in result.err
    monkeypatch.setattr(llm_pruner.models.load, "load_model", None)  # not reached
    Path("empty").mkdir()
    said = refused("evaluate", "small", "--prompt", "the", "--report", "empty")
    assert said == "empty has no report.json; name a folder that llm-pruner prune wrote"
    Path("small/report.json").write_text("{}")
    said = refused("evaluate", "small", "--prompt", "the", "--report", "small")
    assert said.startswith("small/report.json is no report that can be read (source: ")


def measured(**found: Any) -> Measured:
    """Return what was measured of a model, empty where nothing is given."""
    empty: dict[str, Any] = {"perplexity": [], "zero_shot": None, "speed": None, "samples": {}}
    sizes = {"parameters": 9, "parameters_embedding": None, "parameters_blocks": None}
    return Measured(model="m", **sizes, **empty | found)


def tasks_of(*results: TaskResult) -> ZeroShot:
    """Return the results of tasks with nothing else."""
    return ZeroShot([*results], None, None, [], "local", None, "float32", {})


def task_of(name: str, metrics: dict[str, MetricResult], documents: int = 20) -> TaskResult:
    """Return the result of one task, of which ``acc`` is the metric of the paper."""
    return TaskResult(name, metrics, "acc", documents, documents, 0, "1", 0)


def perplexity_of(value: float) -> PerplexityResult:
    """Return a perplexity on ``own.txt``."""
    return PerplexityResult(value, 1.0, 630, "own.txt", None, 64, 10, "standard", 0.25)


def test_what_is_measured_becomes_a_part() -> None:
    metrics = {
        "acc": MetricResult(0.5, 0.1, True),
        "acc_norm": MetricResult(0.625, None, None),
        "bits": MetricResult(0.7, None, False),
        "points": MetricResult(31.0, None, True),
    }
    found = evaluation_of(measured(zero_shot=tasks_of(task_of("piqa", metrics))))
    (score,) = found.of("tasks")
    assert (score.label, str(score)) == ("piqa, acc, % (20 items, float32)", "50.0 ± 10.0")
    assert score.in_mean
    other = replace(task_of("mmlu", metrics), paper_metric=None)
    found = evaluation_of(measured(zero_shot=tasks_of(other)))
    assert [one.name for one in found.of("tasks")] == ["mmlu, acc", "mmlu, acc_norm"]
    assert not any(one.in_mean for one in found.results)
    speed = Speed(128.0, 16.0, (1.0, 0.5, 2.0), (4.0,), 64, 32, 2, 3, "float32", "EPYC", 2)
    found = evaluation_of(Weighed(**vars(measured(speed=speed)), bytes=1000))
    assert [(one.label, one.value, one.low, one.high, one.better) for one in found.results] == [
        ("size on disk", 1000, None, None, "lower"),
        # 2 x 64 tokens in 2 and in half a second.
        (
            *("prefill, tokens/s (64 tokens, batch 2, float32, EPYC, 2 threads)", 128.0),
            *(64.0, 256.0, "higher"),
        ),
        (
            *("decode, tokens/s (32 tokens, batch 2, float32, EPYC, 2 threads)", 16.0),
            *(None, None, "higher"),
        ),
    ]


def test_the_licence_comes_along(work: Path) -> None:
    Path("model").mkdir()
    assert source_of("model", "model", None, object()).license is None
    Path("model/README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    found = source_of("model", "model", None, object())
    assert (found.license, found.hub_id, found.architecture) == ("mit", None, "object")
    assert source_of("org/model", "org/model", "abc", object()).hub_id == "org/model"


def test_the_command_is_for_a_shell_and_tells_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    given = [
        "prune",
        "/home/anna/my model",
        "--out=/home/anna/x",
        "/home/anna",
        "--plan=/home/anna/",
        "/home/annabel/y",
        "a b",
        "--z=1",
        "c4:0.6,/home/anna/code.jsonl:0.4",
        "logging_dir=/home/anna/x",
    ]
    monkeypatch.setattr("sys.argv", ["/usr/bin/llm-pruner", *given])
    assert command_line() == (
        "llm-pruner prune ~/'my model' '--out=~/x' '~' '--plan=~/' /home/annabel/y 'a b' --z=1 "
        "'c4:0.6,~/code.jsonl:0.4' 'logging_dir=~/x'"
    )


# Compare.


@pytest.fixture
def pair(work: Path, tiny: Path) -> Path:
    """Two pruned models with reports; of both and of the dense one the perplexity is known."""
    write_text(Path("own.txt"))
    shutil.copytree("small", "other")
    for folder, values in (("small", (9.5, 3.25)), ("other", (9.5, 4.0))):
        report = read_report(Path(folder, "report.json"))
        for variant, value in zip(("dense", "pruned"), values, strict=True):
            found = evaluation_of(measured(perplexity=[perplexity_of(value)]))
            report = report.with_evaluation(variant, found)
        Path(folder, "report.json").write_text(report.to_json())
    return work


def test_compare_shows_models_side_by_side(pair: Path) -> None:
    shown = done("compare", "small", "20% again=other", "--json", "found.json").out
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "dense small 20% again" in lines
    assert "parameters 136.1K 109.0K 109.0K" in lines
    assert "removed - 19.9% 19.9%" in lines
    assert "own.txt 9.50 ± 0.25 3.25 ± 0.25 4.00 ± 0.25" in lines
    assert "own.txt: standard protocol, windows of 64, 630 tokens" in lines
    found = json.loads(Path("found.json").read_text())
    models = {model["label"]: model for model in found["models"]}
    assert list(models) == ["dense", "small", "20% again"]
    assert models["small"]["removed"] == pytest.approx(0.2, abs=0.005)
    assert models["20% again"]["found"]["results"][0]["value"] == 4.0


def test_compare_writes_a_table_for_a_readme(pair: Path) -> None:
    written = done("compare", "small", "other", "--markdown").out
    head, marks, dense, small, *_ = written.splitlines()
    assert head.startswith("| model | parameters | removed | weights | units | chosen by | perplex")
    assert marks == "| --- | ---: | ---: | ---: | --- | --- | ---: |"
    assert dense == "| dense | 136.1K | – | 0.5 MB | – | – | 9.50 ± 0.25 |"
    assert small.startswith("| small | 109.0K | 19.9% | 0.4 MB | heads, FFN channels | Taylor imp")
    assert "- own.txt: standard protocol, windows of 64, 630 tokens\n" in written


def test_compare_refuses(pair: Path) -> None:
    Path("empty").mkdir()
    for args, said in (
        (("absent",), "absent is no folder; name checkpoints that llm-pruner prune wrote"),
        (("a=absent",), "absent is no folder; name checkpoints that llm-pruner prune wrote"),
        (("empty",), "empty has no report.json; name a folder that llm-pruner prune wrote"),
        (("small", "small"), "two models are called 'small'; tell them apart with NAME=DIR"),
        (
            ("small", "--markdown", "--json", "-"),
            "--markdown and --json - both write to stdout; give --json a file",
        ),
    ):
        assert refused("compare", *args).startswith(said)
