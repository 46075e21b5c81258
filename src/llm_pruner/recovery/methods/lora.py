"""Low-rank adapters on all linear layers but the output embedding (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.errors import UserError, in_short
from llm_pruner.settings.recover import TrainingSettings

_READ_PAST = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models whose kernels read the weight of ``out_proj`` past an adapter."""


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
    with warnings.catch_warnings(), _as_named():
        warnings.simplefilter("ignore")  # GPT-2's Conv1D is recognised, and PEFT says so
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # such as layers whose kernels read the weight past the adapter
            raise UserError(
                f"PEFT puts no adapters on this model ({in_short(error)}); use --method blocks"
            ) from error


@contextmanager
def _as_named() -> Iterator[None]:
    """Have PEFT adapt the layers that are named.

    Of mixtures of experts it would take names for those of transformers 4, adapt all experts in
    place of the layers with these names, and refuse dropout.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion

        kept = conversion.convert_peft_config_for_transformers
    except (ImportError, AttributeError):  # of versions that do not
        yield
        return
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = kept


def linear_layers(model: Any) -> list[str]:
    """Return the names of all linear layers but the output embedding.

    One whose weight other modules have as well is left out: each would learn its own change of it.
    So is one that PEFT refuses.
    """
    reads_past = model.config.model_type in _READ_PAST
    head = model.get_output_embeddings()
    others = [module for module in model.modules() if module is not head]
    owners = Counter(id(weight) for one in others for weight in one._parameters.values())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and owners[id(module.weight)] == 1
        and not (reads_past and name.endswith(".out_proj"))
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
