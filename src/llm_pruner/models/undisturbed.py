"""Borrow a model for gradients and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no parameter requires a gradient, no cache. Outside: nothing changed.

    ``.grad`` is never touched, because gradients are taken with ``torch.autograd.grad``.
    """
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caches = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        for config, _ in caches:
            config.use_cache = False
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for config, value in caches:
            config.use_cache = value
