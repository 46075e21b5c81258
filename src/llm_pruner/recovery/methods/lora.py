"""Low-rank adapters on all linear layers but the output embedding (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.errors import UserError, in_short
from llm_pruner.models.forward import caching, embedding_rows, evaluating, first_tensor
from llm_pruner.settings.recover import TrainingSettings

_READ_PAST = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models whose ``out_proj`` PEFT refuses, as their kernels read its weight past one."""

_PROBE_TOKENS = 8


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Return a PEFT model around the model, whose own weights are not trained.

    With ``settings.quantize``, those of the adapted layers are held in that type (QLoRA, arXiv
    2305.14314). Raises UserError if the model has no linear layers.
    """
    from peft import LoraConfig, get_peft_model

    names = linear_layers(model)
    if not names:
        raise UserError("the model has no linear layers to adapt; use --method full")
    if settings.quantize != "none":
        quantize_(model, names, settings.quantize)
    config = LoraConfig(  # without a task, whose model would hand on what not all models take
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
    So is one that PEFT refuses, one whose weight is read past an adapter, as it is not called where
    the module around it is, and one that gives something else than x W^T + b, such as a router.
    """
    reads_past = model.config.model_type in _READ_PAST
    head = model.get_output_embeddings()
    others = [module for module in model.modules() if module is not head]
    owners = Counter(id(weight) for one in others for weight in one._parameters.values())
    fits = _called(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and owners[id(module.weight)] == 1
        and not (reads_past and name.endswith(".out_proj"))
        and fits.get(module, model.get_submodule(name.rpartition(".")[0]) not in fits)
    ]


@torch.no_grad()
def _called(model: Any) -> dict[nn.Module, bool]:
    """Return the modules that training calls, and whether what they give may be that of a layer.

    That is in the shape of x W^T + b for linear layers; any other module may give what it wants.
    Experts that no token came to are not called, nor are the modules around their layers.
    """
    fits: dict[nn.Module, bool] = {}

    def note(module: Any, given: Any, named: Any, output: Any) -> None:
        fits[module] = True
        if isinstance(module, (nn.Linear, Conv1D)):
            width = module.nf if isinstance(module, Conv1D) else module.out_features
            wanted = (*first_tensor(given, named).shape[:-1], width)
            fits[module] = getattr(output, "shape", None) == wanted

    device = next(model.parameters()).device
    tokens = torch.arange(_PROBE_TOKENS, device=device)[None] % embedding_rows(model)
    on_gpu = {one.device for one in model.parameters() if one.is_cuda}
    with torch.random.fork_rng(on_gpu), evaluating(model), ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        model.train()  # in which some kernels take the place of more modules
        with suppress(ValueError):  # a few train on texts of other lengths: all their layers fit
            model(input_ids=tokens, **caching(model, False))
    return fits


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
