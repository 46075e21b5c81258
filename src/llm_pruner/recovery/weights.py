"""Which weights are trained; how they come off the model and on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_pruner.errors import UserError


def merge_(trained: Any) -> Any:
    """Add adapters to the weights and return the plain model, in eval mode."""
    plain = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    plain.requires_grad_(True)
    # PEFT leaves marks that a later save would act upon.
    for mark in ("_hf_peft_config_loaded", "peft_config"):
        if mark in vars(plain):
            delattr(plain, mark)
    return plain.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are trained."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose parts lie with several processes; each must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, if ``other`` has such parts; else the tensor."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of the weights that are trained."""
    return {
        name: whole(weight.detach()).to("cpu", copy=True)
        for name, weight in trainable(model).items()
    }


@torch.no_grad()
def set_weights_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what ``trained_weights`` gave.

    Raises:
        UserError: the names or shapes are other ones.
    """
    own = trainable(model)
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise UserError(
            "the checkpoint holds other weights than this run trains; begin anew with --restart"
        )
    for name, weight in own.items():
        weight.copy_(spread_like(weights[name], weight))
