"""Tokenizers with fewer tokens: lossless, and merged as before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_tokenizer
from llm_pruner.data import vocabulary
from llm_pruner.data.sequences import bare_ids, render_chat, template_ids
from llm_pruner.data.text import demo_text
from llm_pruner.data.vocabulary import Vocabulary, vocabulary_of
from llm_pruner.errors import UserError
from trained_tokenizers import MADE, STRANGE, byte_level, unigram, with_bytes


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request: Any) -> PreTrainedTokenizerFast:
    return MADE[request.param]()


def smaller(tokenizer: Any, size: int | None, text: str) -> tuple[Any, Any]:
    known = vocabulary_of(tokenizer)
    kept = known.choose(known.count([text]), size)
    return known.cut(kept), kept


def test_text_comes_back_whole(tokenizer: Any) -> None:
    text = demo_text()[:600]
    cut, kept = smaller(tokenizer, None, text)
    assert len(kept) < len(tokenizer)
    assert len(cut) == len(kept)
    for one in (text, demo_text()[:4000], STRANGE):
        ids = bare_ids(cut, one)
        assert cut.decode(ids) == tokenizer.decode(bare_ids(tokenizer, one)) == one
        assert max(ids) < len(kept)
    # What was counted is written with the same tokens.
    assert kept[bare_ids(cut, text)].tolist() == bare_ids(tokenizer, text)


def test_each_token_that_stays_can_be_made(tokenizer: Any) -> None:
    cut, kept = smaller(tokenizer, len(vocabulary_of(tokenizer).always) + 60, demo_text())
    backend = tokenizer.backend_tokenizer
    for new, old in enumerate(kept.tolist()):
        token = backend.id_to_token(old)
        assert cut.backend_tokenizer.id_to_token(new) == token
        text = tokenizer.decode([old])
        if bare_ids(tokenizer, text) == [old]:
            assert bare_ids(cut, text) == [new]


def test_the_most_used_stay(tokenizer: Any) -> None:
    known = vocabulary_of(tokenizer)
    counts = known.count([demo_text()])
    assert counts.sum() == len(bare_ids(tokenizer, demo_text()))
    size = len(known.always) + 60
    kept = known.choose(counts, size)
    assert size - 3 <= len(kept) <= size
    assert kept.tolist() == sorted({*kept.tolist()})
    assert known.always <= {*kept.tolist()}
    gone = np.setdiff1d([*known.known], kept)
    free = [index for index in kept.tolist() if index not in known.always]
    assert counts[gone].max() <= np.median(counts[free])


def test_special_tokens_and_what_is_added_are_renumbered(tokenizer: Any, tmp_path: Path) -> None:
    cut, kept = smaller(tokenizer, None, "the old bridge")
    cut.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for one in (cut, again):
        ids = one("the old bridge")["input_ids"]
        assert kept[ids].tolist() == tokenizer("the old bridge")["input_ids"]
        assert (one.bos_token_id, one.eos_token_id) == (ids[0], ids[-1])
        assert one.decode(ids, skip_special_tokens=True) == "the old bridge"


def test_words_of_the_chat_template_stay_with_all_that_they_are_made_of(tokenizer: Any) -> None:
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}{{ m.role }} of the bridge: {% endfor %}"
    needed, known = template_ids(talking), Vocabulary(talking)
    assert not needed <= known.always
    assert template_ids(tokenizer) == set()
    known = vocabulary_of(talking, needed)
    kept = known.choose(np.zeros(known.size, np.int64), None)
    said = render_chat(talking, [{"role": "user", "content": ""}], True)
    assert kept[bare_ids(known.cut(kept), said)].tolist() == bare_ids(talking, said)


def test_long_texts_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    known, text = vocabulary_of(byte_level()), demo_text()[:20_000]
    whole = known.count([text, "", "one"])
    monkeypatch.setattr(vocabulary, "_PIECE", 2000)
    cut = [one for batch in vocabulary._batches([text, "", "one"]) for one in batch]
    assert "".join(cut) == text + "one"
    assert len(cut) > 4
    assert sum(one.endswith("\n") for one in cut) >= len(cut) - 2
    assert abs(known.count([text, "", "one"]) - whole).sum() < 0.01 * whole.sum()


def test_spaces_are_written_though_the_text_has_none() -> None:
    tokenizer = with_bytes()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")  # as that of Gemma
    cut, kept = smaller(tokenizer, None, "bridge")
    assert cut.decode(bare_ids(cut, "a b")) == "a b"
    assert len(kept) < 300


def test_bytes_that_the_tokenizer_does_not_have_write_nothing() -> None:
    tokenizer = unigram()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["byte_fallback"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    cut, _ = smaller(tokenizer, None, "bridge")
    assert cut.decode(bare_ids(cut, STRANGE)) == STRANGE


def test_words_whose_ends_are_marked() -> None:
    model = models.BPE(
        {"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>"
    )
    marked = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(UserError, match=r"end_of_word_suffix '</w>'"):
        vocabulary_of(marked)


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="3 tokens cannot be: 259 have to stay"):
        smaller(tiny_tokenizer(), 3, "a")
    with pytest.raises(UserError, match="there are 259"):
        smaller(tiny_tokenizer(), 260, "a")
    with pytest.raises(UserError, match="name the token 300, which the tokenizer does not have"):
        vocabulary_of(tiny_tokenizer(), {300})
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="this one is WordLevel"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(UserError, match="this one is object"):
        vocabulary_of(object())


def test_files_with_merges_as_text_are_read() -> None:
    """The form that versions of tokenizers before 0.20 wrote."""
    tokenizer = byte_level()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    known = Vocabulary(tokenizer)
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]

    class Old:
        def to_str(self) -> str:
            return json.dumps(data)

        encode_batch = tokenizer.backend_tokenizer.encode_batch

        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

    old = Vocabulary(type("T", (), {"backend_tokenizer": Old()})())
    counts = known.count([demo_text()])
    assert old.choose(counts, 400).tolist() == known.choose(counts, 400).tolist()


def test_all_of_a_text_counts_whatever_training_left_in_the_tokenizer() -> None:
    tokenizer = byte_level()
    whole = Vocabulary(tokenizer).count([demo_text(), "a"])
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=0)
    assert Vocabulary(tokenizer).count([demo_text(), "a"]).tolist() == whole.tolist()
    assert len(tokenizer.backend_tokenizer.encode("a").ids) == 16  # its own is as it was
