"""What ``chat`` can be asked for."""

from __future__ import annotations

from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.options import option
from llm_pruner.settings.words import Seed


class ChatSettings(ModelSettings):
    """All that ``chat`` can be asked for."""

    against: str | None = option(
        None, "Have a second model answer as well, such as the dense one.", "MODEL"
    )
    new_tokens: int = option(512, "Most tokens of an answer.", "N", ge=1)
    temperature: float = option(0.0, "Temperature of sampling; 0: the likeliest token.", "T", ge=0)
    seed: Seed = option(0, "Of sampling.", hidden=True)
