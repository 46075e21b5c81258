"""Every weight is trained."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.settings.recover import TrainingSettings


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Mark all weights; UserError if they have half precision."""
    check_type(settings.method, next(model.parameters()).dtype)
    return model.requires_grad_(True)


def check_type(method: str, dtype: torch.dtype) -> None:
    """Raise UserError if weights of a type would lose what training adds to them."""
    if dtype.itemsize == 2:
        raise UserError(
            f"method {method} on half-precision weights loses most of its small steps; use "
            "--dtype float32, with --trainer bf16=true to compute in bfloat16, or --method lora"
        )
