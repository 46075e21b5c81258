"""Documents from a local file or a hub dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llm_pruner.data.files import SUFFIXES, read_file
from llm_pruner.data.hub import read_hub
from llm_pruner.errors import UserError

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
    plain = False
    if _is_file_name(source, path):
        texts = read_file(path, text_field=text_field, limit=limit)
        plain = path.suffix.lower() == ".txt"
        name, used_split = path.name, None
        if plain and limit is not None:
            texts = ("".join(_lines(texts[0])[:limit]),)
    else:
        name, used_split, texts = read_hub(source, split=split, text_field=text_field, limit=limit)
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


def _is_file_name(source: str, path: Path) -> bool:
    # A name such as "owner/data" may also be a local folder; then the user meant the folder.
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
