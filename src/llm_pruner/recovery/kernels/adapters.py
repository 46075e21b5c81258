"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, as one operation on a CPU.

PEFT composes y = x W^T + s (x A^T) B^T of ten operations, most of which do nothing but copy, and
mixed precision rounds the frozen W anew in each. Here W is rounded once, and products are added
where their sum will lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import psutil
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

_SHARE = 0.125
"""Of the machine's memory, what rounded weights may take; if it is not enough, none are kept."""


@contextmanager
def fused_adapters(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Have the adapters of a PEFT model computed so until the block ends.

    The result is the same but for rounding. Adapters of other kinds (with dropout, on other than
    linear layers) and those on GPUs are left as they are.

    Args:
        model: with its adapters.
        dtype: what matrices are rounded to before they are multiplied; None if they are not.
    """
    layers: list[Any] = [one for one in model.modules() if _is_plain(one)]
    size = sum(2 * one.base_layer.weight.numel() for one in layers)
    kept = dtype is not None and size <= _SHARE * psutil.virtual_memory().total
    inputs = _Inputs()
    for layer in layers:
        weight = layer.base_layer.weight.detach()
        weight = weight.to(dtype) if kept else weight
        layer.forward = partial(_forward, layer, layer.forward, weight, dtype, inputs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(module: Any) -> bool:
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
        return False
    base, names = module.base_layer, module.active_adapters
    return (
        len(names) == 1
        and not module.merged
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and type(base.weight) is nn.Parameter
        and base.weight.device.type == "cpu"
        and base.weight.dtype == torch.float32
        and not any(one.requires_grad for one in base.parameters())
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
    )


class _Inputs:
    """The last input, rounded: several layers in a row take the same."""

    def __init__(self) -> None:
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0
        self._rounded: torch.Tensor | None = None

    def __call__(self, given: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._input() is not given or self._version != given._version:
            self._input, self._version = ref(given), given._version
            self._rounded = given.detach().flatten(0, -2).to(dtype)
        assert self._rounded is not None
        return self._rounded


def _forward(
    layer: LoraLinear,
    plain: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    dtype: torch.dtype | None,
    inputs: _Inputs,
    given: torch.Tensor,
    *arguments: Any,
    **keywords: Any,
) -> torch.Tensor:
    if arguments or keywords or layer.disable_adapters or layer.merged:
        return plain(given, *arguments, **keywords)
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    weight = weight if dtype is None else weight.to(dtype)
    rounded = inputs(given, weight.dtype)
    bias = layer.base_layer.bias
    found: torch.Tensor = _Adapted.apply(
        given, rounded, weight, bias, down, up, float(layer.scaling[name])
    )
    return found


class _Adapted(torch.autograd.Function):
    """y = x W^T + b + s u B^T of u = x A^T; W and b are not trained.

    With g the gradient of y and t = s g B: dx = g W + t A, dA = t^T x, dB = s g^T u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        rounded: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Return y (..., out), in the type of W.

        Args:
            ctx: keeps what the backward pass needs.
            given: x, (..., in).
            rounded: the same, (tokens, in), in the type of W.
            weight: W, (out, in).
            bias: b, (out,).
            down: A, (rank, in).
            up: B, (out, rank).
            scale: s.
        """
        dtype = weight.dtype
        down, up = down.to(dtype), up.to(dtype)
        within = rounded @ down.t()
        output = rounded @ weight.t()
        output.addmm_(within, up.t(), alpha=scale)
        if bias is not None:
            output += bias.to(dtype)
        ctx.save_for_backward(rounded, within, weight, down, up)
        ctx.scale, ctx.dtype = scale, given.dtype
        return output.view(*given.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        rounded, within, weight, down, up = ctx.saved_tensors
        rises = upstream[0].flatten(0, -2).to(weight.dtype)
        inner = (rises @ up).mul_(ctx.scale)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = (rises @ weight).addmm_(inner, down)
            of_input = of_input.view(*upstream[0].shape[:-1], -1).to(ctx.dtype)
        of_down = (inner.t() @ rounded).float()
        of_up = (rises.t() @ within).float().mul_(ctx.scale)
        return of_input, None, None, None, of_down, of_up, None
