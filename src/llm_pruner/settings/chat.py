"""What ``chat`` can be asked for."""

from __future__ import annotations

from math import inf
from typing import Annotated

from llm_pruner.errors import UserError
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import Seed, must, within
from llm_pruner.settings.options import option

_Temperature = Annotated[
    float, must(lambda x: 0 <= x < inf, "{option} {value} is no temperature; use 0 or such as 0.7")
]


class ChatSettings(ModelSettings):
    """All that ``chat`` can be asked for."""

    against: str | None = option(
        None,
        "Have this model answer as well, such as the dense one: side by side.",
        "MODEL",
        reads=True,
    )
    new_tokens: Annotated[int, within(1, 2**20)] = option(512, "Tokens of an answer, at most.", "N")
    temperature: _Temperature = option(
        0.0, "Draw each token at this temperature; 0: always the likeliest.", "T"
    )
    seed: Seed = option(0, "Of what is drawn; each conversation begins with it.", "N", hidden=True)

    def check(self) -> None:
        """Raise UserError for a model beside itself."""
        if self.against == self.model:
            raise UserError(
                f"--against {self.against} is the model itself; name another one, or leave it out"
            )
