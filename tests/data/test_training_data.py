"""Training data: schemas, chat templates, windows, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from command import WORDS
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.data.examples import Example, Examples, Turn, load_examples
from llm_pruner.data.sequences import TrainingSequence, encode_examples, make_sequence
from llm_pruner.data.training import (
    Samples,
    fingerprint_samples,
    held_out_windows,
    self_made_samples,
    split_samples,
)
from llm_pruner.errors import UserError
from trained_tokenizers import MADE, byte_level

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(one: TrainingSequence, tokenizer: Any) -> str:
    return tokenizer.decode(one.input_ids[one.learned])


def whole(one: TrainingSequence, tokenizer: Any) -> str:
    return tokenizer.decode(one.input_ids)


CHAT = Example((Turn("user", "Hi?"), Turn("assistant", "Yes."), Turn("user", "So?")))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"instruction": "Add", "input": "1, 2", "output": "3"},
            Example((Turn("user", "Add"), Turn("assistant", "3")), context="1, 2"),
        ),
        (
            {"instruction": "Add", "response": "3", "instruction_source": "x"},
            Example((Turn("user", "Add"), Turn("assistant", "3"))),
        ),
        (
            {"prompt": "Add", "completion": "3"},
            Example((Turn("user", "Add"), Turn("assistant", "3"))),
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            Example((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {
                "id": "7",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            Example((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            Example((Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {
                "system": "Not this.",
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
            },
            Example((Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"))),
        ),
        ({"text": "a b"}, Example(text="a b")),
        ({"input": "Add", "output": "3"}, Example((Turn("user", "Add"), Turn("assistant", "3")))),
        (
            {"system_prompt": "Be brief.", "question": "Add", "response": "3"},
            Example((Turn("system", "Be brief."), Turn("user", "Add"), Turn("assistant", "3"))),
        ),
        (
            {
                **{"instruction": "Add", "input": "1, 2", "output": "3", "system": ""},
                "history": [["Hi", "Yes?"]],
            },
            Example(
                (
                    *(Turn("user", "Hi"), Turn("assistant", "Yes?")),
                    *(Turn("user", "Add\n\n1, 2"), Turn("assistant", "3")),
                )
            ),
        ),
    ],
)
def test_schemas(tmp_path: Path, row: dict[str, Any], wanted: Example) -> None:
    found = load_examples(write(tmp_path / "rows.jsonl", [row]))
    assert found.examples == (wanted,)


def test_hub_rows_come_with_all_their_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **settings: object) -> list[dict[str, str]]:
        asked.append((args, settings))
        return [{"instruction": "Add", "input": "", "output": str(n)} for n in range(9)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = load_examples("yahma/alpaca-cleaned", limit=4)
    assert (found.name, found.split) == ("yahma/alpaca-cleaned", "train")
    assert [one.turns[1].content for one in found.examples] == ["0", "1", "2", "3"]
    assert asked[0][1]["streaming"] is True
    load_examples("c4")  # has no end
    assert asked[1][1]["streaming"] is True


def test_the_code_of_a_repository_is_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"repo_name": "a/b", "path": "c.py", "content": "x = 1\n", "license": "mit"}
    monkeypatch.setattr("datasets.load_dataset", lambda *_a, **_k: [row])
    assert load_examples("code").examples == (Example(text="x = 1\n"),)


def test_records_with_and_without_a_context(tmp_path: Path) -> None:
    asked = {"instruction": "Add", "output": "3"}
    rows = [asked, asked | {"input": "1, 2"}, asked | {"input": None, "context": "2, 1"}]
    rows += [asked | {"context": {"title": ["a"], "sentences": [["b"]]}}]  # as HotpotQA has it
    found = load_examples(write(tmp_path / "rows.jsonl", rows))
    assert [one.context for one in found.examples] == ["", "1, 2", "2, 1", ""]


def test_an_empty_field_says_nothing_of_the_others(tmp_path: Path) -> None:
    asked = {"id": "a", "instruction": "Add", "input": None, "output": "3"}
    found = load_examples(write(tmp_path / "rows.jsonl", [asked, asked]))
    assert [one.turns[1].content for one in found.examples] == ["3", "3"]
    rows = [asked | {"output": None}, asked]
    with pytest.raises(UserError, match=r"record 1: field 'output' is missing or no string"):
        load_examples(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"which field holds its text \(fields: id, content\)"):
        load_examples(write(tmp_path / "rows.jsonl", [{"id": "a", "content": "b"}]))


def test_a_chat_alone_in_a_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "one.json").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    (found,) = load_examples(str(tmp_path / "one.json")).examples
    assert found == Example((Turn("user", "a"), Turn("assistant", "b")))


def test_records_that_are_not_what_the_first_is(tmp_path: Path) -> None:
    good = {"instruction": "Add", "input": "", "output": "3"}
    rows = [good, {"instruction": "Add", "output": None}]
    with pytest.raises(UserError, match=r"record 2: field 'output' is missing or no string"):
        load_examples(write(tmp_path / "rows.jsonl", rows))
    chat = [{"messages": [{"role": "robot", "content": "x"}]}]
    with pytest.raises(UserError, match="record 1 has a message that is no role of system, user"):
        load_examples(write(tmp_path / "chat.jsonl", chat))
    with pytest.raises(UserError, match="holds no text; give a file or dataset with text in it"):
        load_examples(write(tmp_path / "none.jsonl", [good | {"output": " "}]))


def test_the_alpaca_prompt_is_the_papers() -> None:
    tokenizer = tiny_tokenizer()
    example = Example((Turn("user", "Add"), Turn("assistant", "3")), context="1, 2")
    (one,) = encode_examples([example], tokenizer, seq_len=500, mask_prompt=True)
    assert whole(one, tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd\n\n### Input:\n1, 2\n\n### Response:\n3</s>"
    )
    assert learned(one, tokenizer) == "3</s>"
    (one,) = encode_examples([example], tokenizer, seq_len=500)
    assert one.targets == len(one) - 1


def test_every_answer_of_a_chat_is_learned_and_nothing_else() -> None:
    tokenizer = chat_tokenizer()
    turns = (*CHAT.turns, Turn("assistant", "No."))
    (one,) = encode_examples([Example(turns)], tokenizer, seq_len=500, mask_prompt=True)
    assert (
        whole(one, tokenizer) == "<user>Hi?</s><assistant>Yes.</s><user>So?</s><assistant>No.</s>"
    )
    assert learned(one, tokenizer) == "Yes.</s>No.</s>"
    # What follows the last answer teaches nothing.
    (one,) = encode_examples([CHAT], tokenizer, seq_len=500)
    assert whole(one, tokenizer) == "<user>Hi?</s><assistant>Yes.</s>"


def test_a_chat_may_begin_with_the_assistant() -> None:
    refusing = "{% if not messages %}{{ raise_exception('nothing') }}{% endif %}"
    tokenizer = chat_tokenizer(refusing + TEMPLATE)
    turns = (Turn("assistant", "Hello."), Turn("user", "So?"), Turn("assistant", "No."))
    (one,) = encode_examples([Example(turns)], tokenizer, seq_len=500, mask_prompt=True)
    assert whole(one, tokenizer) == "<assistant>Hello.</s><user>So?</s><assistant>No.</s>"
    assert learned(one, tokenizer) == "Hello.</s>No.</s>"


class _WithoutPlaces:
    """A tokenizer that does not say where its tokens stand, as those written in Python."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("wrap", [lambda one: one, _WithoutPlaces], ids=["places", "no places"])
@pytest.mark.parametrize("kind", MADE)
def test_the_tokens_of_a_chat_are_those_of_its_text(kind: str, wrap: Callable[[Any], Any]) -> None:
    made = MADE[kind]()
    tokenizer = wrap(made)
    chat = Example(
        (
            Turn("user", "Hi?"),
            Turn("assistant", "Yes"),
            Turn("user", "the river"),
            Turn("assistant", "the bridge"),
        )
    )
    (one,) = encode_examples([chat], tokenizer, seq_len=999, mask_prompt=True)
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi?\n\n### Response:\nYes\n\n"
        "### Instruction:\nthe river\n\n### Response:\nthe bridge"
    )
    assert one.input_ids.tolist() == tokenizer(text)["input_ids"]
    assert learned(one, tokenizer) == "Yesthe bridge</s>"
    made.chat_template = TEMPLATE
    (one,) = encode_examples([chat], tokenizer, seq_len=999, mask_prompt=True)
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
    assert one.input_ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    assert learned(one, tokenizer) == "Yes</s>the bridge</s>"


def test_a_template_that_rewrites_earlier_turns() -> None:
    # Thinking models open a thought for generation, and close it empty in what was said.
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}[]{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>[{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    turns = (*CHAT.turns, Turn("assistant", "No."))
    (one,) = encode_examples([Example(turns)], tokenizer, seq_len=500, mask_prompt=True)
    assert whole(one, tokenizer).endswith("<user>So?</s><assistant>[]No.</s>")
    assert learned(one, tokenizer).endswith("No.</s>")
    assert "Yes" not in learned(one, tokenizer)


@pytest.mark.parametrize("answer", ["of", "e", "sentence"])
def test_an_answer_that_is_a_part_of_what_ends_a_turn(answer: str) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content.split('</think>')[-1] }}<end of sentence>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    chat = Example((Turn("user", "So?"), Turn("assistant", answer)))
    tokenizer = chat_tokenizer(template)
    (one,) = encode_examples([chat], tokenizer, seq_len=500, mask_prompt=True)
    assert learned(one, tokenizer) == f"{answer}<end of sentence>"


def test_what_a_system_says_where_the_template_knows_none() -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}"
    template += "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    told = (Turn("system", "Be brief."), Turn("user", "Hi?"), Turn("assistant", "Yes."))
    tokenizer = chat_tokenizer(template)
    (one,) = encode_examples([Example(told)], tokenizer, seq_len=500, mask_prompt=True)
    assert whole(one, tokenizer) == "<user>Be brief.\n\nHi?</s><assistant>Yes.</s>"


def test_what_is_not_answered_is_left_out_of_the_alpaca_prompt() -> None:
    tokenizer = tiny_tokenizer()
    (one,) = encode_examples([CHAT], tokenizer, seq_len=500, mask_prompt=True)
    assert learned(one, tokenizer) == "Yes.</s>"
    assert "So?" not in whole(one, tokenizer)


def test_a_space_before_an_answer() -> None:
    # Where it stands alone it is the prompt's, and where it is a part of a word the answer's.
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% endif %}{% endfor %}"
    )
    for trims in (True, False):
        tokenizer = byte_level()
        tokenizer.chat_template = template
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.ByteLevel(trim_offsets=trims)
        chat = Example((Turn("user", "Hi"), Turn("assistant", "\nthe bridge")))
        (one,) = encode_examples([chat], tokenizer, seq_len=99, mask_prompt=True)
        assert learned(one, tokenizer) == "\nthe bridge"
        chat = Example((Turn("user", "Hi"), Turn("assistant", "the bridge")))
        (one,) = encode_examples([chat], tokenizer, seq_len=99, mask_prompt=True)
        assert learned(one, tokenizer).strip() == "the bridge"


def test_templates_that_are_refused() -> None:
    with pytest.raises(UserError, match="has no chat template; use --set template=alpaca"):
        encode_examples([CHAT], tiny_tokenizer(), seq_len=99, template="chat")
    strict = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"rejects a chat \(roles must alternate\); use --set"):
        encode_examples([CHAT], strict, seq_len=99)
    with pytest.raises(UserError, match="within 8 tokens; use a longer seq_len or leave --mask"):
        encode_examples([CHAT], tiny_tokenizer(), seq_len=8, mask_prompt=True)


def test_a_chat_that_is_rejected_is_named(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [turns[0], *turns]}]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows)).examples
    strict = "{% if messages|length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    said = r"^rows.jsonl: record 2: the tokenizer's chat template rejects a chat \(roles must"
    with pytest.raises(UserError, match=said):
        encode_examples(examples, chat_tokenizer(strict + TEMPLATE), seq_len=99)


def test_text_is_cut_into_windows_that_miss_nothing() -> None:
    tokenizer = tiny_tokenizer()
    text = (WORDS * 4)[:250]
    found = encode_examples([Example(text=text)], tokenizer, seq_len=64)
    assert "".join(whole(one, tokenizer) for one in found) == text + "</s>"
    assert [len(one) for one in found] == [64, 64, 64, 59]
    assert all(one.targets == len(one) - 1 for one in found)


def test_held_out_examples_are_never_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"number {n % 60} {WORDS}"} for n in range(100)]  # 40 are there twice
    examples = load_examples(write(tmp_path / "rows.jsonl", rows))
    tokenizer = tiny_tokenizer()
    made = split_samples(examples, tokenizer, seq_len=200, seed=1)
    assert (len(made.train), len(made.held_out)) == (57, 3)
    spelled = [{whole(one, tokenizer) for one in part} for part in (made.train, made.held_out)]
    assert not spelled[0] & spelled[1]
    again = split_samples(examples, tokenizer, seq_len=200, seed=1)
    assert fingerprint_samples(again.train) == fingerprint_samples(made.train)
    other = split_samples(examples, tokenizer, seq_len=200, seed=2)
    assert fingerprint_samples(other.train) != fingerprint_samples(made.train)
    few = split_samples(examples, tokenizer, seq_len=200, limit=30, held_out=10)
    assert (len(few.train), len(few.held_out)) == (20, 10)
    with pytest.raises(UserError, match="gives 60 samples and 60 of them are to be held out"):
        split_samples(examples, tokenizer, seq_len=200, held_out=60)


@pytest.mark.parametrize("count", [15, 40])
def test_what_is_alike_as_far_as_it_is_read_is_not_trained_on(count: int) -> None:
    """Texts that begin alike, as code of one licence does, and chats that the length cuts."""
    tokenizer = tiny_tokenizer()
    rows = tuple(Example(text=f"{'x' * 31}{n:3}{n + 1:29}") for n in range(count))
    made = split_samples(Examples(rows, "a", None), tokenizer, seq_len=32)
    spelled = [{one.input_ids.tobytes() for one in part} for part in (made.train, made.held_out)]
    assert spelled[0]
    assert not spelled[0] & spelled[1]
    made = split_samples(Examples(rows, "a", None), tokenizer, seq_len=32, held_out=count // 2)
    assert made.train
    alike = tuple(Example(text=f"{'x' * 31}{n:3}") for n in range(count))
    made = split_samples(Examples(alike, "a", None), tokenizer, seq_len=32)
    assert made.train


def test_of_long_texts_that_are_held_out_the_beginnings_are_scored() -> None:
    texts = ([f"{1000 * n + place:06}" for place in range(160)] for n in range(60))
    rows = tuple(Example(text=" ".join(text)) for text in texts)
    made = split_samples(Examples(rows, "a", None), tiny_tokenizer(), seq_len=9)
    each = len(made.train) // 57
    assert each > 85
    assert len(made.held_out) == 3 * 85
    few = split_samples(Examples(rows, "a", None), tiny_tokenizer(), seq_len=9, held_out=50)
    assert (len(few.train), len(few.held_out)) == (10 * each, 50 * 5)


def test_examples_with_nothing_to_learn_are_not_held_out() -> None:
    # The question of every second one leaves no room for an answer.
    rows = tuple(
        Example((Turn("user", f"{n} " * (100 if n % 2 else 1)), Turn("assistant", "yes")))
        for n in range(40)
    )
    how: dict[str, Any] = {"seq_len": 300, "mask_prompt": True, "held_out": 1}
    for seed in range(4):
        made = split_samples(Examples(rows, "rows", None), tiny_tokenizer(), seed=seed, **how)
        assert (len(made.train), len(made.held_out)) == (19, 1)


def test_held_out_samples_as_windows() -> None:
    def samples(*lengths: int) -> Samples:
        held_out = [make_sequence([n] * n, [True] * n, 0) for n in lengths]
        return Samples("text", None, [], held_out)

    assert held_out_windows([samples(3, 5), samples(4)], 4).tolist() == [
        [3, 3, 3, 5],
        [5, 5, 5, 5],
        [4, 4, 4, 4],
    ]
    assert held_out_windows([samples(3)], 512).tolist() == [[3, 3, 3]]
    assert held_out_windows([samples(30_000), samples(9)], 4096).shape == (2, 4096)


def test_text_of_the_model_is_written_once_and_continued(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first = self_made_samples(model, tokenizer, tmp_path, seq_len=8, limit=70, seed=2)
    assert (len(first.train), len(first.held_out)) == (67, 3)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "8-2-00001.safetensors").unlink()  # as if it had been killed while writing it
    again = self_made_samples(model, tokenizer, tmp_path, seq_len=8, limit=70, seed=2)
    assert fingerprint_samples(again.train) == fingerprint_samples(first.train)

    def fail(*args: object, **keywords: object) -> None:
        raise AssertionError("the model wrote again")

    model.forward = fail  # type: ignore[method-assign]
    kept = self_made_samples(model, tokenizer, tmp_path, seq_len=8, limit=70, seed=2)
    assert fingerprint_samples(kept.held_out) == fingerprint_samples(first.held_out)
