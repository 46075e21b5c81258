"""What ``vocab`` can be asked for."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from llm_pruner.settings.common import CALIBRATION, LOADING, Sources, WriterSettings
from llm_pruner.settings.options import option

_text = partial(option, panel=CALIBRATION)


class VocabSettings(WriterSettings):
    """All that ``vocab`` can be asked for."""

    hides: ClassVar = frozenset({"dtype"})

    text: Sources = _text(
        ..., "Text whose tokens stay: a file or a hub dataset; may be given several times.", "SRC"
    )
    size: int | None = option(
        None,
        "Number of tokens that stay: the most frequent in the text, then those that the tokenizer "
        "learned first.",
        "N",
        ge=1,
        shown="the tokens of the text",
    )
    dtype: str = option("auto", "Of the weights; auto: as stored.", panel=LOADING)
    documents: int = _text(20_000, "Read at most this many of a dataset.", ge=1, hidden=True)
    text_split: str | None = _text(None, "Split of a hub dataset.", hidden=True)
    text_field: str | None = _text(None, "Field that holds the text.", hidden=True)
