"""Every command on every kind of model that users give it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llm_pruner.evaluation.health as health_module
from command import done, write_text
from helpers import tiny_model
from llm_pruner.models.load import load_model
from task_data import write_tasks
from trained_tokenizers import byte_level

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

FAMILIES = ("qwen3", "gpt2", "mixtral", "gemma3_text", "mamba")
MADE = ("unequal", "equal", "fewer layers", "fewer tokens")
KINDS = ("dense.gguf", *FAMILIES, *MADE, "in halves", "link")

TEXT = ("--calibration", "text.txt", "--samples", 12, "--seq-len", 32)
CUT = ("--ratio", 0.1, "--criterion", "l2", "--protect-first", 0, "--protect-last", 0)
HEALTH = ("--health", "--health-prompts", "prompts.txt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind, and texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("kinds"))
        tokenizer = byte_level()
        for family in FAMILIES:
            tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(family)
            tokenizer.save_pretrained(family)
        halves = tiny_model("llama", vocab_size=len(tokenizer)).to(torch.bfloat16)
        halves.save_pretrained("in halves", max_shard_size="60KB")
        tokenizer.save_pretrained("in halves")
        Path("link").symlink_to("qwen3", target_is_directory=True)
        write_text(Path("text.txt"), 40_000)
        write_tasks(Path("tasks"))
        Path("prompts.txt").write_text("Tell me of the bridge.\nWhy do people sing?\n")
        done("export", "qwen3", "--type", "f16", "--out", "dense.gguf")
        done("prune", "qwen3", "--out", "unequal", *CUT)
        done("prune", "qwen3", "--out", "equal", *CUT, "--uniform")
        done(
            "prune",
            "qwen3",
            "--out",
            "fewer layers",
            "--structures",
            "layers",
            "--ratio",
            0.151,
            *CUT[2:],
        )
        done("vocab", "qwen3", "--out", "fewer tokens", "--text", "text.txt", "--size", 500)
        return Path.cwd()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(place)
    monkeypatch.setattr(health_module, "ANSWER_TOKENS", 8)
    return str(request.param)


def test_it_is_described_and_timed(kind: str) -> None:
    found = json.loads(done("inspect", kind, "--json", "-").out)
    assert found["parameters"] == load_model(kind).model.num_parameters()
    quick = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1, "--batch-size", 1)
    done("bench", kind, "--against", "qwen3", *quick)


def test_it_is_as_it_is_beside_itself(kind: str) -> None:
    text = ("--perplexity", "text.txt", "--seq-len", 32, "--max-tokens", 256)
    tasks = ("--tasks", "boolq", "--tasks-data", "tasks", "--limit", 2)
    asked = (*text, *tasks, *HEALTH, "--speed")
    alone = json.loads(done("evaluate", kind, *asked, "--json", "-").out)
    beside = json.loads(
        done("evaluate", kind, *asked, "--against", kind, "--no-cache", "--json", "-").out
    )
    for one in (beside, beside["dense"]):
        assert one["health"] == alone["health"]
        assert one["zero_shot"]["tasks"] == alone["zero_shot"]["tasks"]
    ((own,), (again,)) = (one["perplexity"] for one in (alone, beside))
    assert own["perplexity"] == again["perplexity"]
    assert again["divergence"]["kl"] == pytest.approx(0, abs=1e-6)


def test_it_is_pruned_and_trained(kind: str, tmp_path: Path) -> None:
    small, better = tmp_path / "small", tmp_path / "better"
    found = json.loads(
        done("prune", kind, *CUT[:2], *CUT[4:], *TEXT, "--out", small, "--json", "-").out
    )
    assert found["parameters_after"] < found["parameters_before"]
    done(
        "recover",
        small,
        "--data",
        "text.txt",
        "--trainer",
        "max_steps=1",
        "--seq-len",
        32,
        "--out",
        better,
    )
    assert load_model(str(better)).model.num_parameters() == found["parameters_after"]


def test_its_sizes_and_its_tokens(kind: str, tmp_path: Path) -> None:
    sizes = ("--ratios", 0.1, "--measured-tokens", 512, "--preset", "fast", *CUT[2:])
    done("curve", kind, *sizes, *TEXT, "--out", tmp_path / "curve")
    (point,) = json.loads((tmp_path / "curve" / "curve.json").read_text())["points"]
    assert point["measured"]["divergence"]["kl"] > 0
    few = ("--text", "text.txt", "--size", 400)
    done("vocab", kind, *few, "--out", tmp_path / "few")
    assert load_model(str(tmp_path / "few")).model.get_input_embeddings().num_embeddings == 400
