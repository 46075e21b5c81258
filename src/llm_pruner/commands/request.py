"""What a run was asked for, as a file that ``--config`` reads."""

from __future__ import annotations

from pathlib import Path

import yaml

from llm_pruner.settings.options import Settings

REQUEST = "request.yaml"


def as_yaml(settings: Settings) -> str:
    """Return settings as YAML; ``read`` makes the same settings of it."""
    return yaml.safe_dump(settings.written(), sort_keys=False, allow_unicode=True)


def request_of(settings: Settings) -> str:
    """Return what is written beside the weights.

    The home folder is written as ``~``: checkpoints are published, and the name of a user's account
    is nobody's business.
    """
    return as_yaml(settings).replace(f"{Path.home()}/", "~/")


def write_request(folder: Path, settings: Settings) -> None:
    """Write what was asked for beside the weights."""
    (folder / REQUEST).write_text(request_of(settings), encoding="utf-8", newline="\n")
