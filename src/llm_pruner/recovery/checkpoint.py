"""Checkpoints of a run, and how the weights that are trained come off the model and on it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_pruner.errors import UserError

_STEP = re.compile(r"step-(\d+)")


def step_folder(work: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return work / f"step-{step:06d}"


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint, None if there is none; remove what was never completed."""
    if not work.is_dir():
        return None
    for path in work.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    return max((one for one in work.iterdir() if _STEP.fullmatch(one.name)), default=None)


def drop_older(work: Path, newest: Path) -> None:
    """Remove all checkpoints but the newest."""
    for path in work.iterdir():
        if _STEP.fullmatch(path.name) and path != newest:
            shutil.rmtree(path)


def merge_(trained: Any) -> Any:
    """Add adapters to the weights and return the plain model, in eval mode."""
    plain = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    plain.requires_grad_(True)
    # PEFT leaves marks that a later save would act upon.
    for mark in ("_hf_peft_config_loaded", "peft_config"):
        vars(plain).pop(mark, None)
    return plain.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are trained."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of the weights that are trained."""
    found = {}
    for name, weight in trainable(model).items():
        one = weight.detach()
        whole = one.full_tensor() if isinstance(one, DTensor) else one  # asked by each process
        found[name] = whole.to("cpu", copy=True)
    return found


@torch.no_grad()
def set_weights_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what ``trained_weights`` gave; UserError if names or shapes are other ones."""
    own = trainable(model)
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise UserError(
            "the checkpoint holds other weights than this run trains; begin anew with --overwrite"
        )
    for name, weight in own.items():
        value = weights[name].to(weight.device)
        if isinstance(weight, DTensor):
            value = distribute_tensor(value, weight.device_mesh, weight.placements)
        weight.copy_(value)
