"""Every weight is trained."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.settings.recover import TrainingSettings


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Mark all weights.

    Raises:
        UserError: they have half precision.
    """
    if next(model.parameters()).dtype in (torch.bfloat16, torch.float16):
        raise UserError(
            f"method {settings.method} on half-precision weights loses most of its small steps; "
            "use --dtype float32, with --bf16 to compute in bfloat16, or --method lora"
        )
    return model.requires_grad_(True)
