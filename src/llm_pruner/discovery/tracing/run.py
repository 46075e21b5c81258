"""Runs a language model on a few tokens under the tracer."""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_pruner.discovery.tracing.code import code_line
from llm_pruner.discovery.tracing.functions import SizeMode
from llm_pruner.discovery.tracing.ghosts import GhostTracer, ghosts_of
from llm_pruner.discovery.tracing.given import GivenValues, hidden_in
from llm_pruner.discovery.tracing.provenance import descriptions, traced_attributes, without_memory
from llm_pruner.discovery.tracing.rules import RULES
from llm_pruner.discovery.tracing.scenes import (
    Forward,
    Scene,
    is_of_transformers,
    shorter,
    staged,
)
from llm_pruner.discovery.tracing.sizes import COMPARISONS, PLACE, Equation, Expr, evaluate, leaves
from llm_pruner.discovery.tracing.stand_ins import in_sight
from llm_pruner.discovery.tracing.tracer import Trace, Tracer
from llm_pruner.discovery.tracing.unreached import Siblings
from llm_pruner.discovery.tracing.vocabulary import find_vocabulary_size
from llm_pruner.errors import DiscoveryError, LLMPrunerError
from llm_pruner.models.forward import cache_argument, is_on_meta, logits_of, parameters_of
from llm_pruner.types import IntArray

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
        with staged(model):
            return find_vocabulary_size(model, run, device)
    except DiscoveryError:
        # Ids that were moved or packed before they are looked up are lost sight of.
        tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
        if not tables:
            raise
        return int(tables[0].weight.shape[0])


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


class Layers:
    """Notes for each child of each module list whether its output can replace its input."""

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self.tracer = tracer
        self.seen: dict[str, list[tuple[Any, Any]]] = {}
        self.first: dict[str, str] = {}
        # A weak reference: holding a tensor would change the operations of the run.
        self.last: dict[str, weakref.ref[torch.Tensor]] = {}
        self.beside: dict[str, list[weakref.ref[torch.Tensor]]] = {}
        self.given: dict[tuple[str, int | str], weakref.ref[torch.Tensor]] = {}
        self.values = GivenValues()
        self.handles = []
        for path, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            children: Mapping[str, nn.Module | None] = module._modules
            for index, child in children.items():
                # A place may be empty, and TorchScript takes no hooks.
                if child is None or isinstance(child, torch.jit.ScriptModule):
                    continue
                if not index.isdigit():  # a part that was added beside the items
                    continue
                name = f"{path}.{index}"
                self.handles.append(child.register_forward_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            source = hidden_in(args, kwargs)
            parent = name.rpartition(".")[0]
            where = self.values.where.get(parent) or code_line(passing_calls=True)
            self.values.note(name, where, args, kwargs, source)
            result = output[0] if isinstance(output, tuple | list) and output else output
            axes = (self.tracer.axes(source), self.tracer.axes(result))
            shapes_differ = (
                axes[0] is None
                or axes[1] is None
                or [len(r) for r in axes[0]] != [len(r) for r in axes[1]]
            )
            # Each child must be given what the one before it returned: a caller that adds the
            # input itself would add it twice once the child is gone.
            before = self.last.get(parent)
            chained = self.first.setdefault(parent, name) == name or (
                before is not None and before() is source
            )
            chained = self._stands_alone(parent, source, args, kwargs) and chained
            if isinstance(result, torch.Tensor):
                self.last[parent] = weakref.ref(result)
            rest = output[1:] if isinstance(output, tuple | list) else ()
            self.beside[parent] = [weakref.ref(t) for t in rest if isinstance(t, torch.Tensor)]
            self.seen.setdefault(name, []).append(
                # Batch and sequence aside: the last axis first, then what lies between (streams).
                (
                    [axes[0][-1], *axes[0][2:-1]],  # type: ignore[index]
                    [axes[1][-1], *axes[1][2:-1]],  # type: ignore[index]
                )
                if chained and not shapes_differ
                else (None, None)
            )

        return hook

    def _stands_alone(self, parent: str, source: Any, args: Any, kwargs: Any) -> bool:
        """Whether a child is given nothing of the ones before it but the hidden states.

        Not so if it is given what the last one returned beside them, or another tensor of the
        hidden size that is not the same for all children (the states of earlier layers).
        """
        alone = True
        made = self.beside.get(parent, [])
        for key, value in [*enumerate(args), *kwargs.items()]:
            if not isinstance(value, torch.Tensor) or value is source:
                continue
            if any(other() is value for other in made):
                alone = False
            before = self.given.get((parent, key))
            self.given[parent, key] = weakref.ref(value)
            axes, hidden = self.tracer.axes(value), self.tracer.axes(source)
            if before is None or before() is value or not axes or not hidden:
                continue
            a, b = (self.tracer.atoms.resolve(rows[-1]) for rows in (axes, hidden))
            if a.size and a.shape == b.shape and bool((a == b).all()):
                alone = False
        return alone

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


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
            return _run(model, scenes, tokens, GhostTracer(Trace(), RULES))
    return _run(model, scenes, tokens, Tracer(Trace(), RULES))


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
        calls: for every child of a module list the rows of the axes of its input and output at each
            call, the last first, without batch and sequence.
        given: what the children of module lists were given beside the hidden states.
        scenes: those that the model was run in.
        left_out: names of the others.
    """

    trace: Trace
    aliases: dict[str, str]
    calls: dict[str, list[tuple[Any, Any]]]
    given: GivenValues
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
    _tie_copies(trace, model)
    _follow_beside(trace, model)
    _freeze_unreached(trace, aliases)
    _settle(trace, _described(trace, model))
    return Run(trace, aliases, layers.seen, layers.values, tuple(done), tuple(left_out))


@contextmanager
def traced(model: nn.Module, tracer: Tracer) -> Iterator[dict[Expr, int]]:
    """Give the sizes that a model holds an origin for the time of the context."""
    with (
        staged(model),
        in_sight(model),
        traced_attributes(model, tracer.used_as_number) as attributes,
        without_memory(),
    ):
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


def _described(trace: Trace, model: nn.Module) -> dict[Expr, IntArray]:
    """Return for the sizes that standard modules state of themselves the rows of the axis."""
    return {
        ("attr", path, attribute): trace.tensors[f"{path}.weight"][dim]
        for path, module in model.named_modules()
        for attribute, dim in descriptions(module)
        if f"{path}.weight" in trace.tensors and len(trace.tensors[f"{path}.weight"]) > dim
    }


def _tie_copies(trace: Trace, model: nn.Module) -> None:
    """Let a buffer that the run did not read follow an equal one of its module that it read.

    Rotary embeddings keep such a copy of their frequencies, to go back to it.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [
            (f"{prefix}{key}", value)
            for key, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items()
            if isinstance(value, torch.Tensor) and f"{prefix}{key}" in trace.tensors
        ]
        read = [(name, tensor) for name, tensor in own if name in trace.order]
        for name, tensor in own:
            if name in trace.order:
                continue
            for other, twin in read:
                if twin.shape == tensor.shape and torch.equal(twin, tensor):
                    for left, right in zip(trace.tensors[name], trace.tensors[other], strict=True):
                        trace.atoms.unify(left, right)
                    trace.order[name] = trace.order[other]
                    break


def _follow_beside(trace: Trace, model: nn.Module) -> None:
    """Let a parameter that the run did not read follow one of its module with the same last axes.

    Attention keeps such a bias for segments beside one for content, and reads it if given segments.
    """
    for path, module in model.named_modules():
        own = {f"{path}.{key}" if path else key: p for key, p in module._parameters.items()}
        read = [(name, p) for name, p in own.items() if name in trace.order and p is not None]
        for name, parameter in own.items():
            if parameter is None or name in trace.order or name not in trace.tensors:
                continue
            for other, like in read:
                count = like.dim()
                if count > 1 and parameter.shape[-count:] == like.shape:
                    left, right = trace.tensors[name], trace.tensors[other]
                    for rows in left[:-count]:
                        trace.atoms.freeze(rows, "not reached by the forward pass")
                    for mine, others in zip(left[-count:], right, strict=True):
                        trace.atoms.unify(mine, others)
                    trace.order[name] = trace.order[other]
                    break


def _freeze_unreached(trace: Trace, aliases: dict[str, str]) -> None:
    """Freeze tensors that the run did not read, and those at the same place in their siblings.

    What was not read may be read with other tokens (an expert that no token chose), and would not
    fit then if its siblings shrank.
    """
    reached = set(trace.order) | {alias for alias, first in aliases.items() if first in trace.order}
    missed = [name for name in trace.tensors if name not in reached]
    siblings: dict[str, list[str]] = defaultdict(list)
    for name in trace.tensors:
        siblings[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    for name in missed:
        for other in siblings[re.sub(r"\.\d+\.", ".*.", name)]:
            reason = "not reached by the forward pass"
            for rows in trace.tensors[other]:
                trace.atoms.freeze(rows, reason if other == name else f"{name} was {reason}")


def _state_equal(trace: Trace, left: Expr, right: Expr) -> None:
    """Record that code compares a size with an attribute, and goes on only if they are equal."""
    if right[0] == "len":
        left, right = right, left
    if left[0] == "len" and right[0] == "attr":
        trace.equations.append(Equation(right, trace.lengths[left[1]], "a comparison"))


def _may_turn(expr: Expr, old: Mapping[Expr, int]) -> bool:
    """Whether a comparison of one size with a constant comes out otherwise if the size shrinks.

    Whether there is more than one is asked everywhere, and answered right either way: code that
    repeats or loops does so once.
    """
    symbol, left, right = expr
    (leaf,) = set(leaves(expr))

    def holds(value: int) -> bool:
        one = {leaf: value}
        return COMPARISONS[symbol](evaluate(left, one), evaluate(right, one))

    now = holds(old[leaf])
    return any(holds(value) != now for value in range(2, old[leaf]))


def _settle(trace: Trace, described: Mapping[Expr, IntArray]) -> None:
    """Draw the conclusions that need the whole trace.

    Args:
        trace: what the run stated.
        described: attribute of a standard module -> rows of the axis whose size it states.
    """
    atoms = trace.atoms
    old = {**trace.attributes, **{("len", i): len(rows) for i, rows in enumerate(trace.lengths)}}
    as_number: dict[Expr, str] = {}
    for expr, where in trace.numbers.items():
        how = "used as a number"
        if expr[0] == PLACE:
            expr = expr[1]
        if expr[0] in COMPARISONS:
            read = set(leaves(expr))
            if len(read) > 1:
                left, right = (evaluate(side, old) for side in expr[1:])
                if expr[0] not in ("==", "!="):
                    trace.checks.append((expr, where))
                elif left == right:
                    # Two tensors may differ in size where they did not; the twin says if they may.
                    _state_equal(trace, expr[1], expr[2])
                continue
            try:
                if not _may_turn(expr, old):
                    continue
            except ZeroDivisionError:
                pass
            how = "compared with a number"
        for leaf in leaves(expr):
            if leaf[0] == "len":
                rows = trace.lengths[leaf[1]]
                atoms.freeze(rows, f"its size is {how} in the code ({where})")
            else:
                name = leaf[2].removeprefix("config.")
                as_number.setdefault(leaf, f"{name} is {how} in the code ({where})")
    for leaf, reason in as_number.items():
        if leaf in described:
            atoms.freeze(described[leaf], reason)
    # What a module states of itself is stated anew, so what it sizes elsewhere must shrink as well.
    sizing = {leaf for equation in trace.equations for leaf in leaves(equation.expr)}
    for leaf in sizing & described.keys():
        trace.equations.append(Equation(leaf, described[leaf], "its own weight"))
    # Where an attribute sizes an axis alone, that axis pins it: products with it are then free.
    alone = {equation.expr for equation in trace.equations if equation.expr in as_number}
    for equation in trace.equations:
        for leaf in leaves(equation.expr):
            if leaf in as_number and (equation.expr == leaf or leaf not in alone):
                atoms.freeze(equation.rows, as_number[leaf])
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
