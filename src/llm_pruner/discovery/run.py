"""Runs a language model on a few tokens under the tracer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import llm_pruner.tracing.rules  # noqa: F401 - fills the table of operations
from llm_pruner.errors import DiscoveryError, LLMPrunerError
from llm_pruner.models.forward import (
    cache_argument,
    caching,
    input_embedding,
    is_on_meta,
    logits_of,
    parameters_of,
)
from llm_pruner.tracing.calls import Layers, Siblings
from llm_pruner.tracing.functions import SizeMode
from llm_pruner.tracing.ghosts import GhostRunner, ghosts_of
from llm_pruner.tracing.ops import Call, Operation
from llm_pruner.tracing.provenance import (
    put_back,
    spaces_of,
    trace_attributes_,
    without_memory,
)
from llm_pruner.tracing.scenes import (
    Scene,
    Unwritten,
    instead,
    is_of_transformers,
    staged,
)
from llm_pruner.tracing.sizes import Expr
from llm_pruner.tracing.stand_ins import in_sight
from llm_pruner.tracing.trace import Trace, settle
from llm_pruner.tracing.tracer import Tracer
from llm_pruner.types import Discovery, IntArray

LARGE = 50_000_000
"""Parameters from which on a model is traced on stand-ins for its weights."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, is a buffer) of parameters, buffers, plain attributes, by each name."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{key}" if path else key, value, True


def changed_since(model: nn.Module, discovery: Discovery) -> str:
    """Return which tensor changed since the model was traced, and how; empty if none did."""
    shapes = discovery.shapes
    tied = {name: shapes[first] for name, first in discovery.aliases.items() if first in shapes}
    traced = {**shapes, **tied}
    found = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    for name in (*dict(model.named_parameters()), *traced):
        now, before = found.get(name), traced.get(name)
        if now != before:
            is_now = "is gone" if now is None else f"has shape {now}"
            return f"{name} {is_now}, the traced model {'has none' if before is None else before}"
    return ""


def vocabulary_size(
    model: nn.Module, forward: Callable[[nn.Module, torch.Tensor], Any] | None = None
) -> int:
    """Return how many token ids the model, run as ``forward`` says, takes; or DiscoveryError."""
    embedding = input_embedding(model)
    if hasattr(embedding, "weight"):
        return int(embedding.weight.shape[0])
    if model not in _known:
        _known[model] = _watched_size(model, forward or (lambda network, ids: network(ids)))
    return _known[model]


_known: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class _Watch(Tracer):
    """Records the sizes of the axes that token ids index."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(Trace(), GhostRunner() if tokens.device.type == "cpu" else None)
        self.add_tokens(tokens)
        self.sizes: list[int] = []
        self._count = tokens.numel()

    def look_up(self, rows: IntArray, index: torch.Tensor) -> None:
        if index in self.vocabulary:
            # The ids are 0 and 1: a larger index has an offset.
            self.sizes.append(len(rows) - int(index.max()) + 1)

    def follow(self, known: Operation, call: Call, args: tuple[Any, ...]) -> None:
        super().follow(known, call, args)
        op = known.op
        if (op.moves or op.keeps_ids) and any(one in self.vocabulary for one in call.inputs):
            for result in call.results:
                alike = op.moves or result.numel() == self._count
                if result.dtype in (torch.int64, torch.int32) and alike:
                    self.vocabulary[result] = True


def _watched_size(model: nn.Module, run: Callable[[nn.Module, torch.Tensor], object]) -> int:
    """Return the size of the smallest table that a run on the ids 0 and 1 looks up."""
    tokens = (torch.arange(16, device="cpu") % 2).view(2, 8)
    failure = ""
    with ghosts_of(model) if is_on_meta(model) else nullcontext():
        tokens = tokens.to(_device(model))
        watch = _Watch(tokens)
        try:
            with staged(model), Unwritten(model), in_sight(model), watch:
                run(model, tokens)
        except Exception as error:  # what it looked up before may be enough
            failure = f" (running it raised {type(error).__name__}: {error})"
    sizes = [size for size in watch.sizes if size > 1]
    if not sizes:
        # The ids may have been packed before the lookup.
        kinds = (nn.Embedding, nn.EmbeddingBag)
        sizes = [one.num_embeddings for one in model.modules() if isinstance(one, kinds)][:1]
    if not sizes:
        raise DiscoveryError(
            f"the model has no token embedding: {type(model).__name__} looks its token ids up in "
            f"no table{failure}"
        )
    return min(sizes)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def example_tokens(
    model: nn.Module, shape: tuple[int, int] = (2, 8), seed: int = 0, vocabulary: int = 0
) -> torch.Tensor:
    """Return seeded random token ids, shape (batch, sequence), on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    size = vocabulary or vocabulary_size(model)
    low = min(8, size // 2)
    return torch.randint(low, size, shape, generator=generator, device="cpu").to(_device(model))


def tokens_of(model: nn.Module, scene: Scene, seed: int = 0) -> torch.Tensor:
    """Return the token ids of a scene: its own, or seeded random ones."""
    if scene.tokens is None:
        return example_tokens(model, scene.shape, seed, scene.vocabulary)
    return scene.tokens.to(_device(model))


def forward_with_cache(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run a model as generation does: all tokens but the last at once, the last with the cache.

    Without a cache all tokens run at once.
    """
    if not is_of_transformers(model):
        return [logits_of(model(tokens))]
    parameters = parameters_of(model)
    name = cache_argument(model)
    first = model(input_ids=tokens[:, :-1], **caching(model, name is not None))
    cache = getattr(first, name, None) if name is not None else None
    if cache is None:
        return forward_without_cache(model, tokens)
    given = {str(name): cache}
    if "output_router_logits" in parameters:
        # The router loss does not support a cache.
        given["output_router_logits"] = False
    step = model(input_ids=tokens[:, -1:], use_cache=True, **given)
    return [logits_of(first), logits_of(step)]


def forward_without_cache(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run all tokens at once."""
    # With a cache RWKV makes a state, whose sizes come from the config and must be seen.
    makes_state = "state" in parameters_of(model)
    return [logits_of(model(input_ids=tokens, **caching(model, makes_state)))]


def label_model(tracer: Tracer, model: nn.Module) -> dict[str, str]:
    """Label every tensor of the model; return the aliases of tied ones: other -> first name."""
    aliases: dict[str, str] = {}
    first_names: dict[int, str] = {}
    for name, tensor, _ in named_tensors(model):
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        else:
            tracer.add_tensor(name, tensor)
    return aliases


@dataclass(frozen=True)
class Run:
    """The result of a traced run.

    Attributes:
        trace: settled.
        aliases: names of tied tensors -> first name.
        layers: inputs and outputs of the children of module lists.
        scenes: those that the model was run in.
        left_out: names of the others.
    """

    trace: Trace
    aliases: dict[str, str]
    layers: Layers
    scenes: tuple[Scene, ...]
    left_out: tuple[str, ...]


def run_trace(model: nn.Module, scenes: Sequence[Scene]) -> Run:
    """Trace a model through scenes; it is not changed.

    If a scene fails, the model is traced anew without it, as what ran of it has tied sizes.
    Large models and those on the meta device run on ghosts (``ghosts``).

    Raises:
        DiscoveryError: it cannot be run in a scene that is needed.
    """
    run = _run_trace(model, scenes)
    if run.scenes == tuple(scenes):
        return run
    again = _run_trace(model, run.scenes)
    return replace(again, left_out=run.left_out + again.left_out)


def _run_trace(model: nn.Module, scenes: Sequence[Scene]) -> Run:
    stand_ins = is_on_meta(model) or _is_large(model)
    trace = Trace()
    tracer = Tracer(trace, GhostRunner() if stand_ins else None)
    with ghosts_of(model, weights=True) if stand_ins else nullcontext():
        aliases = label_model(tracer, model)
        with (
            closing(Layers(model, tracer)) as layers,
            closing(Siblings(model)) as siblings,
            in_view(model),
            traced(model, tracer) as trace.attributes,
        ):
            done = [_perform(model, scene, tracer) for scene in scenes]
            layers.close()
            with tracer, SizeMode(tracer):
                siblings.run_rest(tracer)
        settle(trace, model, aliases)
    left_out = [scene.name for scene, one in zip(scenes, done, strict=True) if one is None]
    return Run(trace, aliases, layers, tuple(filter(None, done)), tuple(left_out))


def _is_large(model: nn.Module) -> bool:
    """Whether the products with the weights, which a trace does not need, take long."""
    parameters = [*model.parameters()]
    on_cpu = all(one.device.type == "cpu" for one in (*parameters, *model.buffers()))
    return on_cpu and sum(one.numel() for one in parameters) > LARGE


@contextmanager
def in_view(model: nn.Module) -> Iterator[None]:
    """Make everything that a model does visible to a trace; one such context at a time."""
    with in_sight(model), warnings.catch_warnings(), without_memory():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def traced(model: nn.Module, tracer: Tracer) -> Iterator[dict[Expr, int]]:
    """Trace the integer attributes of a model inside, and yield attribute -> value."""
    with staged(model), put_back(spaces_of(model)):
        yield trace_attributes_(model, tracer.used_as_number)


def watched(
    model: nn.Module, scene: Scene, tokens: torch.Tensor, tracer: Tracer
) -> list[torch.Tensor]:
    """Run a scene with all operations passing through the tracer."""
    tracer.add_tokens(tokens)
    with (
        staged(model, training=scene.training),
        Unwritten(model),
        _outputs_kept(model, tracer),
        tracer,
        SizeMode(tracer),
    ):
        return scene.run(model, tokens)


_INSIDE = re.compile("logit|hidden|feature|state|atten|attn|key|value|cache|embed|loss|router")
"""Names of outputs whose axes may shrink."""


@contextmanager
def _outputs_kept(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Freeze classes that a model returns beside the logits, as numbers or as scores."""

    def note(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor in tracer.domains:
                tracer.freeze(tracer.domains[tensor], "its positions are returned")
        for name, tensor in dict(output).items() if isinstance(output, Mapping) else ():
            if isinstance(tensor, torch.Tensor) and tensor.dim() and not _INSIDE.search(str(name)):
                tracer.freeze(tracer.label(tensor)[-1], "it is returned by the model")

    handle = model.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _perform(model: nn.Module, scene: Scene, tracer: Tracer) -> Scene | None:
    """Run a scene, or a shorter one in its place; return which, None if none runs."""
    for attempt in (scene, *instead(scene)):
        ids = tokens_of(model, attempt)
        try:
            for logits in watched(model, attempt, ids, tracer):
                tracer.freeze_axes(logits, "the vocabulary")
            return attempt
        except LLMPrunerError as error:
            if scene.needed or not isinstance(error, DiscoveryError):
                raise
        except Exception as error:
            if scene.needed:
                raise DiscoveryError(
                    f"{type(model).__name__} cannot be traced: running it on {tuple(ids.shape)} "
                    f"token ids raised {type(error).__name__}: {error}"
                ) from error
    return None
