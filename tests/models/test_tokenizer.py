"""Tokens are those of the checkpoint's ``tokenizer.json``, before pruning and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from helpers import tiny_model, tiny_tokenizer
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.models.load import load_model
from llm_pruner.models.tokenizer import read_tokenizer, save_tokenizer
from llm_pruner.types import Edits

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


def write(folder: Path, splits: Any, **said: Any) -> Path:
    """Write a small Llama whose tokenizer is called GPT-2's, as SmolLM2's is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", *alphabet, "20", "202", "2024"]
    merges = [("2", "0"), ("20", "2"), ("202", "4")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "<s>", **said}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tiny_model("llama", vocab_size=len(tokens)).save_pretrained(folder)
    return folder


def test_how_text_is_split_is_not_lost(tmp_path: Path) -> None:
    loaded = load_model(str(write(tmp_path / "dense", DIGITS)))
    tokenizer: Any = loaded.tokenizer
    assert tokenizer.tokenize("a 2024") == ["a", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.bos_token == "<s>"
    out = save_checkpoint(loaded.model, tmp_path / "out", edits=Edits(), tokenizer=tokenizer).path
    for read in (AutoTokenizer.from_pretrained, Tokenizer.from_file):
        file = out / "tokenizer.json" if read is Tokenizer.from_file else out
        again = read(str(file))
        assert len(getattr(again.encode("2024"), "ids", None) or again.encode("2024")) == 4
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"  # of transformers 4, too


def test_a_class_that_says_the_same_stays(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(write(tmp_path / "dense", BYTES)), {})
    assert type(tokenizer) is GPT2Tokenizer
    assert tokenizer.tokenize("2024") == ["2024"]


def test_where_there_are_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "dense", DIGITS)
    said = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(said["vocab"]))
    merges = "".join(f"{' '.join(pair)}\n" for pair in said["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    assert read_tokenizer(str(folder), {}).tokenize("2024") == ["2024"]


@pytest.mark.parametrize("splits", [BYTES, DIGITS])
def test_code_that_is_not_written_is_not_named(tmp_path: Path, splits: Any) -> None:
    folder = write(tmp_path / "dense", splits, auto_map={"AutoTokenizer": ["tokens.Own", None]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert "auto_map" in tokenizer.init_kwargs
    save_tokenizer(tokenizer, tmp_path / "out")
    assert "auto_map" in tokenizer.init_kwargs
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again("a 2024") == tokenizer("a 2024")


def test_a_tokenizer_of_the_backend_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tiny_tokenizer(), tmp_path)
    read, seen = PreTrainedTokenizerFast.from_pretrained, []

    def noted(*args: Any, **named: Any) -> Any:
        seen.append(args)
        return read(*args, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", noted)
    assert read_tokenizer(str(tmp_path), {})("abc") == tiny_tokenizer()("abc")
    assert len(seen) == 1
