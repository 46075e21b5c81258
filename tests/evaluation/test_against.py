"""The divergence from the dense model: against sums written out, and what is refused."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from command import done, run, save_tiny, write_text
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.data.text import EvaluationText
from llm_pruner.errors import UserError
from llm_pruner.evaluation.divergence import Divergence
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.models.load import LoadedModel
from llm_pruner.report.data import read_report
from llm_pruner.settings.evaluate import PerplexitySettings

LENGTH = 24
TEXT = EvaluationText("text", None, "The quick brown fox jumps over the lazy dog, twice. " * 3)


def found(model: torch.nn.Module, dense: torch.nn.Module, max_tokens: int = 120) -> Divergence:
    tokenizer = tiny_tokenizer()
    asked = PerplexitySettings(seq_len=LENGTH, max_tokens=max_tokens, batch_size=2)
    other = LoadedModel(dense, tokenizer, "dense", None, "")
    result = perplexity(model, tokenizer, TEXT, asked, other)
    assert result.divergence is not None
    assert result == perplexity(model, tokenizer, TEXT, asked, other)
    assert result.perplexity == perplexity(model, tokenizer, TEXT, asked).perplexity
    return result.divergence


def test_a_model_is_no_distance_from_itself() -> None:
    model = tiny_model()
    far = found(model, model)
    assert (far.kl, far.kl_stderr, far.changed, far.changed_stderr) == (0, 0, 0, 0)


@torch.no_grad()
def test_it_is_the_mean_over_predicted_tokens_with_the_spread_of_windows() -> None:
    dense, model = tiny_model(), tiny_model(seed=1)
    far = found(model, dense)
    rows = torch.tensor(tiny_tokenizer()(TEXT.text)["input_ids"][:120]).view(5, LENGTH)
    p, q = (one(rows).logits[:, :-1].double().log_softmax(-1) for one in (dense, model))
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    changed = (p.argmax(-1) != q.argmax(-1)).double().mean(1)
    nll = -p.gather(-1, rows[:, 1:, None]).mean()
    assert far.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert far.kl_stderr == pytest.approx(float(kl.std()) / math.sqrt(5), rel=1e-4)
    assert far.changed == pytest.approx(float(changed.mean()))
    assert far.changed_stderr == pytest.approx(float(changed.std()) / math.sqrt(5))
    assert far.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert far.kl > 0


def test_one_window_has_no_spread() -> None:
    far = found(tiny_model(seed=1), tiny_model(), LENGTH)
    assert far.kl_stderr is None
    assert far.changed_stderr is None


def test_models_with_other_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="dense predicts 259 tokens and the model 300"):
        found(tiny_model(vocab_size=300), tiny_model())


@pytest.mark.parametrize(("one", "other", "refused"), [("e", "a", True), ("X", "Z", False)])
def test_other_tokens_of_the_same_number_are_refused(one: str, other: str, refused: bool) -> None:
    """Not those that the text does without: names of such are given anew in fine-tuning."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    names = state["model"]["vocab"]
    names[one], names[other] = names[other], names[one]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    dense = LoadedModel(tiny_model(), tokenizer, "dense", None, "")
    said = pytest.raises(UserError, match="dense has other tokens than the model, so they cannot")
    with said if refused else nullcontext():
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, PerplexitySettings(seq_len=LENGTH), dense)


def test_what_is_not_finite_is_said() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.inf)
    with pytest.raises(UserError, match="divergence from dense is not finite"):
        found(tiny_model(), broken)


def test_the_command_and_the_report_say_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = save_tiny(tmp_path / "dense", num_hidden_layers=3)
    text = write_text(tmp_path / "text.txt")
    small, file = tmp_path / "small", tmp_path / "found.json"
    cut = ("--ratio", 0.1, "--criterion", "l2", "--compensation", "none")
    done("prune", dense, "--out", small, *cut)
    asked = ("--perplexity", text, "--seq-len", 64, "--against", dense)
    said = done("evaluate", small, *asked, "--json", file, "--report", small)
    (result,) = json.loads(file.read_text())["perplexity"]
    far = result["divergence"]
    assert far["against"] == "dense"
    assert far["kl"] > 0
    assert "Against dense" in said.out
    assert f"{far['kl']:.4f}" in said.out
    page = (small / "report.html").read_text()
    label = "KL against dense, text.txt, nats (standard protocol, windows of 64,"
    assert label in page
    # The dense model's own number stands beside it, as if it had been measured alone.
    evaluations = read_report(small / "report.json").evaluations
    alone = done("evaluate", dense, *asked[:4], "--json", "-")
    (wanted,) = json.loads(alone.out)["perplexity"]
    for part, name in (("perplexity", "perplexity"), ("bits", "bits_per_byte")):
        (own,), (beside,) = (evaluations[of].of(part) for of in ("pruned", "dense"))
        assert own.key == beside.key
        assert beside.value == pytest.approx(wanted[name], rel=1e-5)
    # Of another stretch of the text it is another measurement, and neither takes the other's place.
    done("evaluate", small, *asked, "--max-tokens", 128, "--report", small)
    before = read_report(small / "report.json").evaluations
    names = [one.name for one in before["pruned"].of("measured")]
    assert names.count("KL against dense, text.txt") == 2
    # Nor does a model of the same name and other weights.
    tuned = save_tiny(tmp_path / "tuned" / "dense", num_hidden_layers=3)
    tiny_model(num_hidden_layers=3, max_position_embeddings=512, seed=1).save_pretrained(tuned)
    done("evaluate", small, *asked[:4], "--against", tuned, "--report", small)
    assert "what was measured of dense is no part of the report" in caplog.text
    now = read_report(small / "report.json").evaluations
    assert now["dense"] == before["dense"]
    assert len(now["pruned"].of("measured")) == len(before["pruned"].of("measured")) + 2
    # What is measured again does.
    done("evaluate", small, *asked, "--report", small)
    again = read_report(small / "report.json").evaluations["pruned"].results
    assert [one.key for one in again] == [one.key for one in now["pruned"].results]
    # What belongs to no model of that report is refused before it is measured.
    other = save_tiny(tmp_path / "other", num_hidden_layers=2)
    stranger = run("evaluate", other, "--perplexity", text, "--seq-len", 64, "--report", small)
    assert stranger.code == 2
    assert "is neither the model in" in stranger.err
    assert "Perplexity" not in stranger.out
