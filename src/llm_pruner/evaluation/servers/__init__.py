"""Each module here is a server of ``bench --server``: ``find``, ``how``, ``command`` and more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_pruner.errors import UserError, in_short
from llm_pruner.settings.registry import SERVERS, entry


@dataclass(frozen=True)
class ServedBy:
    """Whether a server runs a folder.

    Attributes:
        server: its title.
        runs: whether it does.
        said: how, or why not, in words that follow its title.
    """

    server: str
    runs: bool
    said: str

    def __str__(self) -> str:
        return f"{self.server} {self.said}" if self.runs else f"not {self.server} ({self.said})"


def served_by(model: Any, config: Any, saved_as: str) -> tuple[ServedBy, ...]:
    """Return what each server makes of a folder; the arguments are those of ``vllm.how``."""
    found = []
    for server in (entry("evaluation/servers", name) for name in SERVERS):
        try:
            found.append(ServedBy(server.TITLE, True, server.how(model, config, saved_as)))
        except UserError as error:
            found.append(ServedBy(server.TITLE, False, str(error)))
        except Exception as error:  # of code that is not transformers': no reason to lose a model
            found.append(ServedBy(server.TITLE, False, f"cannot tell: {in_short(error)}"))
    return tuple(found)
