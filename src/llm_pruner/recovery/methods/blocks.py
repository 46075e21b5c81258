"""Every weight is trained but those of the embeddings, which few of the tokens of a text reach."""

from __future__ import annotations

from typing import Any

from llm_pruner.recovery.methods import full
from llm_pruner.settings.recover import TrainingSettings


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Mark all weights but those of input and output embedding; UserError if of half precision."""
    full.prepare_(model, settings)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            embedding.requires_grad_(False)
    return model
