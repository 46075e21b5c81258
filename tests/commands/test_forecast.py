"""``prune --estimate``: what is said before any work, beside what the run then does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import architectures
import tiny_configs

from command import contents, done, run, save_tiny, write_text
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands import forecast
from llm_pruner.settings import common

pytestmark = pytest.mark.slow

TEXT = ("--calibration", "text.txt", "--samples", 24, "--seq-len", 32, "--ratio", 0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    save_tiny(folder / "dense", num_hidden_layers=3)
    write_text(folder / "text.txt", 4000)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "streamed"), [("llama", True), ("falcon_h1", False)])
def test_what_cannot_be_read_by_block_is_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, streamed: bool
) -> None:
    """A run that reads weights by block by choice starts over with all of them in memory."""
    write_text(tmp_path / "text.txt", 4000)
    sizes = tiny_configs.OVERRIDES.get(model_type, {}) | {"num_hidden_layers": 3}
    monkeypatch.setitem(tiny_configs.OVERRIDES, model_type, sizes)
    model: Any = architectures.tiny_model(model_type)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(common, "SHARE_RESIDENT", 10**9)
    whole = ("--preset", "paper", "--protect-first", 0, "--protect-last", 0)
    assert said(tmp_path, *TEXT, *whole)["streamed"] == streamed


def said(made: Path, *more: object, model: str = "dense", code: int = 0) -> Any:
    """Return what is said of a run, or the message; nothing may be written."""
    given = [made / "text.txt" if word == "text.txt" else word for word in more]
    words = ("prune", made / model, "--out", made / "small", "--estimate", "--json", "-", *given)
    before = contents(made)
    result = run(*words)
    assert result.code == code, result.err
    assert contents(made) == before
    return json.loads(result.out) if code == 0 else result.err


def test_says_the_stages_of_the_run(made: Path) -> None:
    words = ("--preset", "balanced", *TEXT)
    expected = said(made, *words)
    given = [made / "text.txt" if word == "text.txt" else word for word in words]
    result = done("prune", made / "dense", "--out", made / "pruned", "--json", "-", *given)
    record = json.loads(result.out)
    assert [*expected["stages"]] == ["start", *(one for one in record["seconds"] if one != "plan")]
    assert expected["seconds"] == sum(one["seconds"] for one in expected["stages"].values())
    assert expected["peak_bytes"] == max(one["bytes"] for one in expected["stages"].values())
    weights = sum(file.stat().st_size for file in (made / "pruned").glob("*.safetensors"))
    assert expected["saved_bytes"] == pytest.approx(weights, rel=0.1)
    assert not expected["streamed"]


def test_text_of_the_model_repair_and_rounds_are_counted(made: Path) -> None:
    words = ("--ratio", 0.2, "--samples", 8, "--seq-len", 16, "--preset", "best")
    once = said(made, *words, "--repair-minutes", 2)["stages"]
    assert once["repair"]["seconds"] == 120
    assert once["calibration text"]["seconds"] > 0
    assert said(made, *words, "--dry-run")["saved_bytes"] == 0


def test_the_steps_of_writing_are_those_of_each_source() -> None:
    def steps(calibration: str) -> int:
        asked: Any = SimpleNamespace(calibration=calibration)
        run: Any = SimpleNamespace(settings=asked, samples=128, length=128, texts=64)
        return forecast._Forecaster._steps_of_text(run)

    assert steps("self") == 2 * 127
    assert steps("self,chat") == 127 + 511
    assert steps("c4:0.5,chat:0.5") == 511


def test_stand_ins_read_their_own_weights() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.forward = lambda hidden: hidden @ model.model.embed_tokens.weight.T
    run: Any = SimpleNamespace(
        model=model, path="model.layers", _count=lambda: 3, texts=2, length=8
    )
    run._writes_bfloat16 = lambda: True
    stand_in = forecast._Forecaster._stand_in(run, 1, None, "cpu")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        assert stand_in(torch.arange(8)[None]).logits.any()
    forecast._Forecaster._token(run, stand_in, 16)


def test_says_that_weights_are_read_block_by_block(made: Path) -> None:
    words = ("--preset", "fast", "--calibration", made / "text.txt", "--samples", 8)
    words += ("--seq-len", 16, "--ratio", 0.2, "--memory", "10KB", "--estimate")
    shown = done("prune", made / "dense", "--out", made / "small", *words).out
    assert "weights are read block by block: the weights take" in shown
    assert "nothing was done" in shown
    assert not (made / "small").exists()


def test_so_are_those_of_a_model_that_is_not_here_yet(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stored_size", "stored_at"):
        monkeypatch.setattr(forecast, name, lambda *_: None)
    found = said(made, "--preset", "fast", *TEXT, "--memory", "10KB")
    assert found["streamed"]
    assert found["rates"]["read"] == found["rates"]["written"]
    assert not said(made, "--preset", "fast", *TEXT)["streamed"]


def test_a_replay_reads_no_text_that_its_run_does_not(made: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    given = [made / "text.txt" if word == "text.txt" else word for word in TEXT]
    done("prune", made / "dense", "--out", plan, "--preset", "fast", *given, "--dry-run")
    assert "calibration text" not in said(made, "--plan", plan)["stages"]
    refit = ("--compensation", "least-squares", *TEXT[:-2])
    assert "calibration text" in said(made, "--plan", plan, *refit)["stages"]


def test_refuses_what_the_run_refuses(made: Path) -> None:
    assert "ratio=0.95 cannot be reached" in said(made, *TEXT[:-1], 0.95, code=2)
    assert "use one of --ratio" in said(made, *TEXT[:-2], code=2)
    assert "does not exist" in said(made, *TEXT, model="absent", code=2)


@pytest.mark.parametrize("structures", ["heads,ffn,layers", "head_dim", "layers"])
def test_knows_all_structures(made: Path, structures: str) -> None:
    words = ("--preset", "fast", "--split", "equal", "--structures", structures, *TEXT[:-1], 0.1)
    assert said(made, *words)["stages"]["verify"]["seconds"] > 0


def test_knows_no_architecture(made: Path) -> None:
    tiny_model("mixtral").save_pretrained(made / "mixtral")
    tiny_tokenizer().save_pretrained(made / "mixtral")
    expected = said(made, "--preset", "fast", "--split", "equal", *TEXT, model="mixtral")
    assert expected["stages"]["verify"]["seconds"] > 0


def test_time_is_counted_up_over_blocks(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter(range(11, 1000))

    def take(job: Any) -> Any:
        return forecast.Taken(float(next(taken)), 1000), job()

    monkeypatch.setattr(forecast, "_taken", take)
    expected = said(made, "--preset", "fast", "--split", "equal", *TEXT)
    # Four jobs on one block, on all three with a small vocabulary, on one with the own one.
    found = expected["stages"]["discover"]
    assert found["seconds"] == 19 + (15 - 11) / 2 * 2
    assert (
        found["bytes"] == expected["stages"]["start"]["bytes"] + 1000 + 4 * expected["parameters"]
    )
    # Of 24 samples, all at once.
    assert expected["stages"]["estimate"]["seconds"] == 20 + (16 - 12) / 2 * 2


def test_stand_ins_take_no_more_than_is_free(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--preset", "fast", "--split", "equal", *TEXT)
    monkeypatch.setattr(forecast, "free_bytes", lambda _: 10_000)
    assert "GB with a cut copy, and 1e-05 GB of memory are free" in said(made, *words, code=2)
    depths, jobs_on = [], forecast._Forecaster._jobs_on

    def noted(self: Any, blocks: int, vocabulary: int | None) -> Any:
        depths.append(blocks)
        return jobs_on(self, blocks, vocabulary)

    monkeypatch.setattr(forecast._Forecaster, "_jobs_on", noted)
    monkeypatch.setattr(forecast._Forecaster, "_fitting", lambda _: 1)
    stages = said(made, *words)["stages"]
    assert depths == [1, 1]
    assert stages["verify"]["seconds"] > 0


def test_files_that_find_no_room_are_read_from_the_disk(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, ...]] = []
    monkeypatch.setattr(forecast.os, "posix_fadvise", lambda *how: given.append(how), raising=False)
    monkeypatch.setattr(forecast._Forecaster, "_fitting", lambda _: 1)
    said(made, "--preset", "fast", "--split", "equal", *TEXT)
    assert not given
    monkeypatch.setattr(forecast, "free_bytes", lambda _: 1000)
    said(made, "--preset", "fast", "--split", "equal", *TEXT)
    assert len(given) == 1
