"""What ``vocab`` can be asked for."""

from __future__ import annotations

from llm_pruner.errors import UserError
from llm_pruner.settings.common import CALIBRATION, LOADING, Sources, WriterSettings
from llm_pruner.settings.options import option


class VocabSettings(WriterSettings):
    """All that ``vocab`` can be asked for."""

    text: Sources = option(
        ...,
        "Text whose tokens stay: a file or a hub dataset. May be given several times.",
        "SRC",
        panel=CALIBRATION,
        reads=True,
    )
    size: int | None = option(
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
    documents: int = option(
        20_000, "Read at most this many of a hub dataset.", "N", panel=CALIBRATION
    )
    text_split: str | None = option(None, "Split of a hub dataset.", "NAME", panel=CALIBRATION)
    text_field: str | None = option(None, "Field that holds the text.", "NAME", panel=CALIBRATION)

    def check(self) -> None:
        """Raise UserError for what cannot be."""
        for name in ("size", "documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} leaves nothing; use 1 or more")
