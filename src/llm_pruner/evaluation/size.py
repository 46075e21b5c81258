"""Parameters of a model and bytes of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts; a tied parameter counts once.

    Attributes:
        total: all parameters.
        embedding: input and output embeddings.
        blocks: the decoder layers.
        bytes: memory of all parameters in the model's own types.
    """

    total: int
    embedding: int
    blocks: int
    bytes: int


def model_size(model: Any) -> ModelSize:
    """Count the parameters of a causal language model.

    The decoder layers are the module list that holds the most parameters.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return ModelSize(
        total=_count(model),
        embedding=_count(*(head for head in heads if head is not None)),
        blocks=max((_count(blocks) for blocks in lists), default=0),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def folder_bytes(path: str | Path) -> int:
    """Return the bytes of all files under a folder, or of one file."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _count(*modules: nn.Module) -> int:
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())
