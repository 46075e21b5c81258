"""Documents from files and from the hub, and how evaluation text is joined."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_pruner.data.text import (
    DEMO_PROMPTS,
    Documents,
    EvaluationText,
    demo_text,
    load_documents,
    load_evaluation_text,
    read_each,
    record_format,
)
from llm_pruner.errors import UserError
from llm_pruner.settings.evaluate import PerplexitySettings


def evaluation_text(source: str, **asked: Any) -> EvaluationText:
    return load_evaluation_text(source, PerplexitySettings(**asked))


def write(path: Path, content: str) -> str:
    path.write_bytes(content.encode("utf-8"))
    return str(path)


def test_plain_text_is_one_document_and_lines_are_its_records(tmp_path: Path) -> None:
    documents = load_documents(write(tmp_path / "a.txt", "\ufeffone\x85still\r\n\ntwo"))
    assert documents.texts == ("one\x85still\n\ntwo",)
    assert documents.raw == "one\x85still\n\ntwo"
    assert documents.records == ("one\x85still\n", "\n", "two")
    assert documents.split is None


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_fields_of_records(tmp_path: Path, suffix: str) -> None:
    def texts(rows: list[dict[str, Any]], **options: Any) -> tuple[str, ...]:
        path = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif suffix == "json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        return load_documents(str(path), **options).texts

    assert texts([{"title": "t", "text": "a"}, {"title": "u", "text": "b"}]) == ("a", "b")
    assert texts([{"id": 1, "body": "a"}]) == ("a",)
    said = r"which field holds its text \(fields: id, body\); name it with --set text_field"
    with pytest.raises(UserError, match=said):
        texts([{"id": "1", "body": "a"}])
    assert texts([{"id": "1", "body": "a"}], text_field="body") == ("a",)
    # A field that is empty in the first record says nothing of the others.
    assert texts([{"id": 1, "body": None, "text": "a"}, {"id": 2, "body": "b", "text": "c"}]) == (
        *("a", "c"),
    )
    assert texts([{"text": "a", "more": "b"}], text_field="more") == ("b",)
    assert texts([{"text": str(n)} for n in range(5)], limit=2) == ("0", "1", "2", "3", "4")
    alpaca = [
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "say", "input": "", "output": "said"},
    ]
    assert texts(alpaca) == ("do\n\nthis\n\ndone", "say\n\nsaid")
    assert texts([{"id": "1", "prompt": "why", "response": "so"}]) == ("why\n\nso",)
    chats = [
        {"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}
    ]
    assert texts(chats) == ("a\n\nb",)
    shared = [{"id": "1", "conversations": [{"from": "human", "value": "a"}]}]
    assert texts(shared) == ("a",)
    with pytest.raises(UserError, match="field 'messages' of record 1 holds no text"):
        texts([{"messages": [{"role": "user", "content": None}]}])


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('["x", "y"]', ("x", "y")),
        ('{"version": 1, "data": [{"text": "x"}]}', ("x",)),
        ('{"content": "A long story", "tags": ["en", "tale"]}', ("A long story",)),
        ('{"messages": [], "question": "q", "answer": "a", "context": {"of": ["x"]}}', ("q\n\na",)),
        ('{"text": "x", "tags": [{"a": "b"}]}', ("x",)),
        ('{"messages": [{"role": "u", "content": "x"}]}', ("x",)),
        ('{"conversations": [{"messages": [{"role": "user", "content": "x"}]}]}', ("x",)),
        ('{"text": "x"}\n{"text": "y"}\n', ("x", "y")),
    ],
)
def test_other_json_shapes(tmp_path: Path, content: str, texts: tuple[str, ...]) -> None:
    assert load_documents(write(tmp_path / "a.json", content)).texts == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b"fine\xff", r"cannot be read .*can't decode byte 0xff .*; give a UTF-8 text"),
        ("a.csv", b"x,y", "unknown type '.csv'; use .txt, .jsonl, .json or .parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"id": 3}', "'text' of record 2 holds no text"),
        ("a.jsonl", b'{"url": "x"}\n{"url": "y", "text": "z"}', "'text' of record 1 holds no text"),
        ("a.jsonl", b'{"id": 1, "score": 0.5}', r"holds its text \(fields: id, score\)"),
        ("a.json", b"{nope", "is no JSON"),
        ("a.json", b"[3]", r"holds its text \(fields: none\)"),
        ("a.json", b"[]", "holds no text"),
        ("a.parquet", b"PAR1 broken", "no readable Parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "how", "message"),
    [
        ("gone.txt", {}, r"gone\.txt does not exist"),
        ("./", {}, "is no file; give one .txt, .jsonl"),
        ("a.jsonl", {"text_field": "body"}, "no field 'body'; its fields are text"),
        ("two words", {}, "neither a local file nor a dataset name"),
        ("self", {}, "cannot be used here"),
        ("c4", {}, "too large to read whole"),
    ],
)
def test_bad_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, how: Any, message: str
) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_documents(source, **how)


class FakeHub:
    """Stands in for the package datasets and records what is asked of it."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error, self.calls = rows, error, []

    def load_dataset(self, *args: Any, **keywords: Any) -> list[dict[str, Any]]:
        self.calls.append((args, keywords))
        if self.error is not None:
            raise self.error
        return self.rows


def install(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    module = types.ModuleType("datasets")
    module.load_dataset = hub.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, FakeHub([{"sentence": "a"}, {"sentence": "b"}]))
    documents = load_documents("owner/data:part", split="dev", limit=1)
    assert documents.texts == ("a",)
    assert (documents.name, documents.split) == ("owner/data part", "dev")
    load_documents("wikitext2")
    evaluation_text("ptb", protocol="paper")
    evaluation_text("ptb", protocol="standard")
    first, second, third, fourth = hub.calls
    assert first == (("owner/data", "part"), {"split": "dev", "streaming": True})
    assert second[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert second[1] == {"split": "train", "streaming": False}
    assert third[1]["data_files"]["validation"].endswith("penn_treebank/validation/0000.parquet")
    assert fourth[1]["split"] == "test"


@pytest.mark.parametrize("name", ["c4", "bookcorpus", "wikipedia", "code"])
def test_the_beginning_of_a_dataset_without_end_is_measured_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = "content" if name == "code" else "text"
    hub = install(monkeypatch, FakeHub([{"title": "t", field: str(n)} for n in range(2000)]))
    found = evaluation_text(name)
    assert found.split == ("validation" if name == "c4" else "train")
    assert found.text.startswith("0\n\n1\n\n2")
    assert len(found.text.split("\n\n")) == (2000 if name == "bookcorpus" else 1100)
    assert hub.calls[0][1]["streaming"] is True


def test_a_known_dataset_has_its_own_field_beside_that_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeHub([{"repo": "r", "content": "x = 1"}]))
    both = ("code", str(write(tmp_path / "a.jsonl", '{"body": "b", "id": "1"}')))

    def read(source: str, field: str | None) -> Documents:
        return load_documents(source, text_field=field, limit=9)

    found = read_each(read, both, "body")
    assert [one.texts for one in found.values()] == [("x = 1",), ("b",)]


def test_hub_failure_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHub([], ConnectionError("no route\nto host")))
    message = (
        r"dataset 'wikitext2': tried hub dataset Salesforce/wikitext wikitext-2-raw-v1, split "
        r"train, and failed \(ConnectionError: no route to host\); .* give a local .txt"
    )
    with pytest.raises(UserError, match=message):
        load_documents("wikitext2")


def test_wikitext_file_gives_the_text_of_the_hub_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = " \n = Title = \n \n A first paragraph . \n = = Part = = \n"
    expected = "\n\n = Title = \n\n\n\n\n A first paragraph . \n\n\n = = Part = = \n"
    rows = ["", " = Title = \n", "", " A first paragraph . \n", " = = Part = = \n"]
    assert "\n\n".join(rows) == expected
    name, split, text = evaluation_text(write(tmp_path / "any.txt", raw))
    assert (name, split, text) == ("any.txt", None, expected)
    install(monkeypatch, FakeHub([{"text": row} for row in rows]))
    assert evaluation_text("wikitext2")[1:] == ("test", expected)


def test_penn_treebank_joins_by_protocol(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", " the <unk> fell N points \n it was n't black monday \n")
    paper = evaluation_text(path, protocol="paper")[2]
    assert paper == "the <unk> fell N points\n\nit was n't black monday"
    standard = evaluation_text(path, protocol="standard")[2]
    assert standard == "the <unk> fell N points it was n't black monday"


def test_other_text_stays_as_it_is(tmp_path: Path) -> None:
    content = "A line.\n\n  Another = line =\n"
    assert evaluation_text(write(tmp_path / "t.txt", content))[2] == content
    rows = write(tmp_path / "t.jsonl", '{"text": "One."}\n{"text": "Two."}')
    assert evaluation_text(rows)[2] == "One.\n\nTwo."
    assert record_format(["all lower case\n", "and no mark\n"]) is None


def test_demo_text() -> None:
    text = demo_text()
    assert 1500 <= len(text.split()) <= 2500
    assert text.isascii()
    assert evaluation_text("demo") == ("demo text", None, text)
    assert all(prompt not in text for prompt in DEMO_PROMPTS)


def test_a_field_that_one_of_several_sources_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "two", "text": "three"}\n')
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]

    def read(source: str, text_field: str | None) -> str:
        return load_evaluation_text(source, PerplexitySettings(text_field=text_field)).text

    assert [one.strip() for one in read_each(read, sources, "body").values()] == ["one", "two"]
    with pytest.raises(UserError, match=r"a.jsonl has no field 'bdoy'; its fields are text"):
        read_each(read, sources, "bdoy")
    # What has no fields is none that has this one.
    (tmp_path / "c.txt").write_text("four")
    for other in ("demo", str(tmp_path / "c.txt")):
        with pytest.raises(UserError, match=r"a.jsonl has no field 'bdoy'"):
            read_each(read, [sources[0], other], "bdoy")
        assert len(read_each(read, [sources[0], other], "text")) == 2
