"""``llm-pruner curve``: points are those of ``prune``; an answer; going on after a kill."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import llm_pruner as lp
import llm_pruner.recovery as recovery
from command import Result, done, refused, run, save_tiny
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands.curve import CurveRun, smallest_for
from llm_pruner.commands.prune import PruneRun
from llm_pruner.evaluation.divergence import Divergence
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.report.records import CurvePoint, Smallest
from llm_pruner.settings.curve import CurveSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

TEXT = ("--calibration", "text.txt", "--samples", 16, "--seq-len", 24)
HOW = ("--preset", "balanced", *TEXT)
SHORT = ("--ratios", "0.1,0.3", "--measured-tokens", 480)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model and text without a pattern."""
    folder = tmp_path_factory.mktemp("curve")
    save_tiny(folder / "dense", num_hidden_layers=4, initializer_range=0.2)
    letters = random.Random(0)
    for name in ("text.txt", "other.txt"):
        text = "".join(letters.choice("abcdefghij klmnop") for _ in range(4000))
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[dict[str, Any], Result]:
    """What a run wrote to ``sizes``, as data and as it is printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shown = done("curve", "dense", "--out", "sizes", *HOW, *SHORT, "--max-damage", "0.01")
    return json.loads((place / "sizes/curve.json").read_text()), shown


def dry_run(ratio: object, *options: object) -> bytes:
    done(
        "prune",
        "dense",
        "--dry-run",
        "--out",
        "plan.json",
        "--overwrite",
        "--ratio",
        ratio,
        *options,
    )
    return Path("plan.json").read_bytes()


def test_plans_are_those_of_prune(made: tuple[dict[str, Any], Result]) -> None:
    data, _ = made
    for point in (*data["points"], data["smallest"]["point"]):
        assert (Path("sizes") / point["plan"]).read_bytes() == dry_run(point["asked"], *HOW)


def test_points_are_measured_as_what_prune_saves(made: tuple[dict[str, Any], Result]) -> None:
    data, _ = made
    first, second = data["points"]
    assert first["removed"] == pytest.approx(0.1, abs=5e-3)
    assert 0 < first["measured"]["divergence"]["kl"] < second["measured"]["divergence"]["kl"]
    assert first["refitted"] > 0
    assert sum(first["split"].values()) == 1
    assert "estimate" in first["seconds"]
    assert "estimate" not in second["seconds"]
    assert sum(point["seconds"]["measure"] for point in data["points"]) < data["seconds"]["measure"]
    # The same model, cut from the plan, on the same text.
    done("prune", "dense", "--out", "small", "--ratio", 0.3, *HOW)
    text = ("--perplexity", "other.txt", "--seq-len", 512, "--against", "dense")
    found = json.loads(done("evaluate", "small", *text, "--json", "-").out)["perplexity"][0]
    same = ("--text", "other.txt", "--ratios", 0.3)
    told = done("curve", "dense", "--out", "one", *HOW, *same, "--json", "-").out
    (point,) = json.loads(told)["points"]
    assert point["measured"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)
    assert point["measured"]["divergence"]["kl"] == pytest.approx(
        found["divergence"]["kl"], rel=1e-3
    )
    assert point["perplexity_ratio"] == pytest.approx(
        found["perplexity"] / found["divergence"]["perplexity"], rel=1e-4
    )


def test_what_is_written_and_shown(made: tuple[dict[str, Any], Result]) -> None:
    data, shown = made
    best = data["smallest"]
    names = {"plan-0.1.json", "plan-0.3.json", best["point"]["plan"], "request.yaml"}
    names |= {"curve.json", "report.html"}
    assert {path.name for path in Path("sizes").iterdir() if path.name[0] != "."} == names
    assert not Path("sizes.measuring").exists()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line.split() for line in lines if line.startswith(" 10."))
    first = data["points"][0]
    assert row[0] == f"{100 * first['removed']:.1f}%"
    assert row[-1] == f"{first['perplexity_ratio']:.3f}"
    assert "a plan for each size is there, such as plan-0.1.json" in lines
    assert "measured on rest of text.txt, 460 tokens in windows of 24" in lines
    assert f"For a KL divergence of 0.01 nats {100 * best['point']['removed']:.1f}%" in shown.out
    page = Path("sizes/report.html").read_text()
    assert "Damage by the share of parameters removed. 10." in page
    assert "llm-pruner curve dense --out sizes" in page.replace("<span>", "").replace("</span>", "")
    again = done("curve", "--config", "sizes/request.yaml", "--out", "again", "--json", "-").out
    points = json.loads(again)["points"]
    assert [one["measured"] for one in points] == [one["measured"] for one in data["points"]]


def test_a_plan_can_be_replayed(made: tuple[dict[str, Any], Result]) -> None:
    data, _ = made
    told = done("prune", "dense", "--out", "replay", "--plan", "sizes/plan-0.3.json", "--json", "-")
    assert json.loads(told.out)["parameters_after"] == data["points"][1]["parameters"]


def test_an_interrupted_run_goes_on(
    made: tuple[dict[str, Any], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("curve", "dense", "--out", "late", *HOW, *SHORT)
    point = CurveRun.point
    asked: list[float] = []

    def interrupted(self: CurveRun, ratio: float) -> Any:
        asked.append(ratio)
        if ratio == 0.3:
            raise KeyboardInterrupt
        return point(self, ratio)

    monkeypatch.setattr(CurveRun, "point", interrupted)
    result = run(*command)
    assert result.code == 130
    assert result.err.endswith("interrupted; the same command goes on from here\n")
    assert not Path("late").exists()
    assert run(*command[:-1], 240).err.startswith("llm-pruner: the interrupted run has ")

    monkeypatch.setattr(
        CurveRun, "point", lambda self, ratio: asked.append(-ratio) or point(self, ratio)
    )
    result = done(*command)
    assert result.err == "llm-pruner: going on with the run in late.measuring\n"
    assert asked == [0.1, 0.3, -0.3]
    data = json.loads(Path("late/curve.json").read_text())
    first, second = (one["measured"] for one in data["points"])
    one, other = (point["measured"] for point in made[0]["points"])
    assert first == one
    # The refit ran the dense model's blocks anew, in other batches than the estimate.
    assert second["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
    assert second["divergence"]["kl"] == pytest.approx(other["divergence"]["kl"], rel=1e-2)


def test_a_model_read_block_by_block_has_the_same_points(
    made: tuple[dict[str, Any], Result],
) -> None:
    done("curve", "dense", "--out", "blocks", *HOW, *SHORT, "--memory", "100KB")
    data = json.loads(Path("blocks/curve.json").read_text())
    for one, resident in zip(data["points"], made[0]["points"], strict=True):
        plan = one["plan"]
        assert (Path("blocks") / plan).read_bytes() == (Path("sizes") / plan).read_bytes()
        found, known = one["measured"], resident["measured"]
        assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-4)
        assert found["divergence"]["kl"] == pytest.approx(known["divergence"]["kl"], rel=1e-3)


def test_sizes_that_cannot_be_reached() -> None:
    """Those that were asked for by name are refused, others left out."""
    how = ("--structures", "ffn", "--layers", "ffn=1-1", "--criterion", "l2", *HOW)
    said = refused("curve", "dense", "--out", "heads", *how, "--ratios", "0.05,0.6")
    assert "ratio=0.6 cannot be reached" in said
    result = done("curve", "dense", "--out", "heads", *how)
    assert "warning: no point at 0.6: ratio=0.6 cannot be reached" in result.err
    data = json.loads(Path("heads/curve.json").read_text())
    assert [one["asked"] for one in data["points"]] == [0.1]


def test_text_to_measure_on_must_be_left() -> None:
    how = ("--preset", "fast", "--calibration", "text.txt", "--seq-len", 40, "--samples")
    said = refused("curve", "dense", "--out", "none", *how, 100)
    assert "all of text.txt is calibrated on" in said


def test_sizes_are_measured_in_their_order() -> None:
    asked: dict[str, Any] = {"model": "m", "out": Path("o")}
    assert CurveSettings(**asked, ratios=[0.5, 0.1, 0.5]).ratios == (0.1, 0.5)


def test_a_text_that_is_too_short_is_refused_before_a_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PruneRun, "make_plan", lambda *_: pytest.fail("a point was begun"))
    Path("short.txt").write_text("a few words")
    said = refused("curve", "dense", "--out", "none", *HOW, "--text", "short.txt")
    assert "the text is too short; use measured_tokens 11 or less, or more text" in said


def test_from_python(made: tuple[dict[str, Any], Result]) -> None:
    model = lp.load("dense")
    before = {name: one.clone() for name, one in model.network.state_dict().items()}
    settings = lp.presets.balanced(calibration="text.txt", samples=16, seq_len=24)
    points = lp.curve(model, settings, ratios=(0.1,), measured_tokens=480)
    ((plan, point),) = points
    assert plan.to_json() == Path("sizes/plan-0.1.json").read_text()
    assert point.kl == pytest.approx(made[0]["points"][0]["measured"]["divergence"]["kl"])
    after = model.network.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_a_repair_does_not_see_what_is_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def repair_(network: Any, dense: Any, text: torch.Tensor, *_: Any, **__: Any) -> None:
        seen.append(text)
        raise RuntimeError("enough")

    monkeypatch.setattr(recovery, "repair_", repair_)
    how = lp.presets.fast(calibration="text.txt", samples=16, seq_len=24, repair_minutes=1)
    asked = {"model": "dense", "out": Path("x"), "measured_tokens": 480}
    run = CurveRun(CurveSettings(**how.written(), **asked))
    with pytest.raises(RuntimeError, match="enough"):
        run.point(0.1)
    assert run.text is not None
    assert len(run.text.unseen) == 20
    trained = {tuple(row) for row in seen[0].tolist()}
    assert len(trained) > 16
    assert not trained & {tuple(row) for row in run.text.unseen.tolist()}


def test_tokens_in_front_of_a_window_are_not_predicted() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> <s> $A", special_tokens=[("<unk>", 0), ("<s>", 1)]
    )
    rows = torch.tensor([[0, 1, *range(10, 20)], [0, 1, *range(20, 30)]])
    run = SimpleNamespace(
        settings=SimpleNamespace(text=None),
        text=SimpleNamespace(unseen=rows, settings={"name": "text"}),
        loaded=SimpleNamespace(tokenizer=tokenizer),
        dense=None,
    )
    assert CurveRun._measure(run, model).tokens == 20


def points(*damage: tuple[float, float, float]) -> list[CurvePoint]:
    """Points of (share removed, KL, ratio of perplexities)."""
    return [
        CurvePoint(
            asked=removed,
            removed=removed,
            parameters=1,
            plan="",
            measured=PerplexityResult(
                2.0 * ratio,
                1.0,
                9,
                "text",
                None,
                4,
                3,
                "standard",
                None,
                Divergence("dense", kl, None, 0.1, None, 2.0),
            ),
            perplexity_ratio=ratio,
            split=None,
            refitted=0,
            seconds={},
        )
        for removed, kl, ratio in damage
    ]


CURVE = points((0.1, 0.1, 1.1), (0.2, 0.3, 1.21), (0.3, 0.3, 1.2), (0.4, 0.5, 2.0))


@pytest.mark.parametrize(
    ("asked", "removed"),
    [
        ("0.05", 0.05),  # between the dense model and the first point
        ("0.2", 0.15),
        ("0.3", 0.3),  # the largest of equally good ones
        ("0.4", 0.35),
        (f"{math.sqrt(1.1)}x", 0.05),  # straight in the logarithm
        (f"{1.1 * math.sqrt(1.1)}x", 0.15),
        ("1.205x", 0.195),  # the larger share that measured better counts for nothing
    ],
)
def test_the_answer_is_interpolated(asked: str, removed: float) -> None:
    assert smallest_for(asked, CURVE).removed == pytest.approx(removed, abs=1.1e-3)


def test_there_is_no_answer_outside_of_the_points() -> None:
    beyond = smallest_for("0.6", CURVE)
    assert beyond.removed is None
    assert str(beyond.outside).startswith(
        "40.0% removed, the smallest size that was measured, does less damage (0.5)"
    )
    assert smallest_for("0.0001", CURVE) == Smallest(
        "kl", 0.0001, outside="less than 0.1% of the parameters may go"
    )
