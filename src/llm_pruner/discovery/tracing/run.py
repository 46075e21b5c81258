"""Runs a language model on a few tokens under the tracer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llm_pruner.discovery.tracing.rules  # noqa: F401 - fills the table of operations
from llm_pruner.discovery.tracing.calls import Layers, Siblings
from llm_pruner.discovery.tracing.functions import SizeMode
from llm_pruner.discovery.tracing.ghosts import GhostRunner, ghosts_of
from llm_pruner.discovery.tracing.ops import operation, tensors_in
from llm_pruner.discovery.tracing.provenance import traced_attributes, without_memory
from llm_pruner.discovery.tracing.scenes import (
    Forward,
    Scene,
    is_of_transformers,
    shorter,
    staged,
)
from llm_pruner.discovery.tracing.sizes import (
    Expr,
)
from llm_pruner.discovery.tracing.stand_ins import in_sight
from llm_pruner.discovery.tracing.trace import Trace, settle
from llm_pruner.discovery.tracing.tracer import Marks, Tracer
from llm_pruner.errors import DiscoveryError, LLMPrunerError
from llm_pruner.models.forward import cache_argument, is_on_meta, logits_of, parameters_of

LARGE = 50_000_000
"""Parameters from which on a model is traced on stand-ins for its weights."""


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


def vocabulary_size(
    model: nn.Module, forward: Callable[[nn.Module, torch.Tensor], Any] | None = None
) -> int:
    """Return how many token ids the model takes.

    Args:
        forward: how to run it, where it is not just called with them.

    Raises:
        DiscoveryError: it looks token ids up nowhere.
    """
    getter = getattr(model, "get_input_embeddings", None)
    if getter is not None:
        embedding = getter()
        if embedding is not None and hasattr(embedding, "weight"):
            return int(embedding.weight.shape[0])
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    run = forward or (lambda network, tokens: network(tokens))
    try:
        return _watched_size(model, run, device)
    except DiscoveryError:
        # Ids that were moved or packed before they are looked up are lost sight of.
        tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
        if not tables:
            raise
        return int(tables[0].weight.shape[0])


_known: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class _Watch(TorchDispatchMode):
    """Notes the sizes of the axes that token ids index; products need no true values for that."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._count = tokens.numel()
        self._ids = Marks()
        self._ids[tokens] = True
        self._ghosts = GhostRunner() if tokens.device.type == "cpu" else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = operation(func)
        for size, index in _lookups(known.name, known.given(args, kwargs)):
            if index in self._ids:
                # The ids are 0 and 1, so a larger index tells of an offset.
                self.sizes.append(size - int(index.max()) + 1)
        if self._ghosts is None:
            out = func(*args, **kwargs)
        else:
            out = self._ghosts.run(known, args, kwargs)
        followed = known.op.moves or known.op.keeps_ids
        if followed and any(tensor in self._ids for tensor in tensors_in(args)):
            for result in tensors_in([out]):
                alike = known.op.moves or result.numel() == self._count
                if result.dtype in (torch.int64, torch.int32) and alike:
                    self._ids[result] = True
        return out


def _lookups(name: str, given: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (size of the axis that is indexed, index)."""
    table: Any = given.get("self")
    if "weight" in given and "indices" in given:  # embedding, _embedding_bag and the like
        yield given["weight"].shape[0], given["indices"]
    elif name == "index":
        for size, index in zip(table.shape, given["indices"], strict=False):
            if index is not None:
                yield size, index
    elif "dim" in given and isinstance(given.get("index"), torch.Tensor) and table.dim():
        yield table.shape[given["dim"]], given["index"]
    elif name == "eq" and isinstance(given["other"], torch.Tensor) and given["other"].dim():
        # Compared with all ids there are, as one_hot does.
        yield given["other"].shape[-1], table


def _watched_size(
    model: nn.Module, run: Callable[[nn.Module, torch.Tensor], object], device: torch.device
) -> int:
    """Return how many token ids a model takes: the least size of all tables that ids index.

    The model is run on the ids 0 and 1, which every vocabulary has.

    Args:
        run: how the model is run on token ids (batch, sequence).
        device: where it takes them.

    Raises:
        DiscoveryError: no ids index anything.
    """
    if model in _known:
        return _known[model]
    tokens = (torch.arange(16) % 2).view(2, 8)
    failure: Exception | None = None
    with ghosts_of(model) if is_on_meta(model) else nullcontext():
        tokens = tokens if device.type == "meta" else tokens.to(device)
        watch = _Watch(tokens)
        try:
            with staged(model, contents=True), in_sight(model), watch:
                run(model, tokens)
        except Exception as error:  # what was seen until then may be enough
            failure = error
    sizes = [size for size in watch.sizes if size > 1]
    if not sizes:
        cause = f" (running it raised {type(failure).__name__}: {failure})" if failure else ""
        raise DiscoveryError(
            f"the model has no token embedding: {type(model).__name__} looks its token ids up in "
            f"no table{cause}; give one that maps token ids to logits"
        )
    _known[model] = min(sizes)
    return _known[model]


def example_tokens(
    model: nn.Module, shape: tuple[int, int] = (2, 8), seed: int = 0
) -> torch.Tensor:
    """Return seeded random token ids, shape (batch, sequence), where the model's weights are."""
    generator = torch.Generator().manual_seed(seed)
    size = vocabulary_size(model)
    low = min(8, size // 2)
    tokens = torch.randint(low, size, shape, generator=generator)
    device = next((parameter.device for parameter in model.parameters()), tokens.device)
    return tokens.to(device)


def forward_with_cache(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run a model as generation does: all tokens but the last at once, the last with the cache.

    A model that takes no cache, or is not run as those of ``transformers``, runs all at once.
    """
    if not is_of_transformers(model):
        return [logits_of(model(tokens))]
    parameters = parameters_of(model)
    name = cache_argument(model)
    first = model(input_ids=tokens[:, :-1], use_cache=name is not None)
    cache = getattr(first, name, None) if name is not None else None
    if cache is None:
        return forward_without_cache(model, tokens)
    given = {str(name): cache}
    if "output_router_logits" in parameters:
        # The loss over all routers takes a mask of the tokens of one call, not of all before it.
        given["output_router_logits"] = False
    step = model(input_ids=tokens[:, -1:], use_cache=True, **given)
    return [logits_of(first), logits_of(step)]


def forward_without_cache(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run all tokens at once; for models whose cache needs more."""
    # A state that the model makes itself (RWKV) is sized by settings, which is to be seen.
    makes_state = "state" in parameters_of(model)
    return [logits_of(model(input_ids=tokens, use_cache=makes_state))]


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


def run_trace(model: nn.Module, scenes: Sequence[Scene], tokens: torch.Tensor | None = None) -> Run:
    """Trace a model through scenes; one without weights (on meta) runs on stand-ins.

    Args:
        model: comes back as it was.
        scenes: the ways in which it is run; those that it cannot be run in are left out.
        tokens: token ids for the first scene; random ones by default.

    Raises:
        DiscoveryError: it cannot be run in a scene that is needed.
    """
    if is_on_meta(model) or _is_large(model):
        with ghosts_of(model, weights=True):
            return _run(model, scenes, tokens, Tracer(Trace(), GhostRunner()))
    return _run(model, scenes, tokens, Tracer(Trace()))


def _is_large(model: nn.Module) -> bool:
    """Whether stand-ins save time: products with the weights tell nothing about axes."""
    parameters = [*model.parameters()]
    on_cpu = all(one.device.type == "cpu" for one in (*parameters, *model.buffers()))
    return on_cpu and sum(one.numel() for one in parameters) > LARGE


@dataclass(frozen=True)
class Run:
    """What a traced run gave.

    Attributes:
        trace: settled.
        aliases: names of tied tensors -> first name.
        layers: what the children of module lists were given and returned.
        scenes: those that the model was run in.
        left_out: names of the others.
    """

    trace: Trace
    aliases: dict[str, str]
    layers: Layers
    scenes: tuple[Scene, ...]
    left_out: tuple[str, ...]


def _run(
    model: nn.Module, scenes: Sequence[Scene], tokens: torch.Tensor | None, tracer: Tracer
) -> Run:
    trace = tracer.trace
    aliases = label_model(tracer, model)
    layers, siblings = Layers(model, tracer), Siblings(model)
    done: list[Scene] = []
    left_out: list[str] = []
    try:
        with traced(model, tracer) as attributes:
            for scene in scenes:
                for attempt in (scene, *shorter(scene)):
                    ids = example_tokens(model, attempt.shape) if tokens is None else tokens
                    try:
                        _perform(model, attempt, ids, tracer)
                    except DiscoveryError:
                        if scene.needed:
                            raise
                        continue
                    done.append(attempt)
                    break
                else:
                    left_out.append(scene.name)
            layers.close()
            with tracer, SizeMode(tracer):
                siblings.run_rest(tracer)
            trace.attributes = dict(attributes)
    finally:
        layers.close()
        siblings.close()
    settle(trace, model, aliases)
    return Run(trace, aliases, layers, tuple(done), tuple(left_out))


@contextmanager
def traced(model: nn.Module, tracer: Tracer) -> Iterator[dict[Expr, int]]:
    """Give the sizes that a model holds an origin for the time of the context, without warnings."""
    with (
        staged(model),
        in_sight(model),
        warnings.catch_warnings(),
        traced_attributes(model, tracer.used_as_number) as attributes,
        without_memory(),
    ):
        warnings.simplefilter("ignore")
        yield attributes


def _perform(model: nn.Module, scene: Scene, tokens: torch.Tensor, tracer: Tracer) -> None:
    tracer.add_input(tokens, ("the batch", "the sequence"))
    tracer.vocabulary[tokens] = True
    with staged(model, training=scene.training), tracer, SizeMode(tracer):
        logits = _guarded(scene.run, model, tokens)
    for tensor in logits:
        for rows in tracer.label(tensor):
            tracer.freeze(rows, "the vocabulary")


def _guarded(forward: Forward, model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    try:
        return forward(model, tokens)
    except LLMPrunerError:
        raise
    except Exception as error:
        raise DiscoveryError(
            f"{type(model).__name__} cannot be traced: running it on {tuple(tokens.shape)} token "
            f"ids raised {type(error).__name__}: {error}"
        ) from error
