"""What the sweep needs to know about a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY = 64

Positions = dict[tuple[str, int], np.ndarray[Any, Any]]
"""Removed positions of each (tensor, axis)."""


@dataclass(frozen=True)
class Spec:
    """A tiny model and how it is used.

    Attributes:
        name: unique.
        package: on PyPI, or ``own``.
        build: makes the model.
        lengths: of the prefills compared.
        call: runs the model on token ids (batch, tokens), where its forward takes them in another
            way; also how the project is told to run it.
        masked: runs it with a mask of ones and zeros of the shape of the ids.
        generate: greedy generation by the model's own code, 8 tokens behind the ids; returns what
            is to be compared.
        noise: size of the random weights.
        by_hand: cuts from the dense model, in the package's own words, what the oracle cannot
            follow, and returns the (tensor, axis) it cut. Takes the positions removed from each.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    lengths: tuple[int, ...] = (8, 40, 300)
    call: Callable[[nn.Module, torch.Tensor], Any] | None = None
    masked: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any] | None = None
    generate: Callable[[nn.Module, torch.Tensor], list[torch.Tensor]] | None = None
    noise: float = 0.15
    by_hand: Callable[[nn.Module, Positions], set[tuple[str, int]]] | None = None


SPECS: dict[str, Spec] = {}


def add(name: str, package: str, build: Callable[[], nn.Module], **rest: Any) -> None:
    """Put a model on the list."""
    assert name not in SPECS, name
    SPECS[name] = Spec(name, package, build, **rest)


def make(spec: Spec, seed: int = 0) -> nn.Module:
    """Return the random model in float32 and eval mode.

    Biases and norms are random as well: at zeros and ones a mistake in them would go unseen.
    """
    torch.manual_seed(seed)
    model = spec.build()
    for module in model.modules():
        # Experts of one package are made without weights, to be loaded later.
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, key, nn.Parameter(torch.zeros(parameter.shape)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1:
                parameter.copy_(torch.nan_to_num(parameter) + 0.3 * noise)
            else:
                parameter.copy_(spec.noise * noise)
    return model.float().eval()


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of an output, whatever they are wrapped in."""
    while not isinstance(output, torch.Tensor):
        if isinstance(output, dict):
            output = output["logits"] if "logits" in output else next(iter(output.values()))
        elif isinstance(output, tuple | list):
            output = output[0]
        else:
            output = output.logits
    return output
