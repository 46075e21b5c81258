"""Records out of local files (``.txt``, ``.jsonl``, ``.json``, ``.parquet``) and hub datasets.

Among them the seven zero-shot tasks of the paper as local JSON lines, checked record by record.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded
from llm_pruner.runtime.progress import quiet
from llm_pruner.settings.words import LOCAL_TASKS

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_KNOWN = ".txt, .jsonl, .json or .parquet"
_FOREIGN = (".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow")
"""Suffixes of other files, which no dataset of the hub is meant by."""

CHATS = ("messages", "conversations")
SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("instruction", "prompt", "question", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
"""Names of the fields of chats, and of instructions with their answers."""

_ROWS = ("data", "documents", "examples", "rows", "samples", "texts", "train")
"""Names under which an object holds all of a dataset."""

BEGINNING = 1000
"""Rows that say whether a dataset can be read, and what its fields mean."""


class NoFieldError(UserError):
    """Records have no field of the name that was asked for; those of another source may."""


def read_rows(path: Path) -> Iterator[Any]:
    """Return the records of a file as they are; a ``.txt`` file is one record, its text."""
    suffix = path.suffix.lower()
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        raise UserError(
            f"{path} was written by save_to_disk of datasets; write one file with its "
            "to_parquet or to_json, and give that"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one text file in it ({_KNOWN})")
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path of the text file")
    if suffix not in SUFFIXES:
        raise UserError(f"{path} has the unknown type {suffix!r}; use {_KNOWN}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with text in it")
    if suffix == ".txt":
        return iter((_decode(path),))
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".jsonl":
        return (row for _, row in json_lines(path))
    return _json_rows(path)


def texts_of_rows(rows: Iterable[Any], name: str, text_field: str | None) -> Iterator[str]:
    """Yield the text of each row, a string or a mapping; one decides the field, see `deciding`."""
    rest = iter(rows)
    begin = [*islice(rest, BEGINNING)]
    fields: tuple[str, ...] | None = None
    for number, row in enumerate(chain(begin, rest), start=1):
        if isinstance(row, str) and text_field is None:
            yield row
            continue
        if not isinstance(row, Mapping):
            kind = NoFieldError if isinstance(row, str) and number == 1 else UserError
            raise kind(
                f"{name}: record {number} is {_kind(row)}; each record must be an object with a "
                "string field"
            )
        fields = fields or _text_fields(deciding(begin) or row, name, text_field)
        # The "system" and "input" of an instruction may be empty or left out.
        values = {field: row.get(field) for field in fields if len(fields) == 1 or row.get(field)}
        for field, value in values.items():
            if text_field is None and field in CHATS and isinstance(value, (list, tuple)):
                values[field] = "\n\n".join(_said(value, f"{name}: record {number}"))
            elif not isinstance(value, str):
                raise UserError(
                    f"{name}: field {field!r} of record {number} is {_kind(value)}, not a string; "
                    "repair the record or name another field with --text-field"
                )
        yield "\n\n".join(map(str, values.values()))


def deciding(rows: Sequence[Any]) -> Mapping[str, Any] | None:
    """Return the first record with something in most fields, which tell all; None if no object."""
    records = [row for row in rows if isinstance(row, Mapping) and row]
    filled = [sum(not _is_empty(value) for value in row.values()) for row in records]
    return records[filled.index(max(filled))] if records else None


def _is_empty(value: Any) -> bool:
    """Whether a field says nothing of what it holds; a text says that it is one."""
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


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


def _said(messages: Any, where: str) -> Iterator[str]:
    for message in messages:
        known = message if isinstance(message, Mapping) else {}
        content = known.get("content", known.get("value"))
        if not isinstance(content, str):
            raise UserError(
                f"{where} has a message whose text is {_kind(content)}; repair or remove the record"
            )
        yield content


def _known_fields(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the fields that hold the text of a record by their names; None if none do."""
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
    if text_field is not None:
        if text_field not in row:
            raise NoFieldError(
                f"{name} has no field {text_field!r}; its fields are {', '.join(map(str, row))}"
            )
        return (text_field,)
    if (known := _known_fields(row)) is not None:
        return known
    texts = [field for field, value in row.items() if isinstance(value, str)]
    if texts in ([one] for one in QUESTIONS):
        for field in ANSWERS:
            if row.get(field) is not None:
                raise UserError(
                    f"{name} has beside {texts[0]!r} a field {field!r} that is "
                    f"{_kind(row[field])}, not a string; write it as text, or name the field of "
                    "the text with --text-field"
                )
    if not texts:
        raise UserError(
            f"{name} has no string field (fields: {', '.join(map(str, row)) or 'none'}); "
            "name the text field with --text-field or give a file with text"
        )
    if len(texts) > 1:
        raise UserError(
            f"{name} has several string fields ({', '.join(texts)}); name the one that holds the "
            "text with --text-field, or call it text"
        )
    return (texts[0],)


def _decode(path: Path) -> str:
    try:
        # utf-8-sig drops a byte order mark; text mode turns every line end into "\n".
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise UserError(f"{path} holds zero bytes, so it is no text; give a UTF-8 text file")
    return text


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of a file that is not blank."""
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, _parsed(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is no JSON ({error}); write one JSON object per line"
            ) from None


def _parsed(text: str) -> Any:
    """Return the value of JSON; half a surrogate pair, which no text can hold, is replaced."""
    value = json.loads(text)
    return _without_halves(value) if _HALF.search(text) else value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_without_halves(one) for one in value]
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(one) for key, one in value.items()}
    return value


def _wrapped(record: Mapping[str, Any], key: str, rows: list[Any]) -> list[Any]:
    """Return the records or texts that an object holds in its only list, or the object as one."""
    if _known_fields(record) is None:
        if rows and all(isinstance(row, dict) for row in rows):
            return rows
        # A list of tags stands beside a text.
        alone = key in _ROWS or not any(isinstance(value, str) for value in record.values())
        if alone and all(isinstance(row, str) for row in rows):
            return rows
    return [record]


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        content = _parsed(_decode(path))
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            yield from (row for _, row in json_lines(path))  # JSON lines under the name .json
            return
        raise UserError(f"{path} is no JSON ({error}); write a list of objects") from None
    if isinstance(content, dict):
        lists = [(key, value) for key, value in content.items() if isinstance(value, list)]
        content = _wrapped(content, *lists[0]) if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise UserError(f"{path} holds {_kind(content)}; write a list of objects")
    yield from content


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no readable Parquet file ({reason})") from None


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


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
    """Whether a source is a file: a name such as ``owner/data`` may also be a local folder.

    Beside a folder of that name, ``code`` and the like stay what they are: no folder is read.
    """
    path = expanded(source)
    return (
        (os.path.exists(path) and not (path.is_dir() and source.partition(":")[0] in _ALIASES))
        or path.suffix.lower() in (*SUFFIXES, *_FOREIGN)
        or source.startswith((".", "/", "~"))
        or "\\" in source
    )


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

    With a limit a dataset is streamed, so that only its beginning is downloaded; a local file is
    read whole, so that a broken line far down shows before any work. The split of a dataset is by
    default ``train``, that of a file None. Raises UserError if it cannot be had, as ``read_rows``.
    """
    if is_file_name(source):
        file = expanded(source)
        return file.name, None, read_rows(file)
    if not _NAME.fullmatch(source):
        shown = source if len(source) <= 80 else f"{source[:80]}..."
        raise UserError(
            f"{shown!r} is neither a local file nor a dataset name; use the path of a {_KNOWN} "
            f"file, a hub name, or one of {', '.join(_ALIASES)}"
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
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"dataset {source!r}: tried hub dataset {name}, split {split}, and failed "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a local "
            f"{_KNOWN} file"
        ) from error


Record = dict[str, Any]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _are_choices(value: Any, _: Record) -> bool:
    if not isinstance(value, dict):
        return False
    texts, labels = value.get("text", ()), value.get("label", ())
    return _are_texts(texts) and _are_texts(labels) and len(texts) == len(labels)


def _is_position(value: Any, record: Record) -> bool:
    return not isinstance(value, bool) and str(value) in map(str, range(len(record["endings"])))


Field = tuple[str, Callable[[Any, Record], bool]]
"""What a field must be, in words, and (value, record) -> whether it is."""

_TEXT: Field = ("a string", lambda value, _: isinstance(value, str))
_BINARY: Field = ("0 or 1", lambda value, _: type(value) is int and value in (0, 1))
_CHOICES: Field = ("an object of two lists, text and label", _are_choices)
_LABEL: Field = ("one of the labels", lambda value, record: value in record["choices"]["label"])
_SCHEMAS: dict[str, dict[str, Field]] = {
    "boolq": {"passage": _TEXT, "question": _TEXT, "label": _BINARY},
    "piqa": {"goal": _TEXT, "sol1": _TEXT, "sol2": _TEXT, "label": _BINARY},
    "hellaswag": {
        "activity_label": _TEXT,
        "ctx_a": _TEXT,
        "ctx_b": _TEXT,
        "endings": ("a list of strings", lambda value, _: _are_texts(value)),
        "label": ("the position of the right ending", _is_position),
    },
    "winogrande": {
        "sentence": (
            "a string with one _",
            lambda value, _: isinstance(value, str) and value.count("_") == 1,
        ),
        "option1": _TEXT,
        "option2": _TEXT,
        "answer": ('"1" or "2"', lambda value, _: value in ("1", "2")),
    },
    "arc_easy": {"question": _TEXT, "choices": _CHOICES, "answerKey": _LABEL},
    "arc_challenge": {"question": _TEXT, "choices": _CHOICES, "answerKey": _LABEL},
    "openbookqa": {"question_stem": _TEXT, "choices": _CHOICES, "answerKey": _LABEL},
}
"""Fields of the local forms of the tasks; they are checked in order."""

_SKILLS: dict[str, tuple[str, dict[str, Field]]] = {
    "humaneval": (
        "human_eval",
        {"task_id": _TEXT, "prompt": _TEXT, "entry_point": _TEXT, "test": _TEXT},
    ),
    "gsm8k": ("gsm8k", {"question": _TEXT, "answer": _TEXT}),
}
"""Names of the files of the skills, and their fields."""


def read_task(folder: Path, task: str) -> list[Record]:
    """Return the records of ``<task>.jsonl`` in a folder, with the fields of the task and no other.

    Fields and their meaning are those of the datasets that lm-evaluation-harness reads. Raises
    UserError if the task is none of ``LOCAL_TASKS``, or a line is not what it should be.
    """
    if task not in _SCHEMAS:
        raise UserError(
            f"task {task!r} has no local form; offline there are {', '.join(LOCAL_TASKS)}; "
            "leave --tasks-data out to fetch its data"
        )
    return _records(folder, task, task, _SCHEMAS[task])


def read_skill(folder: Path, skill: str) -> list[Record]:
    """Return the records of ``human_eval.jsonl`` or ``gsm8k.jsonl`` in a folder, by the skill."""
    name, schema = _SKILLS[skill]
    return _records(folder, name, skill, schema)


def _records(folder: Path, name: str, task: str, schema: dict[str, Field]) -> list[Record]:
    folder = expanded(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds {name}.jsonl")
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; put the task's records there or leave {task} out")
    records = [_checked(record, task, schema, path, line) for line, record in json_lines(path)]
    if not records:
        raise UserError(f"{path} is empty; write one JSON object per line")
    return records


def _checked(record: Any, task: str, schema: dict[str, Field], path: Path, line: int) -> Record:
    where = f"{path}: line {line}"
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object; write one with {', '.join(schema)}")
    for field in schema:
        if field not in record:
            raise UserError(f"{where} has no {field!r}; a {task} record has {', '.join(schema)}")
    for field, (meaning, is_such) in schema.items():
        if not is_such(record[field], record):
            raise UserError(f"{where}: {field!r} is not {meaning}; repair the record")
    # Copies of HellaSwag have numbers or texts.
    return {
        field: str(record[field]) if field == "label" and task == "hellaswag" else record[field]
        for field in schema
    }
