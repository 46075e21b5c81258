"""``vocab``: the same model with fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from command import done, refused, write_text
from helpers import tiny_model
from llm_pruner.data.sequences import bare_ids
from llm_pruner.models.load import load_model
from llm_pruner.surgery.vocabulary import cut_vocabulary_, named_tokens, with_tokens_of
from trained_tokenizers import byte_level, with_bytes

pytestmark = pytest.mark.slow


def save(folder: Path, kind: str = "llama", **config: Any) -> Path:
    tokenizer = byte_level()
    model = tiny_model(kind, vocab_size=704, **config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], pad_token_id=600)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PER_LAYER = {"vocab_size_per_layer_input": 704, "hidden_size_per_layer_input": 8}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt2", {"n_positions": 64}),
        ("phi", {}),
        ("gemma3_text", {}),
        ("gemma4_text", PER_LAYER),
        (
            "gemma3n_text",
            PER_LAYER
            | {"intermediate_size": [64] * 3, "activation_sparsity_pattern": [0.0] * 3}
            | {"num_kv_shared_layers": 0},
        ),
    ],
)
def test_logits_are_those_of_the_tokens_that_stay(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    dense, text = save(tmp_path / "dense", kind, **config), write_text(tmp_path / "t.txt", 4000)
    found = json.loads(
        done("vocab", dense, "--text", text, "--out", tmp_path / "small", "--json", "-").out
    )
    kept = torch.tensor(found["kept"])
    assert found["tokens"] == {"before": 704, "after": len(kept)}
    assert {2, 5, 600} <= {*kept.tolist()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    before = AutoModelForCausalLM.from_pretrained(dense).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    ids = torch.tensor([bare_ids(tokenizer, "The bridge, naïve 語.")])
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, before(kept[ids]).logits[..., kept], atol=1e-6, rtol=1e-6
        )
    assert model.config.vocab_size == len(kept) == found["tokens"]["after"]
    assert kept[model.config.eos_token_id] == 2
    assert kept[model.generation_config.eos_token_id].tolist() == [2, 5]
    assert kept[model.generation_config.pad_token_id] == 600
    size = sum(one.numel() for one in model.parameters())
    assert found["parameters"]["after"] == size < found["parameters"]["before"]
    assert config.get("tie_word_embeddings", False) <= (
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
    )


def test_what_is_tied_to_the_output_layer_is_cut_with_it() -> None:
    model: Any = tiny_model("llama")
    model.spare = nn.Module()
    model.spare.weight = model.lm_head.weight
    edits = cut_vocabulary_(model, np.arange(40))
    assert model.spare.weight is model.lm_head.weight
    assert edits.shapes["spare.weight"] == (40, model.config.hidden_size)


def test_what_is_looked_up_for_each_token_is_cut_with_it() -> None:
    model: Any = tiny_model("llama")
    rows = model.config.vocab_size
    chosen, other = torch.arange(2 * rows).view(rows, 2), torch.arange(rows + 1)
    model.router = nn.Module()
    model.router.register_buffer("chosen", chosen)
    model.router.register_buffer("other", other)
    model.router.register_buffer("scales", torch.ones(rows))
    cut_vocabulary_(model, np.array([0, 1, 2, 30, 41]))
    assert model.router.chosen.equal(chosen[[0, 1, 2, 30, 41]])
    assert model.router.other is other
    assert len(model.router.scales) == rows


def test_tokens_are_known_by_all_names_of_settings() -> None:
    model: Any = tiny_model("llama", image_token_index=30, boi_token_index=7, audio_token_id=9)
    found = model.config
    # As Phi-4 has them; a part such as a Q-Former has tokens of its own.
    found.vision_config = PreTrainedConfig(image_token_id=31)
    found.qformer_config = PreTrainedConfig(vocab_size=9, pad_token_id=8)
    assert {1, 2, 7, 9, 30, 31} <= named_tokens(model)
    assert 8 not in named_tokens(model)
    cut_vocabulary_(model, np.array([1, 2, 7, 9, 30, 31]))
    assert (found.boi_token_index, found.audio_token_id, found.image_token_index) == (2, 3, 4)
    assert found.vision_config.image_token_id == 5
    assert found.qformer_config.pad_token_id == 8


TURNS = "{% for m in messages %}<s>{{ m.role }}, the soup: {{ m.content }}</s>{% endfor %}"
PICKY = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS


@pytest.mark.parametrize("template", [TURNS, PICKY, "{{ raise_exception('no') }}"])
def test_the_words_of_the_chat_template_stay(tmp_path: Path, template: str) -> None:
    dense, text = save(tmp_path / "dense"), tmp_path / "t.txt"
    text.write_text("0123456789" * 400)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(dense)
    done("vocab", dense, "--text", text, "--out", tmp_path / "small")
    smaller = AutoTokenizer.from_pretrained(tmp_path / "small")
    kept = np.array(json.loads((tmp_path / "small" / "vocabulary.json").read_text())["kept"])
    said = "user, the soup: 1"
    same = kept[bare_ids(smaller, said)].tolist() == bare_ids(tokenizer, said)
    assert same == (template in (TURNS, PICKY))


def test_the_dense_model_is_compared_and_teaches_by_the_tokens_that_stay(tmp_path: Path) -> None:
    dense, text = save(tmp_path / "dense"), write_text(tmp_path / "t.txt", 6000)
    out, small = tmp_path / "small", tmp_path / "pruned"
    done("vocab", dense, "--text", text, "--size", "400", "--out", out)
    done("prune", out, "--ratio", "0.2", "--calibration", text, "--samples", "15", "--out", small)
    measure = ("--perplexity", text, "--seq-len", "32", "--json", "-", "--against", dense)
    divergence = {
        folder: json.loads(done("evaluate", folder, *measure).out)["perplexity"][0]["divergence"]
        for folder in (out, small)
    }
    assert abs(divergence[out]["kl"]) < 1e-6
    assert divergence[out]["changed"] == 0
    assert divergence[out]["against"] == "dense, 400 of its tokens"
    assert divergence[small]["kl"] > 1e-5
    streamed = json.loads(done("evaluate", small, *measure, "--memory", "100KB").out)
    assert streamed["perplexity"][0]["divergence"]["kl"] == divergence[small]["kl"]
    train = ("--data", text, "--seq-len", "32", "--samples", "8", "--trainer", "max_steps=1")
    taught = tmp_path / "taught"
    both = ("--teacher", dense, "--control", dense)
    done("recover", small, *both, *train, "--held-out", "2", "--out", taught)


def test_a_teacher_with_other_tokens_is_another(tmp_path: Path) -> None:
    """By its fingerprint, which names what of a teacher is kept for other runs."""
    dense, text = save(tmp_path / "dense"), write_text(tmp_path / "t.txt", 6000)
    whole = load_model(str(dense))
    found = {whole.fingerprint}
    for size in ("400", "300"):
        done("vocab", dense, "--text", text, "--size", size, "--out", tmp_path / size)
        found.add(with_tokens_of(whole, load_model(str(tmp_path / size))).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize("structures", ["ffn", "hidden,ffn"])
def test_a_folder_with_code_loses_tokens_as_any_other(tmp_path: Path, structures: str) -> None:
    dense, text = save(tmp_path / "dense"), write_text(tmp_path / "t.txt", 4000)
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    cut = ("--structures", structures, "--criterion", "l2", "--split", "equal", "--ratio", "0.1")
    cut += ("--scope", "global")
    done("prune", dense, *cut, "--calibration", text, "--samples", "8", "--out", pruned)
    done("vocab", pruned, "--text", text, "--size", "400", "--out", small)
    record = json.loads((small / "vocabulary.json").read_text())
    kept = torch.tensor(record["kept"])
    assert not {"saved_as", "needs", "bytes"} & record.keys()  # of the folder, which has code
    before, after = (json.loads((one / "config.json").read_text()) for one in (pruned, small))
    assert after["auto_map"] == before["auto_map"]
    assert {"AutoModel", "AutoModelForCausalLM"} <= after["auto_map"].keys()
    # Nothing that was read of the earlier sizes says how many tokens there are.
    for values in after["pruned"]["attributes"].values():
        assert not {"vocab_size", "padding_idx"} & values.keys()
    wide, model = (AutoModelForCausalLM.from_pretrained(one).eval() for one in (pruned, small))
    ids = torch.arange(1, 60, 7)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, wide(kept[ids]).logits[..., kept], atol=1e-6, rtol=1e-6
        )
    assert model.model.vocab_size == 400


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    dense, text = save(tmp_path / "dense"), write_text(tmp_path / "t.txt", 4000)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    more = [f"<{number}>" for number in range(704 - len(tokenizer))]
    tokenizer.add_tokens(more)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 704
    tokenizer.save_pretrained(dense)
    done("vocab", dense, "--text", text, "--out", tmp_path / "small")
    found = AutoTokenizer.from_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert len(found) == model.config.vocab_size
    assert found.pad_token is None
    assert {*more} <= found.get_vocab().keys()


def test_a_tokenizer_of_another_model_is_refused(work: Path) -> None:
    text = write_text(work / "t.txt", 4000)
    tiny_model("llama", vocab_size=650).save_pretrained(work / "dense")
    byte_level().save_pretrained(work / "dense")
    said = refused("vocab", work / "dense", "--text", text, "--out", "small")
    assert "has the token 699, and the embedding has 650 rows" in said


def test_a_tokenizer_that_does_not_decode_its_bytes_is_refused(work: Path) -> None:
    dense, text = save(work / "dense"), write_text(work / "t.txt", 4000)
    tokenizer = with_bytes()
    tokenizer.backend_tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.save_pretrained(dense)
    (dense / "generation_config.json").unlink()
    said = refused("vocab", dense, "--text", text, "--out", "small", "--size", 262)
    assert "with fewer tokens the tokenizer does not give back the text" in said
    assert "so tokens cannot be taken from it" in said
    assert not (work / "small").exists()


@pytest.mark.parametrize("characters", [1, 1500])
def test_a_text_that_is_too_short_is_refused(work: Path, characters: int) -> None:
    dense, text = save(work / "dense"), write_text(work / "t.txt", characters)
    said = refused("vocab", dense, "--text", text, "--out", "small")
    assert f"leaves {characters // 10} characters to measure on" in said


@pytest.mark.parametrize(("tokens", "told"), [(99_999, False), (128_256, True)])
def test_inspect_says_what_the_vocabulary_takes(tmp_path: Path, tokens: int, told: bool) -> None:
    tiny_model("llama", vocab_size=128).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": tokens}))
    found = json.loads(done("inspect", tmp_path, "--json", "-").out)
    assert found["tokens"] == tokens
    assert found["embeddings"] == 2 * tokens * config["hidden_size"] < found["parameters"]
    said = " ".join(done("inspect", tmp_path).out.split())
    assert f"Embeddings of {tokens:,} tokens: " in said
    assert told == ("before you prune: llm-pruner vocab, or compress --vocab-text." in said)
