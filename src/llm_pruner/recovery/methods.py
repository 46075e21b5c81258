"""Which weights are trained, and how adapters come on and off."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.errors import UserError
from llm_pruner.settings.recover import TrainingSettings


def make_trainable_(model: Any, settings: TrainingSettings) -> Any:
    """Prepare a model for the method; returns it, or for ``lora`` the PEFT model around it.

    Raises:
        UserError: the model has no linear layers to adapt, or is to be trained in half precision.
    """
    if settings.method == "lora":
        return _with_adapters(model, settings)
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if half:
        raise UserError(
            f"method {settings.method} on half-precision weights loses most of its small steps; "
            "use --dtype float32, with --bf16 to compute in bfloat16, or --method lora"
        )
    return model.requires_grad_(True)


def _with_adapters(model: Any, settings: TrainingSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    names = linear_layers(model)
    if not names:
        raise UserError("the model has no linear layers to adapt; use --method full")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's Conv1D is recognised, and PEFT says so
        return get_peft_model(model, config)


def linear_layers(model: Any) -> list[str]:
    """Return the names of all linear layers but the output embedding."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


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


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of the weights that are trained."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(model).items()}


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
        weight.copy_(weights[name])
