"""The seven zero-shot tasks of the paper as local JSON lines, checked record by record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_pruner.data.files import json_lines
from llm_pruner.errors import UserError
from llm_pruner.settings.words import LOCAL_TASKS

Record = dict[str, Any]

_TEXT = "a string"
_BINARY = "0 or 1"
_SCHEMAS: dict[str, dict[str, str]] = {
    "boolq": {"passage": _TEXT, "question": _TEXT, "label": _BINARY},
    "piqa": {"goal": _TEXT, "sol1": _TEXT, "sol2": _TEXT, "label": _BINARY},
    "hellaswag": {
        "activity_label": _TEXT,
        "ctx_a": _TEXT,
        "ctx_b": _TEXT,
        "endings": "a list of strings",
        "label": "the position of the right ending",
    },
    "winogrande": {
        "sentence": "a string with one _",
        "option1": _TEXT,
        "option2": _TEXT,
        "answer": '"1" or "2"',
    },
    "arc_easy": {
        "question": _TEXT,
        "choices": "an object of two lists, text and label",
        "answerKey": "one of the labels",
    },
    "openbookqa": {
        "question_stem": _TEXT,
        "choices": "an object of two lists, text and label",
        "answerKey": "one of the labels",
    },
}
_SCHEMAS["arc_challenge"] = _SCHEMAS["arc_easy"]


def read_task(folder: Path, task: str) -> list[Record]:
    """Return the records of ``<task>.jsonl`` in a folder, with the fields of the task and no other.

    Fields and their meaning are those of the datasets that lm-evaluation-harness reads.

    Raises:
        UserError: the task is none of ``LOCAL_TASKS``, the file is missing or empty, or a line
            lacks a field or holds something else in it.
    """
    if task not in _SCHEMAS:
        raise UserError(
            f"task {task!r} has no local form; offline there are {', '.join(LOCAL_TASKS)}; "
            "leave --tasks-data out to fetch its data"
        )
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds {task}.jsonl")
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; put the task's records there or leave {task} out")
    records = [_checked(record, task, path, line) for line, record in json_lines(path)]
    if not records:
        raise UserError(f"{path} is empty; write one JSON object per line")
    return records


def _checked(record: Any, task: str, path: Path, line: int) -> Record:
    schema = _SCHEMAS[task]
    where = f"{path}: line {line}"
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is no JSON object; write one with {', '.join(schema)}")
    for field in schema:
        if field not in record:
            raise UserError(f"{where} has no {field!r}; a {task} record has {', '.join(schema)}")
    for field, meaning in schema.items():
        if not _CHECKS[meaning](record[field], record):
            raise UserError(f"{where}: {field!r} is not {meaning}; repair the record")
    kept = {field: record[field] for field in schema}
    if task == "hellaswag":
        kept["label"] = str(kept["label"])  # copies of the dataset have either
    return kept


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _are_choices(value: Any, _: Mapping[str, Any]) -> bool:
    if not isinstance(value, Mapping):
        return False
    texts, labels = value.get("text", ()), value.get("label", ())
    return _are_texts(texts) and _are_texts(labels) and len(texts) == len(labels)


def _is_position(value: Any, record: Mapping[str, Any]) -> bool:
    return not isinstance(value, bool) and str(value) in map(str, range(len(record["endings"])))


_CHECKS: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    _TEXT: lambda value, _: isinstance(value, str),
    _BINARY: lambda value, _: type(value) is int and value in (0, 1),
    "a list of strings": lambda value, _: _are_texts(value),
    "the position of the right ending": _is_position,
    "a string with one _": lambda value, _: isinstance(value, str) and value.count("_") == 1,
    '"1" or "2"': lambda value, _: value in ("1", "2"),
    "an object of two lists, text and label": _are_choices,
    "one of the labels": lambda value, record: value in record["choices"]["label"],
}
"""What a field must be -> (value, record) -> whether it is; fields are checked in order."""
