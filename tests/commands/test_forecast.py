"""``prune --estimate``: what is said before any work, beside what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import contents, done, run, save_tiny, write_text
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands import forecast

pytestmark = pytest.mark.slow

TEXT = ("--calibration", "text.txt", "--samples", 24, "--seq-len", 32, "--ratio", 0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    save_tiny(folder / "dense", num_hidden_layers=3)
    tiny_model("mixtral").save_pretrained(folder / "mixtral")
    tiny_tokenizer().save_pretrained(folder / "mixtral")
    write_text(folder / "text.txt", 4000)
    return folder


def given(made: Path, *words: object) -> list[object]:
    return [made / "text.txt" if word == "text.txt" else word for word in words]


def said(made: Path, *more: object, model: str = "dense", code: int = 0) -> Any:
    """Return what is said of a run, or the message; nothing may be written."""
    words = ("prune", made / model, "--out", made / "small", "--estimate", "--json", "-")
    before = contents(made)
    result = run(*words, *given(made, *more))
    assert result.code == code, result.err
    assert contents(made) == before
    return json.loads(result.out) if code == 0 else result.err


def test_says_the_stages_of_the_run(made: Path) -> None:
    words = ("--preset", "balanced", *TEXT)
    expected = said(made, *words)
    result = done(
        "prune", made / "dense", "--out", made / "pruned", *given(made, "--json", "-", *words)
    )
    record = json.loads(result.out)
    assert [*expected["stages"]] == ["start", *(one for one in record["seconds"] if one != "plan")]
    assert expected["seconds"] == sum(one["seconds"] for one in expected["stages"].values())
    assert expected["peak_bytes"] == max(one["bytes"] for one in expected["stages"].values())
    weights = sum(file.stat().st_size for file in (made / "pruned").glob("*.safetensors"))
    assert expected["saved_bytes"] == pytest.approx(weights, rel=0.1)
    assert not expected["streamed"]


def test_text_of_the_model_repair_and_rounds_are_counted(made: Path) -> None:
    words = ("--ratio", 0.2, "--samples", 8, "--seq-len", 16, "--preset", "best")
    stages = said(made, *words, "--repair-minutes", 2)["stages"]
    assert stages["repair"]["seconds"] == 120
    assert stages["calibration text"]["seconds"] > 0
    assert "layer trials" in stages
    assert said(made, *words, "--dry-run")["saved_bytes"] == 0


def test_says_that_weights_are_read_block_by_block(made: Path) -> None:
    words = ("prune", made / "dense", "--out", made / "small", "--preset", "fast", *TEXT)
    shown = done(*given(made, *words), "--memory", "10KB", "--estimate").out
    assert "weights are read block by block: the weights take" in shown
    assert "nothing was done" in shown


def test_the_work_of_a_replay(made: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    dry = ("--preset", "fast", *TEXT, "--dry-run")
    done("prune", made / "dense", "--out", plan, *given(made, *dry))
    assert "calibration text" not in said(made, "--plan", plan)["stages"]
    refit = ("--compensation", "least-squares", *TEXT[:-2])
    assert "calibration text" in said(made, "--plan", plan, *refit)["stages"]


def test_refuses_what_the_run_refuses(made: Path) -> None:
    assert "ratio=0.95 cannot be reached" in said(made, *TEXT[:-1], 0.95, code=2)
    assert "does not exist" in said(made, *TEXT, model="absent", code=2)


@pytest.mark.parametrize(
    ("model", "structures"), [("dense", "heads,ffn,layers"), ("mixtral", "heads,experts")]
)
def test_knows_all_structures_and_no_architecture(made: Path, model: str, structures: str) -> None:
    words = ("--preset", "fast", "--split", "equal", "--structures", structures, *TEXT[:-1], 0.1)
    assert said(made, *words, model=model)["stages"]["verify"]["seconds"] > 0


def test_time_is_that_of_the_products(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast._Forecaster, "_products", lambda _, tokens, __=None: tokens / 100)
    stages = said(made, "--preset", "fast", "--split", "equal", *TEXT)["stages"]
    passed = forecast.ESTIMATE * forecast.OVERHEAD * 24 * 32 / 100
    assert stages["estimate"]["seconds"] == pytest.approx(passed)
