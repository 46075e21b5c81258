"""Examples to train on: instructions with answers, chats and plain text, from files and the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llm_pruner.data.files import (
    BEGINNING,
    CONTEXTS,
    SYSTEMS,
    answer_fields,
    chat_field,
    deciding,
    field_of,
    is_endless,
    read_source,
    texts_of_rows,
)
from llm_pruner.data.text import check_is_stored
from llm_pruner.errors import UserError

ROLES = ("system", "user", "assistant")

_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Roles as ShareGPT and its relatives call them."""

STREAMED = 10_000
"""Rows that are read of a dataset without an end, where nobody says how many."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat; ``role`` is one of ``ROLES``."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """Turns of a chat, an instruction being a chat of two turns; or a text of its own.

    ``context`` is the ``input`` of an instruction, which formats place apart from it; ``where`` the
    record that it was read from, of which equality knows nothing.
    """

    turns: tuple[Turn, ...] = ()
    text: str = ""
    context: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Examples:
    """The examples of one source; name and split as of ``text.Documents``."""

    examples: tuple[Example, ...]
    name: str
    split: str | None


def load_examples(
    source: str,
    *,
    split: str | None = None,
    text_field: str | None = None,
    limit: int | None = None,
) -> Examples:
    """Read examples; the first of those with most filled fields decides what they mean.

    - ``messages`` or ``conversations``: a chat, a list of {role, content} or {from, value}, with
      what ``system`` (or ``system_prompt``) says before it;
    - ``instruction`` (or ``prompt``, ``question``), ``input`` or ``context`` where there is one,
      and ``output`` (or ``response``, ``completion``, ``answer``): the Alpaca schema; with what
      the system says and the pairs of ``history`` before it. ``input`` alone
      is the instruction;
    - else plain text, found as ``load_documents`` finds it. ``text_field`` asks for this.
    """
    check_is_stored(source)
    if limit is None and is_endless(source):
        limit = STREAMED
    text_field = text_field or field_of(source)
    name, used, found = read_source(source, split=split, limit=limit)
    rows = tuple(found)
    read = _reader(deciding(rows[:BEGINNING]), text_field)
    if read is None:
        examples = [Example(text=text) for text in texts_of_rows(rows, name, text_field)]
    else:
        examples = [read(row, f"{name}: record {n}") for n, row in enumerate(rows, start=1)]
    kept = tuple(
        one
        for one in examples
        if one.text.strip() or any(t.role == "assistant" and t.content.strip() for t in one.turns)
    )
    if not kept:
        raise UserError(f"{name} holds no text; give a file or dataset with text in it")
    return Examples(kept, name, used)


def _reader(
    row: Mapping[str, Any] | None, text_field: str | None
) -> Callable[[Any, str], Example] | None:
    if text_field is not None or row is None:
        return None
    if (chat := chat_field(row)) is not None:
        return partial(_chat, chat)
    if (pair := answer_fields(row)) is not None:
        return partial(_instruction, *pair)
    return None


def _chat(field: str, row: Any, where: str) -> Example:
    messages = row.get(field) if isinstance(row, Mapping) else None
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"{where} has no list {field!r}; repair or remove the record")
    turns = [_turn(message, where) for message in messages]
    before = [] if any(turn.role == "system" for turn in turns) else _system(row)
    return Example((*before, *turns), where=where)


def _turn(message: Any, where: str) -> Turn:
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = _ROLE_NAMES.get(str(role), role)
        if role in ROLES and isinstance(content, str):
            return Turn(str(role), content)
    raise UserError(
        f"{where} has a message that is no role of {', '.join(ROLES)} with a text; "
        "repair or remove the record"
    )


def _instruction(question: str, answer: str, row: Any, where: str) -> Example:
    row = row if isinstance(row, Mapping) else {question: "", answer: ""}
    # Where there is no context, its field may be left out.
    texts = [name for name in CONTEXTS if isinstance(row.get(name), str) and row[name]]
    context = next((name for name in texts if name != question), None)
    given = "" if context is None else row[context]
    fields = {question: row.get(question), context: given, answer: row.get(answer)}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise UserError(
                f"{where}: field {key!r} is missing or no string; repair or remove the record"
            )
    if not row[question].strip():
        return Example()
    earlier = _earlier(row.get("history"))
    asked = f"{row[question]}\n\n{given}" if earlier and given.strip() else row[question]
    turns = (*_system(row), *earlier, Turn("user", asked), Turn("assistant", row[answer]))
    return Example(turns, context="" if earlier else given, where=where)


def _system(row: Mapping[str, Any]) -> list[Turn]:
    said = (row.get(name) for name in SYSTEMS)
    return [Turn("system", text) for text in said if isinstance(text, str) and text.strip()][:1]


def _earlier(history: Any) -> list[Turn]:
    pairs = history if isinstance(history, (list, tuple)) else ()
    said = [one for pair in pairs for one in (pair if isinstance(pair, (list, tuple)) else (None,))]
    if len(said) % 2 or not all(isinstance(one, str) for one in said):
        return []
    return [Turn(ROLES[1 + place % 2], text) for place, text in enumerate(said)]
