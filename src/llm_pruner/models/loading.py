"""Load a model as its settings say."""

from __future__ import annotations

from llm_pruner.models.load import LoadedModel, check_model, load_model
from llm_pruner.settings.common import ModelSettings


def load(
    model: ModelSettings, *, tokenizer_required: bool = True, weights: bool = True
) -> LoadedModel:
    """Return the model that the settings name; without ``weights``, from its config alone.

    Raises:
        UserError: it cannot be loaded.
    """
    return load_model(
        model.source,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        tokenizer_required=tokenizer_required,
        weights=weights,
    )


def check(model: ModelSettings) -> None:
    """Refuse what can be refused before weights are read, of a model that is loaded later.

    Raises:
        UserError: it cannot be loaded.
    """
    check_model(
        model.source,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )
