"""Runs a language model on a few tokens under the tracer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_pruner.errors import DiscoveryError
from llm_pruner.tracing.functions import SizeMode
from llm_pruner.tracing.provenance import traced_attributes
from llm_pruner.tracing.rules import RULES
from llm_pruner.tracing.sizes import Expr, leaves
from llm_pruner.tracing.tracer import Trace, Tracer
from llm_pruner.types import IntArray

Forward = Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]
"""Runs the model on token ids (batch, sequence); returns every logits tensor it computes."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, whether it is a buffer) for parameters, buffers and plain attributes.

    Tied parameters come once for each of their names.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{key}" if path else key, value, True


def vocabulary_size(model: nn.Module) -> int:
    """Return how many token ids the model's input embedding holds."""
    getter = getattr(model, "get_input_embeddings", None)
    if getter is not None:
        embedding = getter()
        if embedding is not None and hasattr(embedding, "weight"):
            return int(embedding.weight.shape[0])
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return int(module.num_embeddings)
    raise DiscoveryError("the model has no token embedding")


def example_tokens(
    model: nn.Module, batch: int = 2, length: int = 8, seed: int = 0
) -> torch.Tensor:
    """Return seeded random token ids, shape (batch, length), where the model's weights are."""
    generator = torch.Generator().manual_seed(seed)
    size = vocabulary_size(model)
    low = min(8, size // 2)
    tokens = torch.randint(low, size, (batch, length), generator=generator)
    device = next((parameter.device for parameter in model.parameters()), tokens.device)
    return tokens.to(device)


def forward_with_cache(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run all tokens but the last two at once, then those one by one with the cache.

    A model that takes no cache runs all tokens at once.
    """
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        return [logits_of(model(tokens))]
    name = _cache_name(model)
    if name is None:
        return [logits_of(model(input_ids=tokens, use_cache=False))]
    first = model(input_ids=tokens[:, :-2], use_cache=True)
    logits = [logits_of(first)]
    cache = getattr(first, name, None)
    if cache is None:
        return [logits_of(model(input_ids=tokens, use_cache=False))]
    for place in (tokens.shape[1] - 2, tokens.shape[1] - 1):
        step = model(input_ids=tokens[:, place : place + 1], use_cache=True, **{name: cache})
        cache = getattr(step, name)
        logits.append(logits_of(step))
    return logits


def _cache_name(model: nn.Module) -> str | None:
    """Return the name of the cache argument, which differs between releases of transformers."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, whatever it is wrapped in."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, tuple | list) and isinstance(output[0], torch.Tensor):
        return output[0]
    raise DiscoveryError(f"the model returns {type(output).__name__}, in which no logits are found")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def label_model(tracer: Tracer, model: nn.Module) -> dict[str, str]:
    """Give every tensor of the model its axes; return other name -> first name of tied ones."""
    aliases: dict[str, str] = {}
    first_names: dict[int, str] = {}
    for name, tensor, _ in named_tensors(model):
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        else:
            tracer.add_tensor(name, tensor)
    return aliases


class Layers:
    """Notes for each child of each module list whether its output can replace its input."""

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self.tracer = tracer
        self.seen: dict[str, list[tuple[Any, Any]]] = {}
        self.handles = []
        for path, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            for index, child in enumerate(module):
                name = f"{path}.{index}"
                self.handles.append(child.register_forward_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            source = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple | list) and output else output
            axes = (self.tracer.axes(source), self.tracer.axes(result))
            shapes_differ = (
                axes[0] is None
                or axes[1] is None
                or [len(r) for r in axes[0]] != [len(r) for r in axes[1]]
            )
            self.seen.setdefault(name, []).append(
                (None, None) if shapes_differ else (axes[0][-1], axes[1][-1])  # type: ignore[index]
            )

        return hook

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def run_trace(
    model: nn.Module, forward: Forward = forward_with_cache, tokens: torch.Tensor | None = None
) -> tuple[Trace, dict[str, str], dict[str, list[tuple[Any, Any]]]]:
    """Trace one forward pass.

    Returns the trace, the names of tied tensors, and for every child of a module list the rows of
    the last axis of its input and output at each call.
    """
    trace = Trace()
    tracer = Tracer(trace, RULES)
    tokens = example_tokens(model) if tokens is None else tokens
    aliases = label_model(tracer, model)
    tracer.add_input(tokens, ("the batch", "the sequence"))
    tracer.vocabulary[tokens] = True
    layers = Layers(model, tracer)
    try:
        with evaluating(model), traced_attributes(model, tracer.used_as_number) as attributes:
            with tracer, SizeMode(tracer):
                logits = forward(model, tokens)
            trace.attributes = dict(attributes)
    finally:
        layers.close()
    for tensor in logits:
        for rows in tracer.label(tensor):
            tracer.freeze(rows, "the vocabulary")
    _settle(trace)
    return trace, aliases, layers.seen


def _settle(trace: Trace) -> None:
    """Draw the conclusions that need the whole trace."""
    atoms = trace.atoms
    as_number: dict[Expr, None] = {}
    for expr in trace.numbers:
        for leaf in leaves(expr):
            if leaf[0] == "len":
                atoms.freeze(trace.lengths[leaf[1]], "its size is used as a number in the code")
            else:
                as_number[leaf] = None
    for equation in trace.equations:
        for leaf in leaves(equation.expr):
            if leaf in as_number:
                atoms.freeze(equation.rows, f"{leaf[2]} is used as a number in the code")
    changed = True
    while changed:
        # Freezing one replica axis may touch another, so go on until nothing changes.
        changed = False
        for ragged in trace.ragged:
            flat: IntArray = ragged.pairs.reshape(-1, 1)
            if atoms.resolve(ragged.inner).size == 0:
                if atoms.resolve(flat).size:
                    atoms.freeze(flat, atoms.reason(ragged.inner) or "its copies are fixed")
                    changed = True
            elif not atoms.is_replica(ragged.inner):
                before = atoms.resolve(flat)
                for pairs in ragged.pairs:
                    atoms.unify(pairs[:, None], ragged.inner)
                after = atoms.resolve(flat)
                changed |= before.shape != after.shape or not bool((before == after).all())
