"""Calibration windows from documents and from the model itself."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import MllamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from helpers import VOCABULARY, tiny_model, tiny_tokenizer
from llm_pruner.data import calibration, selfmade, turns
from llm_pruner.data.calibration import (
    FURTHER,
    Calibration,
    build_calibration,
    further_text,
)
from llm_pruner.data.selfmade import WRITERS, write_text, write_windows
from llm_pruner.data.sequences import added_tokens, bare_ids
from llm_pruner.data.text import Documents, shares_of
from llm_pruner.data.turns import Turns
from llm_pruner.errors import UserError
from llm_pruner.settings.common import CalibrationSettings

BOS, EOS = 1, 2


def build(
    source: str, tokenizer: Any, *, seed: int, model: Any = None, **asked: Any
) -> Calibration:
    settings = CalibrationSettings(calibration=source, **asked)
    return build_calibration(settings, tokenizer, model, seed=seed)


def marking_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, adding special tokens around a text as ``template`` says."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def write_documents(path: Path, lengths: list[int]) -> str:
    """Documents of one repeated letter each, so that a token tells its document."""
    rows = [{"text": chr(ord("a") + n) * length} for n, length in enumerate(lengths)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_added_tokens() -> None:
    assert added_tokens(tiny_tokenizer()) == ((), ())
    assert added_tokens(marking_tokenizer("<s> $A")) == ((BOS,), ())
    assert added_tokens(marking_tokenizer("<s> $A </s>")) == ((BOS,), (EOS,))


def test_packing_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = write_documents(tmp_path / "d.jsonl", [300, 300, 300])
    made = build(source, tokenizer, samples=11, seq_len=80, seed=0)
    assert made.input_ids.shape == (11, 80)
    assert made.input_ids.dtype == torch.int64
    letters = "".join(tokenizer.decode(row) for row in made.input_ids)
    # Nothing is lost, added or padded: whole documents in a shuffled order, a blank line between.
    order = [part[0] for part in letters.split("\n\n")]
    assert sorted(order) == ["a", "b", "c"]
    assert letters == "\n\n".join(letter * 300 for letter in order)[:880]


def test_a_field_is_that_of_the_sources_that_have_it(tmp_path: Path) -> None:
    rows = {"a": {"text": "a" * 400, "more": "x"}, "b": {"body": "b" * 400, "text": "x" * 400}}
    rows |= {"c": {"body": 5, "text": "c" * 400}, "d": {"id": "d", "said": "d" * 400}}
    names = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
    for name, row in rows.items():
        Path(names[name]).write_text(json.dumps(row))
    (tmp_path / "t.txt").write_text("t" * 400)
    names["t"] = str(tmp_path / "t.txt")

    def written(which: str, field: str) -> set[str]:
        mixture, tokenizer = ",".join(names[one] for one in which), tiny_tokenizer()
        made = build(mixture, tokenizer, samples=4, seq_len=40, text_field=field, seed=0)
        return set("".join(map(tokenizer.decode, made.input_ids)).replace("\n", ""))

    assert written("ab", "body") == {"a", "b"}
    assert written("ba", "body") == {"a", "b"}
    assert written("tb", "body") == {"t", "b"}
    for which, field, said in (
        ("ab", "bdoy", "a.jsonl has no field 'bdoy'"),
        ("ta", "body", "a.jsonl has no field 'body'"),  # neither has the text file
        ("bc", "body", "field 'body' of record 1 holds no text"),
        ("bd", "body", "d.jsonl does not show which field"),
    ):
        with pytest.raises(UserError, match=said):
            written(which, field)


def test_windows_to_measure_on_are_no_calibration_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(65 + n) * 20 for n in range(60)))
    tokenizer, options = tiny_tokenizer(), {"samples": 5, "seq_len": 20, "seed": 0}
    source = str(tmp_path / "a.txt")
    made = build_calibration(
        CalibrationSettings(calibration=source, samples=5, seq_len=20), tokenizer, seed=0, unseen=9
    )
    plain = build(source, tokenizer, **options)
    assert torch.equal(made.input_ids, plain.input_ids)
    assert made.settings == plain.settings
    assert plain.unseen.shape == (0, 0)
    assert made.unseen.shape == (9, 20)
    # The text has 60 windows, each of one character, in the order of the characters.
    drawn, rest = ({row.tolist()[0] for row in one} for one in (made.input_ids, made.unseen))
    assert len(rest) == 9
    assert not drawn & rest
    mine, his = ({int(one) for one in letters} for letters in (drawn, rest))
    assert min(abs(a - b) for a in mine for b in his) > 1
    everything = build_calibration(
        CalibrationSettings(calibration=source, samples=5, seq_len=20), tokenizer, seed=0, unseen=99
    )
    assert len(everything.unseen) == 55
    written = build_calibration(
        CalibrationSettings(calibration="self", samples=3, seq_len=16),
        tokenizer,
        tiny_model("llama"),
        seed=0,
        unseen=2,
    )
    assert written.unseen.shape == (2, 16)
    assert not (written.unseen[:, None] == written.input_ids).all(-1).any()


@pytest.mark.parametrize("length", [250, 30], ids=["documents", "a running text"])
@pytest.mark.parametrize("dataset", [False, True])
def test_what_is_measured_on_is_read_after_what_is_calibrated_on(
    dataset: bool, length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As ``curve`` and ``prune`` read it: more text is there than the windows need."""
    letters = random.Random(0)
    rows = ["".join(letters.choices("abcdefgh", k=length)) for _ in range(2000)]
    source = "someone/rows" if dataset else str(tmp_path / "rows.jsonl")
    if dataset:
        monkeypatch.setattr(
            calibration,
            "load_documents",
            lambda *_, limit, **__: Documents(tuple(rows[:limit]), source, "train", False),
        )
    else:
        Path(source).write_text("\n".join(json.dumps({"text": row}) for row in rows))
    asked = CalibrationSettings(calibration=source, samples=4, seq_len=20)
    alone, beside = (
        build_calibration(asked, tiny_tokenizer(), seed=0, unseen=count) for count in (0, 500)
    )
    assert torch.equal(alone.input_ids, beside.input_ids)
    assert alone.settings == beside.settings
    drawn, unseen = ({*map(tuple, one.tolist())} for one in (beside.input_ids, beside.unseen))
    assert len(unseen) == 500
    assert not drawn & unseen


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", [300, 300])
    made = build(source, marking_tokenizer("<s> $A </s>"), samples=12, seq_len=51, seed=1)
    ids = made.input_ids
    assert bool((ids[:, 0] == BOS).all())
    assert bool((ids[:, 1] != BOS).all())
    # 600 letters and two ends in 12 windows of 50: document, EOS, (BOS skipped at a cut or kept).
    assert int((ids == EOS).sum()) == 1
    end = int((ids[:, 1:].reshape(-1) == EOS).nonzero()[0])
    assert end == 300
    assert ids[6, 1:3].tolist() == [EOS, BOS]


def test_several_sources_take_turns_and_give_equal_parts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    for file in files:
        file.write_text(file.stem * 400)
    options: dict[str, Any] = {"seq_len": 20, "seed": 3}
    made = build(",".join(map(str, files)), tokenizer, samples=8, **options)
    assert [tokenizer.decode(row)[0] for row in made.input_ids] == list("abcabcab")
    assert made.settings["samples"] == 8
    assert made.settings["name"] == "a.txt, b.txt, c.txt"
    alone = build(str(files[0]), tokenizer, samples=8, **options)
    assert made.settings["fingerprint"] != alone.settings["fingerprint"]
    with pytest.raises(UserError, match="samples=2 of 3 sources leave some without any"):
        build(",".join(map(str, files)), tokenizer, samples=2, **options)
    files[1].write_text("b" * 40)
    with pytest.raises(UserError, match=r"b\.txt gives 40 tokens; 23 samples of 16 tokens need"):
        build(",".join(map(str, files)), tokenizer, samples=70, seed=0, seq_len=16)


def test_sources_give_their_shares_spread_evenly(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 400)
    options: dict[str, Any] = {"samples": 10, "seq_len": 20, "seed": 3}

    def first_letters(*shares: str) -> str:
        parts = zip("ab", shares, strict=True)
        source = ",".join(f"{tmp_path}/{name}.txt{share}" for name, share in parts)
        rows = build(source, tokenizer, **options).input_ids
        return "".join(tokenizer.decode(row)[0] for row in rows)

    assert first_letters(":0.8", ":0.2") == "aabaaaabaa"
    assert first_letters(":3", ":7").count("a") == 3
    assert first_letters(":0.5", ":.5") == first_letters("", "") == "ab" * 5
    with pytest.raises(UserError, match=r"samples=10 of 2 sources leave some without any"):
        first_letters(":0.99", ":0.01")
    for wrong in ((":0.8", ""), (":1", ":0")):
        with pytest.raises(UserError, match="give a share above 0 to all of them or to none"):
            first_letters(*wrong)
    with pytest.raises(UserError, match=r"name each once"):
        build(f"{tmp_path}/a.txt,{tmp_path}/a.txt", tokenizer, **options)


def test_a_file_may_be_named_like_a_share(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", [300, 300]).replace("d.jsonl", "d:0.5")
    (tmp_path / "d.jsonl").rename(source)
    assert shares_of(source) == {source: 1.0}
    many = {f"{'wikipedia' * 3}_{number}": 0.25 for number in range(16)}
    assert shares_of(",".join(f"{name}:0.25" for name in many)) == many  # longer than a name may be
    assert shares_of("c4:0.75,wikitext:wikitext-2-v1:0.25") == {
        "c4": 0.75,
        "wikitext:wikitext-2-v1": 0.25,
    }


def test_a_text_too_short_for_a_preset_gives_what_it_has(tmp_path: Path) -> None:
    source, tokenizer = write_documents(tmp_path / "d.jsonl", [300, 300]), tiny_tokenizer()
    short = CalibrationSettings(calibration=source, seq_len=15)
    assert len(build_calibration(short, tokenizer, seed=0, least=0.25).input_ids) == 40
    # 128 samples are asked for where nobody says how many, and a quarter of them is the least.
    assert build_calibration(short, tokenizer, seed=0).settings["samples"] == 40
    with pytest.raises(UserError, match="gives 604 tokens; 128 samples of 40 tokens need"):
        build_calibration(short.but(seq_len=40), tokenizer, seed=0)
    with pytest.raises(UserError, match="128 samples of 15 tokens need"):
        build_calibration(short.but(samples=128), tokenizer, seed=0)


def test_text_to_train_on_goes_past_what_was_read_and_leaves_out_what_judges(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.txt").write_text("".join(f"{n:04d}" for n in range(1000)))
    source, tokenizer = str(tmp_path / "t.txt"), tiny_tokenizer()
    asked = CalibrationSettings(calibration=source, samples=8, seq_len=20)
    loaded = SimpleNamespace(tokenizer=tokenizer)
    known = torch.arange(40).reshape(2, 20) % 7  # such as a model writes
    every = build_calibration(asked.but(samples=FURTHER), tokenizer, seed=0, least=0).input_ids
    apart = every[3:5]
    found = further_text(loaded, asked, known, apart, FURTHER, 0)  # type: ignore[arg-type]
    rows = [*map(tuple, found.tolist())]
    assert rows[:2] == [*map(tuple, known.tolist())]
    assert not {*rows} & {*map(tuple, apart.tolist())}
    assert {*rows} > {*map(tuple, every[:3].tolist())}
    written = asked.but(calibration="self")
    assert torch.equal(further_text(loaded, written, known, apart, 9, 0), known)  # type: ignore[arg-type]
    # The number is of new ones, also where the same windows would be drawn first.
    first = build_calibration(asked, tokenizer, seed=0).input_ids
    more = further_text(loaded, asked, first, apart, 9, 0)  # type: ignore[arg-type]
    assert torch.equal(more[:8], first)
    assert len({*map(tuple, more.tolist())}) == len(more) == 8 + 9
    # Of other documents the same text stands elsewhere in a window.
    shifted = torch.cat([every[3, 7:], known[0, :7]])[None]
    held = further_text(loaded, asked, known, shifted, FURTHER, 0)  # type: ignore[arg-type]
    assert {*rows} - {*map(tuple, held.tolist())} <= {tuple(every[3].tolist())}
    assert tuple(every[3].tolist()) not in {*map(tuple, held.tolist())}
    longer = asked.but(seq_len=10_000)  # than the text
    known, apart = torch.zeros(2, 10_000).long(), torch.zeros(0, 10_000).long()
    assert torch.equal(further_text(loaded, longer, known, apart, 9, 0), known)  # type: ignore[arg-type]


def test_further_text_that_cannot_be_read_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the network fails once a model is cut: it goes without."""

    def failing(*_: object, **__: object) -> None:
        raise UserError("c4 cannot be read: 429")

    monkeypatch.setattr(calibration, "build_calibration", failing)
    known, asked = torch.ones(2, 8).long(), CalibrationSettings(calibration="c4", seq_len=8)
    loaded = SimpleNamespace(tokenizer=tiny_tokenizer())
    assert further_text(loaded, asked, known, known[:1], 9, 0) is known  # type: ignore[arg-type]
    assert "429" in caplog.text


def test_a_plain_text_is_cut_in_order_and_drawn_by_seed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "".join(f"{n:04d}" for n in range(100))
    (tmp_path / "t.txt").write_text(text)

    def windows(seed: int) -> list[str]:
        source = str(tmp_path / "t.txt")
        made = build(source, tokenizer, samples=8, seq_len=40, seed=seed)
        return [tokenizer.decode(row) for row in made.input_ids]

    drawn = windows(0)
    assert len(set(drawn)) == 8
    assert all(text.index(window) % 40 == 0 for window in drawn)
    assert drawn == windows(0)
    assert drawn != windows(1)


def test_short_documents_stay_in_order(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", [3] * 20)
    made = build(source, tiny_tokenizer(), samples=1, seq_len=90, seed=3)
    assert tiny_tokenizer().decode(made.input_ids[0]).startswith("aaa\n\nbbb\n\nccc\n\nddd")


def test_settings_tell_what_was_used(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", [300, 300, 300])

    def settings(seed: int) -> dict[str, Any]:
        return build(source, tiny_tokenizer(), samples=3, seq_len=50, seed=seed).settings

    first = settings(0)
    assert json.loads(json.dumps(first)) == first
    assert first["source"] == source
    assert (first["name"], first["samples"], first["seq_len"], first["seed"]) == (
        "d.jsonl",
        3,
        50,
        0,
    )
    assert first == settings(0)
    prints = {settings(seed)["fingerprint"] for seed in range(8)}
    assert len(prints) > 1


def test_too_short(tmp_path: Path) -> None:
    source = str(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("x" * 100)
    message = r"t\.txt gives 100 tokens; 4 samples of 32 tokens need 128; use a longer text"
    with pytest.raises(UserError, match=message):
        build(source, tiny_tokenizer(), samples=4, seq_len=32, seed=0)
    made = build(source, tiny_tokenizer(), samples=3, seq_len=32, seed=0)
    assert made.input_ids.shape == (3, 32)


def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="samples 0 should be greater than or equal to 1"):
        build("self", tiny_tokenizer(), samples=0, seq_len=8, seed=0)
    with pytest.raises(UserError, match="seq_len 1 should be greater than or equal to 2"):
        build("self", tiny_tokenizer(), samples=1, seq_len=1, seed=0)
    with pytest.raises(UserError, match="needs the model"):
        build("self", tiny_tokenizer(), samples=1, seq_len=8, seed=0)
    too_long = pytest.raises(UserError, match="longer than the model's maximum; use 256 or less")
    with too_long:
        write_text(tiny_model(), tiny_tokenizer(), samples=1, seq_len=300, seed=0)
    (tmp_path / "t.txt").write_text("word " * 9000)
    with too_long:  # also of a text that is there, before the model reads it
        build("t.txt", tiny_tokenizer(), model=tiny_model(), samples=1, seq_len=300, seed=0)


def test_self_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    state = torch.random.get_rng_state()

    def ids(seed: int) -> torch.Tensor:
        made = build("self", tokenizer, samples=5, seq_len=24, seed=seed, model=model)
        return made.input_ids

    first = ids(0)
    assert first.shape == (5, 24)
    assert torch.equal(first, ids(0))
    assert not torch.equal(first, ids(1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert int(first.min()) > EOS  # no special token is drawn


def test_self_text_does_not_depend_on_batches_or_cache() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = write_text(model, tokenizer, samples=5, seq_len=20, seed=3)
    assert torch.equal(
        whole, write_text(model, tokenizer, samples=5, seq_len=20, seed=3, batch_size=2)
    )

    class NoCache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def get_input_embeddings(self) -> nn.Module:
            return model.get_input_embeddings()

        def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
            return CausalLMOutput(logits=model(input_ids=input_ids, use_cache=False).logits)

    assert torch.equal(
        whole, write_text(NoCache().eval(), tokenizer, samples=5, seq_len=20, seed=3)
    )


def test_as_many_texts_are_written_at_a_time_as_the_cache_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    config = model.config
    per_token = 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )

    def written(texts: float) -> set[int]:
        rows.clear()
        monkeypatch.setattr(selfmade, "CACHE", int(texts * 24 * per_token))
        write_text(model, tokenizer, samples=9, seq_len=24, seed=0)
        return set(rows[2:])  # two steps of one text, to see how the cache grows

    monkeypatch.setattr(selfmade, "TOKENS", 48)
    assert written(5.9) == {5, 4}
    assert written(0.5) == {2, 1}
    assert written(1000) == {9}


class Fixed(nn.Module):
    """Gives the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = tiny_model().config
        self.embedding = nn.Embedding(VOCABULARY, 2)
        self.logits = logits

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_self_draws_from_the_models_distribution() -> None:
    share = torch.zeros(VOCABULARY)
    share[[0, 10, 20, 30]] = torch.tensor([0.5, 0.3, 0.19, 0.01])  # 0 is a special token

    ids = write_text(Fixed(share.log()), tiny_tokenizer(), samples=20, seq_len=201, seed=0)
    counts = torch.bincount(ids[:, 1:].reshape(-1), minlength=VOCABULARY)
    assert set(counts.nonzero()[:, 0].tolist()) == {10, 20, 30}
    # 4000 draws with probability 0.6: a standard deviation of 0.0077; with 0.02, of 0.0022.
    assert float(counts[10]) / 4000 == pytest.approx(0.6, abs=0.03)
    assert float(counts[30]) / 4000 == pytest.approx(0.02, abs=0.01)


def test_self_draws_no_token_that_has_no_logit() -> None:
    """Llama 3.2 Vision has 8 rows more in its input embedding, for images."""
    config = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        cross_attention_layers=[],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model, tokenizer = MllamaForCausalLM(config).eval(), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == VOCABULARY + 1
    ids = write_text(model, tokenizer, samples=3, seq_len=64, seed=0)
    assert EOS < int(ids.min()) <= int(ids.max()) < VOCABULARY


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_long_windows_of_self_hold_several_texts(
    template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfmade, "PIECE", 128)
    tokenizer = tiny_tokenizer() if template is None else marking_tokenizer(template)
    share = torch.zeros(VOCABULARY)
    share[40] = 1.0
    model = Fixed(share.log())
    windows = write_windows(model, tokenizer, samples=3, seq_len=200, seed=0)
    assert windows.shape == (3, 200)
    parting = {None: tokenizer("\n\n")["input_ids"], "<s> $A": []}.get(template, [EOS])
    texts = write_text(model, tokenizer, samples=6, seq_len=128, seed=0)
    for number, row in enumerate(windows):
        first, second = texts[2 * number].tolist(), texts[2 * number + 1].tolist()
        assert row.tolist() == [*first, *parting, *second][:200]
    short = write_windows(model, tokenizer, samples=3, seq_len=20, seed=0)
    assert torch.equal(short, write_text(model, tokenizer, samples=3, seq_len=20, seed=0))
    with pytest.raises(UserError, match="seq_len 300 is longer than the model's maximum"):
        write_windows(model, tokenizer, samples=1, seq_len=300, seed=0)


def test_self_starts_after_a_blank_line_that_is_no_part_of_the_text() -> None:
    share = torch.zeros(VOCABULARY)
    share[40] = 1.0
    read: list[torch.Tensor] = []

    class Reading(Fixed):
        def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
            read.append(input_ids)
            return super().forward(input_ids)

    tokenizer = tiny_tokenizer()
    ids = write_text(Reading(share.log()), tokenizer, samples=3, seq_len=256, seed=0)
    assert ids.shape == (3, 256)
    line = tokenizer("\n\n", add_special_tokens=False)["input_ids"][-1]
    assert torch.equal(read[0], torch.stack([torch.full((3,), line), ids[:, 0]], dim=1))
    # Never more than the model has positions for, which are as many as the text is long.
    assert max(part.shape[1] for part in read) == 256
    assert (ids[:, 1:] == 40).all()
    # Where the tokenizer adds BOS, it is what a text starts with.
    read.clear()
    marked = marking_tokenizer("<s> $A")
    write_text(Reading(share.log()), marked, samples=3, seq_len=256, seed=0)
    assert read[0].tolist() == [[BOS]] * 3


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def drawing(**shares: float) -> Fixed:
    """A model that draws letters, and the end of a turn as ``end``, with these probabilities."""
    tokenizer, logits = tiny_tokenizer(), torch.full((VOCABULARY,), -torch.inf)
    for name, share in shares.items():
        token = EOS if name == "end" else bare_ids(tokenizer, name)[0]
        logits[token] = math.log(share)
    return Fixed(logits)


def test_chats_take_turns_as_the_template_has_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = drawing(a=0.8, b=0.1, end=0.1)
    windows = WRITERS["chat"](model, tokenizer, samples=6, seq_len=128, seed=0)
    assert windows.shape == (6, 128)
    # Windows of one chat stand one behind the other.
    chats = [tokenizer.decode(windows[i : i + 2].flatten()) for i in (0, 2, 4)]
    for chat in chats:
        said = chat.split("</s>")
        assert len(said) > 4
        for number, turn in enumerate(said[:-1]):
            role = "<assistant>" if number % 2 else "<user>"
            assert re.fullmatch(f"{role}[ab]*", turn)
    assert len({*chats}) == 3
    again = WRITERS["chat"](model, tokenizer, samples=6, seq_len=128, seed=0)
    assert torch.equal(windows, again)


def test_what_chats_begin_with_is_read_once() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    size: dict[str, Any] = {"samples": 3, "seq_len": 64, "seed": 0, "turns": Turns(tokenizer)}
    together = write_text(model, tokenizer, **size, batch_size=3)
    assert seen == [(1, len("<user>"))] + [(3, 1)] * (64 - len("<user>") - 1)
    hook.remove()
    assert torch.equal(together, write_text(model, tokenizer, **size, batch_size=1))
    without = drawing(a=0.5, b=0.5)  # no cache
    whole = write_text(without, tokenizer, **size, batch_size=3)
    assert torch.equal(whole, write_text(without, tokenizer, **size, batch_size=1))


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_a_token_is_drawn_by_its_share(vocabulary: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, vocabulary, generator=random)
    uniform = torch.rand(500, generator=random, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    barred = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    share = logits.index_fill(1, barred, -torch.inf).double().softmax(-1)
    wanted = (share.cumsum(-1) <= uniform[:, None]).sum(-1).clamp(max=vocabulary - 2)
    assert torch.equal(selfmade.draw_tokens(logits, uniform, barred), wanted)


def test_a_question_without_end_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    (ids,) = WRITERS["chat"](drawing(a=1.0), tokenizer, samples=1, seq_len=256, seed=0)
    said = tokenizer.decode(ids)
    assert said == f"<user>{'a' * 64}</s><assistant>" + "a" * (len(said) - 64 - 21)
    monkeypatch.setattr(turns, "QUESTION", 10)
    (ids,) = WRITERS["chat"](drawing(a=1.0), tokenizer, samples=1, seq_len=256, seed=0)
    assert tokenizer.decode(ids).startswith(f"<user>{'a' * 10}</s><assistant>aaa")


def test_chats_stand_beside_other_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    (tmp_path / "t.txt").write_text("z" * 4000)
    source, model = f"{tmp_path}/t.txt:0.75,chat:0.25", drawing(a=0.9, end=0.1)
    asked = {"samples": 8, "seq_len": 64}
    windows = build(source, tokenizer, seed=0, model=model, **asked).input_ids
    assert sum(tokenizer.decode(row) == "z" * 64 for row in windows) == 6
    kept = tmp_path / "kept"
    chats = [build("chat", tokenizer, seed=0, model=model, kept=kept, **asked) for _ in range(2)]
    assert torch.equal(chats[0].input_ids, chats[1].input_ids)
    assert [file.name for file in kept.iterdir()] == ["chat-64-0-00000.safetensors"]


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "has none"), (CHAT_TEMPLATE.replace("</s>", "!"), "special tokens after turns")],
)
def test_chats_need_a_template_that_ends_turns(template: str | None, said: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said):
        build("chat", tokenizer, seed=0, model=drawing(a=1.0), samples=1, seq_len=64)


def test_self_refuses_logits_that_are_not_finite() -> None:
    logits = torch.full((VOCABULARY,), torch.nan)
    with pytest.raises(UserError, match="logits are not finite while it writes"):
        write_text(Fixed(logits), tiny_tokenizer(), samples=1, seq_len=4, seed=0)
