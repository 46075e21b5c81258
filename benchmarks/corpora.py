"""What benchmarks of damage share: the corpora, and perplexity on them."""

from __future__ import annotations

from collections.abc import Mapping

from llm_pruner.data.text import EvaluationText, load_evaluation_text
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.models.load import load_model
from llm_pruner.settings.evaluate import PerplexitySettings

WINDOW, TOKENS = 1024, 65_536
"""Tokens of a window, and the first tokens of a corpus that are read."""


def read_texts(sources: Mapping[str, str | None]) -> dict[str, EvaluationText]:
    """Return name -> text, of those sources that were given."""
    asked = PerplexitySettings()
    return {name: load_evaluation_text(source, asked) for name, source in sources.items() if source}


def perplexities(
    model: str, texts: Mapping[str, EvaluationText], tokens: int = TOKENS
) -> dict[str, float]:
    """Return name -> perplexity of a model that is loaded from ``model``."""
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    asked = PerplexitySettings(seq_len=WINDOW, max_tokens=tokens)
    return {
        name: perplexity(loaded.model, loaded.tokenizer, text, asked).perplexity
        for name, text in texts.items()
    }
