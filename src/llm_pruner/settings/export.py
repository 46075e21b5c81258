"""What ``export`` can be asked for."""

from __future__ import annotations

from pathlib import Path

from llm_pruner.settings.common import OUTPUT, ModelSettings
from llm_pruner.settings.options import option
from llm_pruner.settings.registry import FORMATS


class ExportSettings(ModelSettings):
    """All that ``export`` can be asked for."""

    to: str = option("gguf", f"Format: {', '.join(FORMATS)}.", "NAME", known=FORMATS)
    type: str = option(
        "f16", "Of the weights: f32, f16, bf16, q8_0, or q4_k_m by llama.cpp.", "NAME"
    )
    like: Path | None = option(
        None, "A .gguf file of the same model, to take the tokenizer from.", "FILE"
    )
    out: Path = option(..., "File to write.", "FILE", short="-o", panel=OUTPUT)
    overwrite: bool = option(False, "Replace --out, if it is a file of this format.", panel=OUTPUT)
    dtype: str = option("auto", "As it is stored.", hidden=True)
    device: str = option("cpu", "Nothing is computed.", hidden=True)
