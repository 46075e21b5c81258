"""``compress --vocab-text``: tokens go first, and pruning takes what is missing then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import llm_pruner.commands.compress as stages
from command import done, figures, measured_here, refused, run, write_text
from helpers import tiny_model
from llm_pruner.data.sequences import bare_ids
from llm_pruner.models.load import load_model
from llm_pruner.planning import Target
from llm_pruner.report.compare import compare_folders
from llm_pruner.report.data import read_report
from trained_tokenizers import byte_level

pytestmark = pytest.mark.slow

OPTIONS = ("--preset", "tiny.yaml", "--perplexity", "t.txt", "--vocab-text", "t.txt")
COMPRESS = ("compress", "dense", "--out", "small", *OPTIONS, "--ratio", 0.4, "--no-recover")
SIZE = ("--vocab-size", 400)
RECIPE = """
structures: [ffn]
protect_first: 0
protect_last: 0
criterion: l2
samples: 8
seq_len: 24
"""


def prepare(folder: Path) -> None:
    """Write a dense model of 704 tokens, a preset and a text."""
    tiny_model("llama", vocab_size=704).save_pretrained(folder / "dense")
    byte_level().save_pretrained(folder / "dense")
    (folder / "tiny.yaml").write_text(RECIPE)
    write_text(folder / "t.txt", 4000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run needs, and what one that nothing disturbs leaves there."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch, measured_here():
        patch.chdir(folder)
        result = done(*COMPRESS, *SIZE, "--json", "r.json")
    assert result.err == ""
    (folder / "shown.txt").write_text(result.out)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with all that a run needs; models are not measured."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "measure_apart", figures)
    return tmp_path


def test_the_result_is_that_of_both_commands(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads((whole / "r.json").read_text())
    asked = Target(ratio=0.4).kept(found["parameters"]["before"])
    done("vocab", whole / "dense", "--text", whole / "t.txt", "--size", 400, "--out", "fewer/dense")
    prune = ("--params", asked, "--preset", whole / "tiny.yaml", "--repair-minutes", 0)
    done("prune", "fewer/dense", *prune, "--out", "by-hand")
    for name in ("plan.json", "model.safetensors", "config.json", "tokenizer.json"):
        one, other = whole / "small" / name, tmp_path / "by-hand" / name
        assert one.read_bytes() == other.read_bytes(), name
    assert found["parameters"]["before"] == load_model(str(whole / "dense")).model.num_parameters()
    assert found["parameters"]["after"] == pytest.approx(asked, rel=0.005)
    assert found["ratio"] == pytest.approx(0.4, abs=0.003)
    kept = json.loads((whole / "small/vocabulary.json").read_text())["kept"]
    assert kept == json.loads(Path("fewer/dense/vocabulary.json").read_text())["kept"]
    assert sorted(path.name for path in whole.iterdir() if "small" in path.name) == ["small"]


def test_what_is_shown_can_be_compared(whole: Path) -> None:
    found = json.loads((whole / "r.json").read_text())
    assert found["tokens"] == {"before": 704, "after": 400}
    bits = {name: of["perplexity"][0]["bits_per_byte"] for name, of in found["measured"].items()}
    assert list(bits) == ["dense", "pruned"]
    text = (whole / "t.txt").read_text()
    of_result = bare_ids(AutoTokenizer.from_pretrained(whole / "small"), text)
    nll = found["measured"]["pruned"]["perplexity"][0]["nll"]
    assert bits["pruned"] == pytest.approx(nll / torch.tensor(2.0).log() * len(of_result) / 4000)
    shown = (whole / "shown.txt").read_text()
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "tokens 704 400" in lines
    assert f"bits per byte, t.txt {bits['dense']:.4f} {bits['pruned']:.4f}" in lines
    assert "perplexity" not in shown
    report = read_report(whole / "small/report.json")
    assert (report.source.name, report.tokens) == ("dense", (704, 400))
    assert report.settings["Run"]["vocab"] == {"text": ["t.txt"], "size": 400}
    assert list(report.sizes) == ["dense", "trimmed", "pruned"]
    totals = [size.total for size in report.sizes.values()]
    assert [totals[0], totals[-1]] == [*found["parameters"].values()]
    assert totals[0] > totals[1] > totals[2]
    page = (whole / "small/report.html").read_text()
    assert "First, all but 400 of its 704 tokens were taken out." in page
    assert "<td>tokens</td><td>704</td><td>400</td><td>400</td>" in page
    assert "bits per byte" in page
    assert "<h2>Perplexity</h2>" not in page
    (column,) = [c for c in compare_folders([str(whole / "small")]).columns if "bits" in c.name]
    assert column.cells == (f"{bits['dense']:.4f}", f"{bits['pruned']:.4f}")


def test_all_stages_start_from_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recover(settings: Any, **how: Any) -> Any:
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "recover_checkpoint", recover)
    said = lambda one, *_, **__: (asked.append(one), figures())[1]  # noqa: E731
    monkeypatch.setattr(stages, "measure_apart", said)
    recipe = RECIPE.replace("l2", "fisher")
    (work / "tiny.yaml").write_text(recipe)
    more = ("--time-budget", "200s", "--control", "--ratio", 0.4, *SIZE)
    monkeypatch.setattr(stages, "MOST_SAMPLES", 64)
    result = run("compress", "dense", "--out", "small", *OPTIONS, *more)
    assert result.code == 130, result.err
    folder = str((work / "small.compressing/vocab/dense").resolve())
    assert [Path(one.model).name for one in asked] == ["dense", "pruned", "pruned"]
    assert asked[0].model == "dense"
    assert (asked[2].teacher, asked[2].control) == (folder, folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--ratio", 0.01, *SIZE],
            "without the tokens, 94,032 parameters are left, and 121,984 are",
        ),
        (["--ratio", 0.01], "without the tokens, 84,624 parameters are left, and 121,984 are"),
        (["--vocab-size", 12, "--ratio", 0.6], "12 tokens cannot be: "),
        (["--vocab-text", "nofile.txt"], "nofile.txt does not exist or is no file; give one .txt"),
    ],
)
def test_what_is_refused(work: Path, options: list[object], said: str) -> None:
    found = refused("compress", "dense", "--out", "small", *OPTIONS, *options)
    assert found.startswith(said)
