"""Text out of datasets on the hub, by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from llm_pruner.data.files import texts_of_rows
from llm_pruner.errors import UserError

T = TypeVar("T")

STREAMED = 10_000
"""Rows that are read of a dataset without an end, where nobody says how many."""


@dataclass(frozen=True)
class _Alias:
    """Where a dataset of the literature is found today, without a loading script."""

    path: str
    config: str | None = None
    files: str | None = None
    stream: bool = False


ALIASES = {
    "wikitext2": _Alias("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # The repository holds a script, which datasets no longer runs; its Parquet copy is read.
    "ptb": _Alias(
        "ptb-text-only/ptb_text_only",
        files="hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/"
        "penn_treebank/{split}/0000.parquet",
    ),
    "c4": _Alias("allenai/c4", "en", stream=True),
    "bookcorpus": _Alias("rojagtap/bookcorpus", stream=True),
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def read_hub(
    source: str,
    *,
    split: str | None = None,
    text_field: str | None = None,
    limit: int | None = None,
) -> tuple[str, str, tuple[str, ...]]:
    """Return (name, split, documents) of a hub dataset.

    With a limit the dataset is streamed, so that only its beginning is downloaded.

    Raises:
        UserError: the name is malformed, or the dataset cannot be loaded (no network, no such
            name, config or split).
    """

    def texts(rows: Iterable[Any], name: str) -> tuple[str, ...]:
        return tuple(islice(texts_of_rows(rows, name, text_field), limit))

    return _read(source, split, limit, texts)


def read_hub_rows(
    source: str, *, split: str | None = None, limit: int | None = None
) -> tuple[str, str, tuple[Any, ...]]:
    """Return (name, split, rows) of a hub dataset, the rows as they are.

    Without a limit a dataset that is too large to read whole gives its first ``STREAMED`` rows.

    Raises:
        UserError: as ``read_hub``.
    """
    alias = ALIASES.get(source.partition(":")[0])
    if limit is None and alias is not None and alias.stream:
        limit = STREAMED

    def as_they_are(rows: Iterable[Any], name: str) -> tuple[Any, ...]:  # noqa: ARG001
        return tuple(islice(rows, limit))

    return _read(source, split, limit, as_they_are)


def _read(
    source: str,
    split: str | None,
    limit: int | None,
    take: Callable[[Iterable[Any], str], tuple[T, ...]],
) -> tuple[str, str, tuple[T, ...]]:
    """Return (name, split, what ``take`` makes of the rows)."""
    if not _NAME.fullmatch(source):
        raise UserError(
            f"{source!r} is neither a local file nor a dataset name; use the path of a .txt, "
            f".jsonl, .json or .parquet file, a hub name, or one of {', '.join(ALIASES)}"
        )
    split = split or "train"
    path, _, config = source.partition(":")
    alias = ALIASES.get(path, _Alias(path))
    if alias.stream and limit is None:
        raise UserError(f"dataset {source!r} is too large to read whole; set a limit")
    name = " ".join(filter(None, (alias.path, config or alias.config)))
    stream = limit is not None
    loader = _loader(source)
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its retries, line by line; the error below says it all
    try:
        if alias.files is not None:
            files = {split: alias.files.format(split=split)}
            rows = loader("parquet", data_files=files, split=split, streaming=stream)
        else:
            rows = loader(alias.path, config or alias.config, split=split, streaming=stream)
        return name, split, take(rows, name)
    except UserError:
        raise
    except Exception as error:  # hub, network and dataset errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"dataset {source!r}: tried hub dataset {name}, split {split}, and failed "
            f"({type(error).__name__}: {reason}); check the name and the network, "
            "or give a local .txt, .jsonl, .json or .parquet file"
        ) from error
    finally:
        logger.setLevel(level)


def _loader(source: str) -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{source!r} is no local file, and reading it from the hub needs the package "
            "datasets; install it or give a local .txt, .jsonl, .json or .parquet file"
        ) from None
    return load_dataset
