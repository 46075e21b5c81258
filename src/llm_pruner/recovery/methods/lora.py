"""Low-rank adapters on all linear layers but the output embedding (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.errors import UserError
from llm_pruner.settings.recover import TrainingSettings


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Return a PEFT model around the model, whose own weights are not trained.

    With ``settings.quantize``, those of the adapted layers are held in that type (QLoRA, arXiv
    2305.14314).

    Raises:
        UserError: the model has no linear layers.
    """
    from peft import LoraConfig, get_peft_model

    names = linear_layers(model)
    if not names:
        raise UserError("the model has no linear layers to adapt; use --method full")
    if settings.quantize != "none":
        quantize_(model, names, settings.quantize)
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


def quantize_(model: Any, names: list[str], kind: str) -> None:
    """Hold the weights of linear layers in int8, a scale for each output, or in 4-bit NormalFloat.

    Layers of other types than ``nn.Linear`` stay as they are; ``int8`` is torchao's, ``nf4``
    bitsandbytes's.
    """
    chosen = {name for name in names if type(model.get_submodule(name)) is nn.Linear}
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from torchao.quantization import quantize_ as hold_

        hold_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in chosen:
        plain = model.get_submodule(name)
        weight = plain.weight
        held = Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        held.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4")
        held.bias = plain.bias
        # Its packing for some CPUs needs widths that pruned layers do not have.
        held.support_avx512bf16_for_cpu = False
        model.set_submodule(name, held.to(weight.device))
    model.is_loaded_in_4bit = True
