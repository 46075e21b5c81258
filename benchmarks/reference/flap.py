"""FLAP (arXiv 2312.11983) written from its paper, for models with grouped key-value heads.

The repository needs transformers 4.28 and has no grouped heads. This is its default structure
``AL-AM``: every unit of every layer in one ranking. Of a consumer's input x_j (``o_proj``,
``down_proj``) the metric is Var(x_j) ||W_j||^2, over all tokens, squared for attention as in its
code; standardized within each layer and kind, (m - mean) / std; a head has the mean of its
channels. Heads count for as many units as their parameters are worth. What a removed input was on
average becomes a bias: b = sum_j W_j E[x_j]. A key-value head goes with the query heads that read
it. The dense shapes are kept and what is removed is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def flap(model: Any, windows: torch.Tensor, wanted: int) -> tuple[nn.Module, int]:
    """Return the masked model with its biases, and how many parameters are left.

    Args:
        model: a Llama of transformers.
        windows: calibration tokens, (samples, length).
        wanted: parameters; the biases count.
    """
    config, layers = model.config, model.model.layers
    heads = config.num_key_value_heads
    mean, variance = _moments(model, windows)
    attention, mlp = [], []
    for layer in layers:
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        one = _standard((variance[o] * o.weight.square().sum(0)).square())
        attention.append(one.view(heads, -1).mean(1))
        mlp.append(_standard(variance[down] * down.weight.square().sum(0)))
    scores = torch.cat([torch.cat(attention), torch.cat(mlp)])
    per_head = sum(
        one.weight.numel()
        for one in (getattr(layers[0].self_attn, f"{name}_proj") for name in "qkvo")
    )
    prices = torch.full((len(scores),), 3 * config.hidden_size)
    prices[: len(layers) * heads] = per_head // heads
    biases = 2 * config.hidden_size * len(layers)
    everything = sum(one.numel() for one in model.parameters()) + biases
    order = scores.argsort()
    left = everything - prices[order].cumsum(0)
    count = int((left - wanted).abs().argmin()) + 1
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[order[:count]] = True
    of_heads = gone[: len(layers) * heads].view(len(layers), heads)
    of_mlp = gone[len(layers) * heads :].view(len(layers), -1)
    biased = type(model)(_with_biases(config)).eval()
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.tie_weights()
    for old, layer, lost, channels in zip(
        layers, biased.model.layers, of_heads, of_mlp, strict=True
    ):
        of_o = lost.repeat_interleave(layer.self_attn.o_proj.in_features // heads)
        for was, one, removed in (
            (old.self_attn.o_proj, layer.self_attn.o_proj, of_o),
            (old.mlp.down_proj, layer.mlp.down_proj, channels),
        ):
            one.bias.copy_(one.weight[:, removed] @ mean[was][removed])
            one.weight[:, removed] = 0
        value = layer.self_attn.v_proj  # zero on both sides, or training would bring heads back
        value.weight.view(heads, -1, config.hidden_size)[lost] = 0
        for name in "qkv":
            getattr(layer.self_attn, f"{name}_proj").bias.zero_()
        for one in (layer.mlp.gate_proj, layer.mlp.up_proj):
            one.bias.zero_()
            one.weight[channels] = 0
    return biased, int(left[count - 1])


def _standard(metric: torch.Tensor) -> torch.Tensor:
    return (metric - metric.mean()) / metric.std()


def _moments(model: Any, windows: torch.Tensor) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return mean and variance over tokens of the inputs of each consumer."""
    sums: dict[Any, torch.Tensor] = {}
    squares: dict[Any, torch.Tensor] = {}

    def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        flat = inputs[0].flatten(0, -2).double()
        sums[module] = sums.get(module, 0) + flat.sum(0)
        squares[module] = squares.get(module, 0) + flat.square().sum(0)

    consumers = [
        one for layer in model.model.layers for one in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    handles = [one.register_forward_pre_hook(seen) for one in consumers]
    for row in windows:
        model.model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    mean = {one: sums[one] / windows.numel() for one in consumers}
    variance = {one: (squares[one] / windows.numel() - mean[one] ** 2).float() for one in consumers}
    return {one: found.float() for one, found in mean.items()}, variance


def _with_biases(config: Any) -> Any:
    return type(config)(**{**config.to_dict(), "attention_bias": True, "mlp_bias": True})
