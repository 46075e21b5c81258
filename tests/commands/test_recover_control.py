"""``recover --control``: the dense model with the same training, beside the pruned one."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import done, run, save_tiny
from llm_pruner.commands import recover as recovering
from llm_pruner.report.data import read_report
from llm_pruner.report.text import measured

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

QUICK = (
    "--seq-len",
    64,
    "--batch-size",
    8,
    "--evaluations",
    2,
    "--method",
    "full",
    "--trainer",
    "bf16=false",
)
TEXTS = ("--data", "rows.jsonl", "--perplexity", "other.txt", "--perplexity-seq-len", 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a pruned one, and text."""
    folder = tmp_path_factory.mktemp("control")
    save_tiny(folder / "dense", num_hidden_layers=2, initializer_range=0.2)
    options = ("--structures", "ffn", "--criterion", "l2", "--no-verify")
    done("prune", folder / "dense", "--out", folder / "small", "--ratio", 0.1, *options)
    letters = random.Random(0)
    rows = ["".join(letters.choice("abcd ef") for _ in range(60)) for _ in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "other.txt").write_text("".join(letters.choice("abcd ef") for _ in range(500)))
    return folder


def recover(out: str, *options: object) -> dict[str, Any]:
    told = done("recover", "small", "--out", out, *TEXTS, *QUICK, *options, "--json", f"{out}.json")
    assert max(map(len, told.out.splitlines())) <= 80
    return {**json.loads(Path(f"{out}.json").read_text()), "shown": told.out, "err": told.err}


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


CONTROLLED = ("--trainer", "max_steps=4", "--trainer", "save_steps=1", "--control", "dense")


@pytest.fixture(scope="module")
def better(place: Path) -> dict[str, Any]:
    """What is told of a run with a control, which leaves the folder ``better``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return recover("better", *CONTROLLED)


def test_four_models_on_text_that_none_was_trained_on(better: dict[str, Any]) -> None:
    found = better
    control = found["control"]
    assert (control["model"], control["steps"]) == ("dense", found["steps"])
    assert control["loss"]["after"] < control["loss"]["before"]
    corpus, held_out = control["texts"]
    assert [one["dense"]["corpus"] for one in (corpus, held_out)] == [
        "other.txt",
        "held-out samples",
    ]
    for text in (corpus, held_out):
        assert text["dense"]["divergence"] is None
        for name in ("dense_trained", "pruned", "pruned_trained"):
            assert text[name]["divergence"]["kl"] > 0
            assert text[name]["divergence"]["perplexity"] == pytest.approx(
                text["dense"]["perplexity"]
            )
        assert text["dense_trained"]["perplexity"] < text["dense"]["perplexity"]
        assert text["damage"] == pytest.approx(
            text["pruned_trained"]["perplexity"] / text["dense_trained"]["perplexity"]
        )
    # The pruned model's figures are those that stand without a control, and so is the model.
    assert corpus["pruned"] == found["perplexity"][0]["before"]
    assert corpus["pruned_trained"] == found["perplexity"][0]["after"]
    alone = recover("alone", "--trainer", "max_steps=4")
    assert alone["control"] is None
    assert alone["loss"] == found["loss"]
    assert all(torch.equal(one, weights("alone")[name]) for name, one in weights("better").items())
    # The dense model learns as it does alone.
    done(
        "recover",
        "dense",
        "--out",
        "taught",
        *TEXTS,
        *QUICK,
        "--trainer",
        "max_steps=4",
        "--json",
        "t.json",
    )
    taught = json.loads(Path("t.json").read_text())
    assert taught["loss"] == control["loss"]
    assert taught["perplexity"][0]["after"]["perplexity"] == corpus["dense_trained"]["perplexity"]
    # What is shown.
    rows = [" ".join(line.split()) for line in found["shown"].splitlines()]
    for name, of in (("dense", "dense"), ("pruned + training", "pruned_trained")):
        shown = measured(corpus[of]["perplexity"], corpus[of]["stderr"])
        assert any(row.startswith(f"{name} {shown} ") for row in rows)
    assert (
        f"pruned + training is {corpus['damage']:.3f} times dense + training in perplexity" in rows
    )
    assert found["err"].count("control: step") == 2
    report = read_report(Path("better/report.json"))
    assert report.recovery is not None
    assert [text.damage for text in report.recovery.control] == [
        one["damage"] for one in (corpus, held_out)
    ]
    page = Path("better/report.html").read_text()
    assert "Beside the dense model with the same training: other.txt" in page
    assert f"{corpus['damage']:.3f} times the perplexity of dense + training" in page


def test_a_clock_gives_both_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    train = recovering.recover_
    asked = []

    def timed(*args: Any, **named: Any) -> Any:
        asked.append(args[3])
        network, outcome = train(*args, **named)
        return network, outcome

    monkeypatch.setattr(recovering, "recover_", timed)
    found = recover("timed", "--max-minutes", 0.02, "--epochs", 50, "--control", "dense")
    assert found["control"]["steps"] == found["steps"]
    assert [one.max_minutes is None for one in asked] == [False, True]


def test_a_control_ends_where_the_pruned_model_did(monkeypatch: pytest.MonkeyPatch) -> None:
    train = recovering.recover_
    outcomes = []

    def stopped(*args: Any, **named: Any) -> Any:
        network, outcome = train(*args, **named)
        outcomes.append(outcome)
        return network, outcome if len(outcomes) > 1 else replace(outcome, steps=2)

    monkeypatch.setattr(recovering, "recover_", stopped)
    found = recover("stopped", "--max-minutes", 2, "--trainer", "max_steps=4", *CONTROLLED)
    assert found["control"]["steps"] == 2
    assert [outcome.run.total for outcome in outcomes] == [4, 4]


def test_an_interrupted_control_goes_on(better: dict[str, Any]) -> None:
    command = ("recover", "small", "--out", "late", *TEXTS, *QUICK, *CONTROLLED)
    train = recovering.recover_

    def interrupted(*args: Any, say: Any, **named: Any) -> Any:
        def stop(progress: Any) -> None:
            say(progress)
            if named["work"].name.startswith("control-") and progress.step == 3:
                raise KeyboardInterrupt

        return train(*args, say=stop, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovering, "recover_", interrupted)
        result = run(*command)
    assert result.code == 130
    assert result.err.endswith("interrupted; go on with --resume\n")
    assert not Path("late").exists()
    late = recover("late", *CONTROLLED, "--resume")
    assert "control: step 4 of 4" in late["err"]
    assert "step 2 of 4" not in late["err"]  # of neither
    assert late["control"] == better["control"]
    assert all(torch.equal(one, weights("better")[name]) for name, one in weights("late").items())
