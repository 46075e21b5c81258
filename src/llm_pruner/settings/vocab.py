"""What ``vocab`` can be asked for."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

from llm_pruner.settings.common import CALIBRATION, LOADING, Sources, WriterSettings
from llm_pruner.settings.limits import must
from llm_pruner.settings.options import option

_text = partial(option, panel=CALIBRATION)

_Some = Annotated[
    int, must(lambda count: count >= 1, "{option} {value} leaves nothing; use 1 or more")
]


class VocabSettings(WriterSettings):
    """All that ``vocab`` can be asked for."""

    hides: ClassVar = frozenset({"push_to_hub", "dtype"})

    text: Sources = _text(
        ...,
        "Text whose tokens stay: a file or a hub dataset. May be given several times.",
        "SRC",
        reads=True,
    )
    size: _Some | None = option(
        None,
        "Tokens that stay: those that the text has most often, then those that the tokenizer "
        "learned first. Without it: those that the text has.",
        "N",
    )
    dtype: str = option(
        "auto",
        "Of the weights: auto for what the checkpoint has; or float32, bfloat16 or float16.",
        "TYPE",
        panel=LOADING,
    )
    documents: _Some = _text(20_000, "Read at most this many of a hub dataset.", "N", hidden=True)
    text_split: str | None = _text(None, "Split of a hub dataset.", "NAME", hidden=True)
    text_field: str | None = _text(None, "Field that holds the text.", "NAME", hidden=True)
