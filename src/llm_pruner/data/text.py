"""Documents from a local file or a hub dataset, and the text of an evaluation corpus."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, NamedTuple, TypeVar

from llm_pruner.data.files import NoFieldError, field_of, read_source, texts_of_rows
from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded
from llm_pruner.settings.evaluate import PerplexitySettings

T = TypeVar("T")

DEMO_PROMPTS = (
    "The old bridge over the river was built",
    "To make a simple vegetable soup, first",
    "A compiler is a program that",
)


def demo_text() -> str:
    """Return about two thousand words of plain English prose on several subjects."""
    return files("llm_pruner.data").joinpath("texts/demo.txt").read_text(encoding="utf-8")


SELF = "self"
"""The source name under which the model writes its own text."""
CHAT = "chat"
"""The source name under which the model writes questions and answers by its chat template."""
PRUNED = "pruned"
"""The source name under which a model that is trained writes what its teacher is to judge."""
DEMO = "demo"
"""The source name of the text that this package ships."""


@dataclass(frozen=True)
class Documents:
    """Text of one source."""

    texts: tuple[str, ...]
    name: str
    split: str | None
    plain: bool

    @property
    def raw(self) -> str:
        """The whole text: of a ``.txt`` file as it is, else the documents parted by blank lines."""
        return "\n\n".join(self.texts)

    @property
    def records(self) -> tuple[str, ...]:
        """The documents; of a ``.txt`` file its lines, each with its line feed."""
        if not self.plain:
            return self.texts
        return tuple(io.StringIO(self.raw, newline="\n"))


_SHARE = re.compile(r"(.+):(\d*\.?\d+)")


def shares_of(mixture: str) -> dict[str, float]:
    """Return source -> share of a mixture such as ``c4:0.6,code.jsonl:0.4``, equal without shares.

    A file's name may hold commas, and what a share looks like.
    """
    if _is_there(mixture):
        return {mixture: 1.0}
    parts = [part.strip() for part in mixture.split(",") if part.strip()] or [mixture]
    found = [None if _is_there(one) else _SHARE.fullmatch(one) for one in parts]
    names = [one if match is None else match[1] for one, match in zip(parts, found, strict=True)]
    shares = [0.0 if match is None else float(match[2]) for match in found]
    if len({*names}) < len(names) or (any(found) and not all(shares)):
        raise UserError(
            f"{mixture} is no mixture of sources; name each once, and give a share above 0 to all "
            "of them or to none"
        )
    return {name: share or 1.0 for name, share in zip(names, shares, strict=True)}


def _is_there(name: str) -> bool:
    return os.path.exists(expanded(name))  # of a mixture, which may be too long for a name


def name_of_part(part: str) -> str:
    """Return the source of one part of a mixture that was read once, as ``c4`` of ``c4:0.6``."""
    match = _SHARE.fullmatch(part)
    return part if match is None else match[1]


def load_documents(
    source: str,
    *,
    split: str | None = None,
    text_field: str | None = None,
    limit: int | None = None,
) -> Documents:
    """Read the documents of a source."""
    check_is_stored(source)
    name, used_split, rows = read_source(source, split=split, limit=limit)
    texts = tuple(texts_of_rows(rows, name, text_field or field_of(source)))
    if not any(text.strip() for text in texts):
        raise UserError(f"{name} holds no text; give a file or dataset with text in it")
    return Documents(texts, name, used_split, source.lower().endswith(".txt"))


def check_is_stored(source: str) -> None:
    """Raise UserError for a name of text that is no file and no dataset."""
    if source in (SELF, CHAT, PRUNED, DEMO):
        raise UserError(
            f"source {source!r} is no file and no dataset, and cannot be used here; give the path "
            "of a text file or the name of a dataset"
        )


def read_each(
    read: Callable[[str, str | None], T], sources: Iterable[str], text_field: str | None
) -> dict[str, T]:
    """Read several sources, each once; ``text_field`` holds for those that have such a field."""
    names = [*dict.fromkeys(sources)]
    found: dict[str, T] = {}
    lacking: dict[str, NoFieldError] = {}
    for name in names:
        try:
            found[name] = read(name, text_field)
        except NoFieldError as error:
            lacking[name] = error
    if lacking and all(name == DEMO or name.endswith(".txt") for name in found):
        raise next(iter(lacking.values()))
    found |= {name: read(name, None) for name in lacking}
    return {name: found[name] for name in names}


def with_field(read: Callable[[str | None], T], text_field: str | None) -> T:
    """Read a source by a field, or without it where only other sources of a run have it."""
    try:
        return read(text_field)
    except NoFieldError:
        return read(None)


Protocol = Literal["paper", "standard"]

_HEADING = re.compile(r" = [^=].* = ?\n?")


def record_format(records: Sequence[str]) -> Literal["wikitext", "ptb"] | None:
    """Return the corpus whose raw rows these look like, or None.

    WikiText rows start with a space or are blank, and some are headings between ``=`` signs. Penn
    Treebank rows have no capital letter but the ``N`` that stands for a number, and some have
    ``<unk>``.
    """
    rows = [record for record in records[:2000] if record.strip()]
    if len(rows) < 2:
        return None
    if all(row.startswith(" ") for row in rows) and any(map(_HEADING.fullmatch, rows)):
        return "wikitext"
    words = [word for row in rows for word in row.split() if word != "N"]
    if any("<unk>" in row for row in rows) and all(word == word.lower() for word in words):
        return "ptb"
    return None


def running_text(documents: Documents, protocol: Protocol) -> str | None:
    """Return the one text that documents are parts of, see ``load_evaluation_text``.

    None unless they are one file, or rows of WikiText or Penn Treebank.
    """
    rows = documents.records
    form = record_format(rows)
    if form == "wikitext":
        return "\n\n".join(row.removesuffix("\n") + "\n" if row.strip() else "" for row in rows)
    if form == "ptb":
        return ("\n\n" if protocol == "paper" else " ").join(row.strip() for row in rows)
    return documents.raw if documents.plain else None


_SPLITS = {"c4": "validation", "bookcorpus": "train", "wikipedia": "train", "code": "train"}
_LIMITS = {"c4": 1100, "bookcorpus": 10_000, "wikipedia": 1100, "code": 1100}
"""Documents of datasets without an end; of C4 what GPTQ and SparseGPT join for their figures."""


class EvaluationText(NamedTuple):
    """A corpus as one text: its name, the split (None where there is none) and the text."""

    name: str
    split: str | None
    text: str


def load_evaluation_text(source: str, asked: PerplexitySettings) -> EvaluationText:
    """Return an evaluation corpus.

    How records become one text, after LLM-Pruner (``paper``) and GPTQ (``standard``):

    - WikiText: a row keeps its line end, a blank row is the empty string, rows are joined with two
      line feeds. So two paragraphs stand five line feeds apart. The raw file, with one row a
      line, gives the same text as the hub dataset.
    - Penn Treebank: the rows lose their outer spaces and are joined with two line feeds
      (``paper``, which reads the validation split) or a space (``standard``, test split).
    - any other ``.txt`` file is taken as it is.
    - other documents are joined with two line feeds; of C4, the first 1,100 of the validation
      split.

    WikiText and Penn Treebank are known by their look, so a local file works under any name.
    """
    if source == DEMO:
        return EvaluationText("demo text", None, demo_text())
    alias = source.partition(":")[0]
    usual = "validation" if alias == "ptb" and asked.protocol == "paper" else "test"
    split = asked.split or _SPLITS.get(alias, usual)
    limit = _LIMITS.get(alias)
    documents = load_documents(source, split=split, text_field=asked.text_field, limit=limit)
    text = running_text(documents, asked.protocol)
    return EvaluationText(documents.name, documents.split, documents.raw if text is None else text)
