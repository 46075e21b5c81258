"""How a language model is run: arguments, longest input, logits, and given back as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from llm_pruner.errors import DiscoveryError, UserError

_STATES = re.compile("hidden|state|cache|key|attention|mem")


_needs_targets: WeakSet[nn.Module] = WeakSet()


def find_logits(output: Any, depth: int = 3) -> torch.Tensor | None:
    """Return the logits of a model's output, or None.

    That is the output itself, what is called ``logits`` in it, or the first tensor of real numbers
    in a tuple, list, mapping or object that is no single number (a loss), nor by its name a state.

    Args:
        depth: how many of them may lie in each other.
    """
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and output.dim() > 1 else None
    if isinstance(output, Mapping):
        parts = dict(output)
    elif hasattr(output, "_asdict"):
        parts = output._asdict()
    elif isinstance(output, tuple | list):
        parts = dict(enumerate(output))
    else:
        parts = dict(getattr(output, "__dict__", {}))
    rest = [part for name, part in parts.items() if not _STATES.search(str(name))]
    for part in [parts.get("logits", getattr(output, "logits", None)), *rest] if depth else ():
        found = find_logits(part, depth - 1)
        if found is not None:
            return found
    return None


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, whatever it is wrapped in.

    Raises:
        DiscoveryError: there are none.
    """
    logits = find_logits(output)
    if logits is None:
        kind = type(output).__name__
        raise DiscoveryError(f"the model returns {kind}, in which no logits are found")
    return logits


def run_for_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Run a model and return the logits of all positions, shape (samples, seq_len, vocabulary).

    A model that gives those of the last position alone gives all of them beside a loss, so it is
    given targets if it takes some.

    Raises:
        UserError: there are no logits of three dimensions, or not of all positions.
    """
    targets = {"targets": input_ids} if model in _needs_targets else {}
    output = model(input_ids, **targets)
    logits = find_logits(output)
    if logits is None or logits.ndim != 3:
        raise UserError(
            f"the model returns {type(output).__name__} without logits of shape (samples, seq_len, "
            "vocabulary), so it has no loss; use a causal language model"
        )
    if logits.shape[1] == input_ids.shape[1]:
        return logits
    if targets or "targets" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"the model returns logits for {logits.shape[1]} of {input_ids.shape[1]} positions, so "
            "it has no loss; let it return those of all positions"
        )
    _needs_targets.add(model)
    return run_for_logits(model, input_ids)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper with adapters (PEFT) hands its arguments to."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's forward pass by name."""
    return inspect.signature(base_model(model).forward).parameters


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the forward argument, and output field, that holds the cache.

    transformers calls it ``cache``, and earlier ``past_key_values``. None if there is neither.
    """
    names = parameters_of(model)
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def maximum_length(model: Any) -> int | None:
    """Return the longest input that the model's config allows, None where it sets no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [
        value
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "block_size")
        if type(value := getattr(text, name, None)) is int and value > 0
    ]
    return min(found, default=None)


def embedding_rows(model: Any) -> int:
    """Return the number of rows of the input embedding, that is of token ids."""
    return int(model.get_input_embeddings().weight.shape[0])


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters without values."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode for the time of the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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
