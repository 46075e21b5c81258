"""A model that is judged on its calibration corpus is pointed out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import done, save_tiny, write_text
from llm_pruner.evaluation.result_cache import shared_corpora


@pytest.mark.parametrize(
    ("used", "source", "same"),
    [
        ("wikitext2_raw_train_part.txt", "/data/wikitext2_raw_test.txt", True),
        ("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", True),
        ("c4_sample.jsonl", "c4", True),
        ("mine.txt", "/other/mine.txt", True),
        ("c4_sample.jsonl", "wikitext2", False),
        ("self", "ptb", False),
        ("books.jsonl,c4", "c4", True),
        ("c4:0.5,mine.txt:0.5", "/other/mine.txt", True),
    ],
)
def test_corpora_by_name(tmp_path: Path, used: str, source: str, same: bool) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"settings": {"calibration": used}}))
    warnings = shared_corpora(str(tmp_path), [source])
    assert bool(warnings) == same
    part = used.split(",")[-1].partition(":")[0]
    assert all(f"on {part} and" in warning and source in warning for warning in warnings)


@pytest.mark.parametrize("plan", ["", "[]", '{"settings": {}}'])
def test_folders_that_say_nothing(tmp_path: Path, plan: str) -> None:
    assert shared_corpora(str(tmp_path / "absent"), ["c4"]) == []
    (tmp_path / "plan.json").write_text(plan)
    assert shared_corpora(str(tmp_path), ["c4"]) == []


@pytest.mark.parametrize("gained", [True, False])
def test_what_it_was_trained_on(tmp_path: Path, gained: bool) -> None:
    data = {"gained": gained, "sources": [{"name": "self"}, {"name": "mine.jsonl"}]}
    (tmp_path / "recovery.json").write_text(json.dumps(data))
    warnings = shared_corpora(str(tmp_path), ["/data/mine.jsonl", "other.jsonl"])
    assert len(warnings) == gained  # without a gain it is the model as it came
    assert all("was trained on mine.jsonl and" in warning for warning in warnings)


@pytest.mark.slow
def test_evaluate_says_so(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", num_hidden_layers=3)
    text = write_text(tmp_path / "text.txt", 4000)
    other = write_text(tmp_path / "other.txt", 4000)
    out = tmp_path / "out"
    done(
        *("prune", tiny, "--out", out, "--ratio", 0.2, "--calibration", text),
        *("--samples", 4, "--seq-len", 16),
    )
    warned = done("evaluate", out, "--perplexity", text, "--seq-len", 64)
    assert "was calibrated on text.txt and is measured on" in warned.err
    assert "calibrated on" not in done("evaluate", out, "--perplexity", other, "--seq-len", 64).err
