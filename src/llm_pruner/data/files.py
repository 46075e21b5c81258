"""Records out of local files (``.txt``, ``.jsonl``, ``.json``, ``.parquet``) and hub datasets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError, in_short
from llm_pruner.files.disk import expanded
from llm_pruner.runtime.progress import quiet
from llm_pruner.settings.words import LOCAL_TASKS

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_KNOWN = ".txt, .jsonl, .json or .parquet"

CHATS = ("messages", "conversations")
SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("instruction", "prompt", "question", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
"""Names of the fields of chats, and of instructions with their answers."""

BEGINNING = 1000
"""Rows that decide which fields hold the text of a dataset."""


class NoFieldError(UserError):
    """The records have no field of the name that was asked for."""


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the records of a file as they are; a ``.txt`` file is one record, its text."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; give one {_KNOWN} file")
    if suffix not in SUFFIXES:
        raise UserError(f"{path} has the unknown type {suffix!r}; use {_KNOWN}")
    if suffix == ".txt":
        yield _text_of(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix == ".jsonl":
        yield from (row for _, row in json_lines(path))
    else:
        yield from _json_rows(path)


def _text_of(path: Path) -> str:
    try:
        # utf-8-sig drops a byte order mark; text mode turns every line end into "\n".
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a UTF-8 text") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of a file that is not blank."""
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is no JSON ({error}); write one JSON object per line"
            ) from None


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        content = json.loads(_text_of(path))
    except ValueError:  # maybe JSON lines under the name .json
        yield from (row for _, row in json_lines(path))
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 and _known_fields(content) is None else []
        # An object may hold all records in its only list.
        content = rows if rows and all(isinstance(row, dict) for row in rows) else [content]
    yield from content if isinstance(content, list) else [content]


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable Parquet file ({in_short(error)})") from None


def texts_of_rows(rows: Iterable[Any], name: str, text_field: str | None) -> Iterator[str]:
    """Yield the text of each row, a string or a mapping; see ``load_documents`` for the fields."""
    rest = iter(rows)
    begin = [*islice(rest, BEGINNING)]
    fields: tuple[str, ...] = ()
    for number, row in enumerate(chain(begin, rest), start=1):
        if isinstance(row, str):
            yield row
            continue
        row = row if isinstance(row, Mapping) else {}
        fields = fields or _text_fields(deciding(begin) or row, name, text_field)
        # Of several fields, such as an instruction's "input", some may be empty or left out.
        given = [field for field in fields if len(fields) == 1 or row.get(field)]
        texts = [_text_in(row.get(field), text_field is None) for field in given]
        if None in texts:
            raise UserError(
                f"{name}: field {given[texts.index(None)]!r} of record {number} holds no text; "
                "repair the record, or name another field with --set text_field"
            )
        yield "\n\n".join(map(str, texts))


def _text_in(value: Any, of_chat: bool) -> str | None:
    if isinstance(value, list) and of_chat:
        messages = [one if isinstance(one, Mapping) else {} for one in value]
        said = [one.get("content", one.get("value")) for one in messages]
        return "\n\n".join(said) if all(isinstance(one, str) for one in said) else None
    return value if isinstance(value, str) else None


def deciding(rows: Sequence[Any]) -> Mapping[str, Any] | None:
    """Return the first record with most filled fields, which stands for all; None if no object."""
    records = [row for row in rows if isinstance(row, Mapping) and row]
    filled = [sum(value not in (None, [], {}) for value in row.values()) for row in records]
    return records[filled.index(max(filled))] if records else None


def chat_field(row: Mapping[str, Any]) -> str | None:
    """Return the field of a record that holds a chat, a list of messages; None if none does."""
    for field in CHATS:
        value = row.get(field)
        messages = value if isinstance(value, (list, tuple)) else ()
        marks = [isinstance(one, Mapping) and bool({"role", "from"} & {*one}) for one in messages]
        if marks and all(marks):
            return field
    return None


def answer_fields(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the fields of a record that hold an instruction and its answer; None if none do."""
    for pair in product(QUESTIONS, ANSWERS):
        if pair[0] in CONTEXTS and isinstance(row.get("text"), str):
            continue
        if all(isinstance(row.get(field), str) for field in pair):
            return pair
    return None


def _known_fields(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    if isinstance(row.get("text"), str):
        return ("text",)
    if (chat := chat_field(row)) is not None:
        return (chat,)
    if (pair := answer_fields(row)) is not None:
        given = [name for name in CONTEXTS if name != pair[0]]
        names = (*SYSTEMS, pair[0], *given, pair[1])
        return tuple(name for name in names if isinstance(row.get(name, ""), str | None))
    return None


def _text_fields(row: Mapping[str, Any], name: str, text_field: str | None) -> tuple[str, ...]:
    fields = ", ".join(map(str, row)) or "none"
    if text_field is not None:
        if text_field not in row:
            raise NoFieldError(f"{name} has no field {text_field!r}; its fields are {fields}")
        return (text_field,)
    if (known := _known_fields(row)) is not None:
        return known
    texts = [field for field, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise UserError(
            f"{name} does not show which field holds its text (fields: {fields}); name it with "
            "--set text_field, or call it text"
        )
    return (texts[0],)


@dataclass(frozen=True)
class _Alias:
    """Where a dataset of the literature is found today, without a loading script."""

    path: str
    config: str | None = None
    files: str | None = None
    endless: bool = False
    field: str | None = None


_ALIASES = {
    "wikitext2": _Alias("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # The repository holds a script, which datasets no longer runs; its Parquet copy is read.
    "ptb": _Alias(
        "ptb-text-only/ptb_text_only",
        files="hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/"
        "penn_treebank/{split}/0000.parquet",
    ),
    "c4": _Alias("allenai/c4", "en", endless=True),
    "bookcorpus": _Alias("rojagtap/bookcorpus", endless=True),
    "wikipedia": _Alias("wikimedia/wikipedia", "20231101.en", endless=True),
    "code": _Alias("codeparrot/codeparrot-clean-valid", endless=True, field="content"),
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def is_file_name(source: str) -> bool:
    """Whether a source is a file; a hub dataset may have the name of a local folder."""
    path = expanded(source)
    named = path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~"))
    return named or os.path.isfile(path)


def field_of(source: str) -> str | None:
    """Return the field of a known hub dataset that holds its text; None where that shows."""
    alias = _ALIASES.get(source.partition(":")[0])
    return None if alias is None or is_file_name(source) else alias.field


def is_endless(source: str) -> bool:
    """Whether a hub dataset is too large to be read whole."""
    alias = _ALIASES.get(source.partition(":")[0])
    return alias is not None and alias.endless


def read_source(
    source: str, *, split: str | None = None, limit: int | None = None
) -> tuple[str, str | None, Iterable[Any]]:
    """Return (name, split, rows) of a local file, see ``read_rows``, or of a hub dataset.

    With a limit a dataset is streamed, so that only its beginning is downloaded. The split of a
    dataset is by default ``train``, that of a file None.
    """
    if is_file_name(source):
        file = expanded(source)
        return file.name, None, read_rows(file)
    if not _NAME.fullmatch(source):
        raise UserError(
            f"{source[:80]!r} is neither a local file nor a dataset name; use the path of a "
            f"{_KNOWN} file, a hub name, or one of {', '.join(_ALIASES)}"
        )
    if limit is None and is_endless(source):
        raise UserError(f"dataset {source!r} is too large to read whole; set a limit")
    from datasets import load_dataset  # takes a second

    split = split or "train"
    path, _, config = source.partition(":")
    alias = _ALIASES.get(path, _Alias(path))
    where = [alias.path, config or alias.config]
    name = " ".join(filter(None, where))
    options: dict[str, Any] = {"split": split, "streaming": limit is not None}
    if alias.files is not None:
        where, options["data_files"] = ["parquet"], {split: alias.files.format(split=split)}
    try:
        # Its retries are said line by line; the error below says it all.
        with quiet("huggingface_hub", warned=None):
            return name, split, tuple(islice(load_dataset(*where, **options), limit))
    except Exception as error:  # hub, network and dataset errors share no base class
        raise UserError(
            f"dataset {source!r}: tried hub dataset {name}, split {split}, and failed "
            f"({in_short(error)}); check the name and the network, or give a local {_KNOWN} file"
        ) from error


Record = dict[str, Any]

_CHOICE = ("question", "choices", "answerKey")
_TASKS = {
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": _CHOICE,
    "arc_challenge": _CHOICE,
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
"""Fields of the local forms of the tasks: those of the datasets that the harness reads."""

_SKILLS = {
    "humaneval": ("human_eval", ("task_id", "prompt", "entry_point", "test")),
    "gsm8k": ("gsm8k", ("question", "answer")),
}
"""Names of the files of the skills, and their fields."""


def read_task(folder: Path, task: str) -> list[Record]:
    """Return the records of ``<task>.jsonl`` in a folder, with the fields of the task alone."""
    if task not in _TASKS:
        raise UserError(
            f"task {task!r} has no local form; offline there are {', '.join(LOCAL_TASKS)}; "
            "leave tasks_data out to fetch its data"
        )
    records = _records(folder, task, _TASKS[task])
    if task == "hellaswag":  # copies of it have numbers or texts
        records = [{**one, "label": str(one["label"])} for one in records]
    return records


def read_skill(folder: Path, skill: str) -> list[Record]:
    """Return the records of ``human_eval.jsonl`` or ``gsm8k.jsonl`` in a folder, by the skill."""
    return _records(folder, *_SKILLS[skill])


def _records(folder: Path, name: str, fields: Sequence[str]) -> list[Record]:
    path = expanded(folder) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder that holds it")
    records: list[Record] = []
    for line, found in json_lines(path):
        lacking = [one for one in fields if not isinstance(found, dict) or one not in found]
        if lacking:
            raise UserError(
                f"{path}: line {line} has no {lacking[0]!r}; a record has {', '.join(fields)}"
            )
        records.append({field: found[field] for field in fields})
    if not records:
        raise UserError(f"{path} is empty; write one JSON object per line")
    return records
