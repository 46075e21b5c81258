"""Warn where a model is judged on a corpus that it was calibrated on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm_pruner.files.json import read_json

_FAMILIES = (("wikitext",), ("ptb", "penn_treebank", "penn-treebank"), ("c4",), ("bookcorpus",))


def calibration_source(model: str) -> str | None:
    """Return what the plan in a pruned folder was calibrated on; None if nothing says so."""
    try:
        plan = read_json(Path(model).expanduser() / "plan.json")
        source = plan["calibration"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None


def shared_corpora(model: str, sources: Iterable[str]) -> list[str]:
    """Return a warning for each source of the corpus that the model was calibrated on.

    Sources are of one corpus if they have the same file name, or both names are of one family
    (WikiText, Penn Treebank, C4, BookCorpus), whatever the split.
    """
    used = calibration_source(model)
    if used is None:
        return []
    return [
        f"{model} was calibrated on {part} and is measured on {source}, which is of the same "
        "corpus: the result flatters it; calibrate on other text to compare"
        for source in sources
        for part in used.split(",")
        if Path(source).name == Path(part).name or _family(source) & _family(part)
    ]


def _family(source: str) -> set[int]:
    name = Path(source).name.lower() if Path(source).suffix else source.lower()
    return {
        number
        for number, words in enumerate(_FAMILIES)
        if any(name.startswith(word) or f"/{word}" in name for word in words)
    }
