"""Documents from a local file or a hub dataset, and the text of an evaluation corpus."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Literal

from llm_pruner.data.files import SUFFIXES, read_hub, read_rows, texts_of_rows
from llm_pruner.errors import UserError

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


@dataclass(frozen=True)
class Documents:
    """Text of one source.

    Attributes:
        texts: the documents in the source's order, blank ones included; a ``.txt`` file is one
            document, its whole content.
        name: file name, or hub name with config.
        split: split of a hub dataset; None for a local file.
        fingerprint: first 16 hex digits of the SHA-256 over ``texts``.
        plain: true for a ``.txt`` file, whose lines can be read as records.
    """

    texts: tuple[str, ...]
    name: str
    split: str | None
    fingerprint: str
    plain: bool = False

    @property
    def raw(self) -> str:
        """The whole text: of a ``.txt`` file as it is, else the documents parted by blank lines."""
        return "\n\n".join(self.texts)

    @property
    def records(self) -> tuple[str, ...]:
        """The documents; of a ``.txt`` file its lines, each with its line end.

        Lines end at line feeds only: characters such as U+0085 stay inside a line.
        """
        if not self.plain:
            return self.texts
        return tuple(line for text in self.texts for line in _lines(text))


def sources_of(source: str) -> tuple[str, ...]:
    """Return the parts of a mixture, which are parted by commas; a file's name may hold commas."""
    if Path(source).expanduser().exists():
        return (source,)
    return tuple(part for part in source.split(",") if part) or (source,)


def load_documents(
    source: str,
    *,
    split: str | None = None,
    text_field: str | None = None,
    limit: int | None = None,
) -> Documents:
    """Read the documents of a source.

    Args:
        source: a ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file; else a hub dataset, one of
            the short names ``wikitext2``, ``ptb``, ``c4`` and ``bookcorpus``, or ``name:config``.
        split: split of a hub dataset, by default ``train``.
        text_field: the field that holds the text. By default ``text``; else the Alpaca fields
            ``instruction``, ``input`` and ``output`` joined by blank lines; else the first field
            whose value is a string.
        limit: read at most this many documents; of a ``.txt`` file, this many lines.

    Raises:
        UserError: the file is missing, empty, of an unknown type, broken or without text; or the
            dataset cannot be loaded.
    """
    if source == SELF:
        raise UserError(
            "source 'self' is text that the model writes itself, for calibration only; "
            "give a text file or a dataset name here"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} reads no documents; use at least 1")
    path = Path(source).expanduser()
    take = partial(texts_of_rows, text_field=text_field)
    plain = False
    if not is_file_name(source, path):
        name, used_split, texts = read_hub(source, take, split=split, limit=limit)
    else:
        name, used_split = path.name, None
        plain = path.suffix.lower() == ".txt"
        rows = read_rows(path)
        if plain:
            texts = ("".join(line for row in rows for line in _lines(row)[:limit]),)
        else:
            texts = tuple(islice(take(rows, str(path)), limit))
    if not any(text.strip() for text in texts):
        raise UserError(f"{name} holds no text; give a file or dataset with text in it")
    return Documents(texts, name, used_split, fingerprint(texts), plain)


def fingerprint(texts: Iterable[str]) -> str:
    """Return 16 hex digits of the SHA-256 over the texts and their lengths."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:16]


def is_file_name(source: str, path: Path) -> bool:
    """Whether a source is a file: a name such as ``owner/data`` may also be a local folder."""
    return (
        path.exists()
        or path.suffix.lower() in SUFFIXES
        or source.startswith((".", "/", "~"))
        or "\\" in source
    )


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    ended = [line + "\n" for line in lines[:-1]]
    return [*ended, lines[-1]] if lines[-1] else ended


Protocol = Literal["paper", "standard"]
Format = Literal["wikitext", "ptb"]

_HEADING = re.compile(r" = [^=].* = ?\n?")


def record_format(records: Sequence[str]) -> Format | None:
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
    if any("<unk>" in row for row in rows) and all(_is_ptb(row) for row in rows):
        return "ptb"
    return None


def join_records(records: Sequence[str], form: Format, protocol: Protocol) -> str:
    """Join the rows of WikiText or Penn Treebank, see ``load_evaluation_text``."""
    if form == "wikitext":
        return "\n\n".join(_with_line_end(row) if row.strip() else "" for row in records)
    separator = "\n\n" if protocol == "paper" else " "
    return separator.join(row.strip() for row in records)


def _with_line_end(row: str) -> str:
    return row if row.endswith("\n") else row + "\n"


def _is_ptb(row: str) -> bool:
    return all(word == word.lower() or word == "N" for word in row.split())


DEMO = "demo"
"""The source name of the text that this package ships."""

_SPLITS = {"wikitext2": "test", "c4": "validation", "bookcorpus": "train"}
_C4_DOCUMENTS = 1100  # what GPTQ and SparseGPT join for their C4 figures


def load_evaluation_text(
    source: str,
    *,
    protocol: Protocol = "standard",
    split: str | None = None,
    text_field: str | None = None,
) -> tuple[str, str | None, str]:
    """Return (name, split, text) of an evaluation corpus.

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

    Args:
        source: ``demo`` for the text that this package ships; else as for ``load_documents``.
        split: split of a hub dataset; by default the one that the protocol reads, else ``test``.

    Raises:
        UserError: as ``load_documents``.
    """
    if source == DEMO:
        return "demo text", None, demo_text()
    alias = source.partition(":")[0]
    usual = ("validation" if protocol == "paper" else "test") if alias == "ptb" else None
    chosen = split or usual or _SPLITS.get(alias, "test")
    limit = {"c4": _C4_DOCUMENTS, "bookcorpus": 10_000}.get(alias)
    documents = load_documents(source, split=chosen, text_field=text_field, limit=limit)
    form = record_format(documents.records)
    text = documents.raw if form is None else join_records(documents.records, form, protocol)
    return documents.name, documents.split, text
