"""Runs the twin, the dense model with the removed units silenced, and the pruned model like it.

The twin runs the dense model with every slice of the removed units set to zero. Where an operation
would still see the dead positions (a mean, a norm, a softmax, a top-k over the axis they lie on),
it is computed on the living positions only. Nothing is sliced and no size changes, so the twin does
not share the surgery's way of being wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from llm_pruner.discovery.run import (
    changed_since,
    in_view,
    label_model,
    named_tensors,
    tokens_of,
    traced,
    watched,
)
from llm_pruner.errors import InfeasibleError, VerificationError, in_short
from llm_pruner.models.forward import module_of, token_ids
from llm_pruner.models.streaming import is_streamed, zeroed
from llm_pruner.models.synchronized_runs import Job, Outcome, Side, in_step, result_of, together
from llm_pruner.surgery.removal import checked_removal, removed_modules, removed_positions
from llm_pruner.tracing.calls import hidden_in
from llm_pruner.tracing.ops import Call, Operation
from llm_pruner.tracing.scenes import Scene, few, staged, unwritten
from llm_pruner.tracing.trace import Trace
from llm_pruner.tracing.tracer import Tracer
from llm_pruner.types import Discovery, IntArray, Removal

Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

Logits: TypeAlias = list[torch.Tensor]
"""Of each call of the model in a scene."""


class _Twin(Tracer):
    """A tracer that computes reductions on living positions only."""

    def __init__(self, trace: Trace, deleted: Flags) -> None:
        super().__init__(trace)
        self._deleted = deleted

    def dead(self, rows: IntArray) -> Flags:
        """Return by position of an axis whether it is removed."""
        roots = self.atoms.resolve(rows)
        if not roots.shape[1]:
            return np.zeros(len(rows), bool)
        known = np.where(roots < len(self._deleted), roots, 0)
        return np.asarray(self._deleted[known].any(axis=1))

    def alive(self, tensor: torch.Tensor, dim: int) -> torch.Tensor | None:
        """Return the living positions of an axis of a tensor, or None if all live."""
        dead = self.dead(self.label(tensor)[dim])
        if not dead.any():
            return None
        return torch.from_numpy(np.flatnonzero(~dead)).to(tensor.device)

    def follow(self, known: Operation, call: Call, args: tuple[Any, ...]) -> None:
        """Put zeros where an operation divided zero by zero at dead positions."""
        super().follow(known, call, args)
        for result in () if known.view else call.results:
            # Numbers of one byte are rounded from others, which had their zeros.
            if not result.is_floating_point() or result.element_size() == 1 or _is_finite(result):
                continue
            for dim, rows in enumerate(self.label(result)):
                dead = self.dead(rows)
                if dead.any():
                    shape = [-1 if place == dim else 1 for place in range(result.dim())]
                    mask = torch.from_numpy(dead).to(result.device).view(shape)
                    result.masked_fill_(mask & ~result.isfinite(), 0)

    def execute(self, known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if known.op.alive is None:
            return super().execute(known, args, kwargs)

        def run(**changed: Any) -> Any:
            return known.func(**{**known.given(args, kwargs), **changed})

        return known.op.alive(self.alive, run, **known.asked(known.op.alive, args, kwargs))


def _is_finite(tensor: torch.Tensor) -> bool:
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


@contextmanager
def _silenced(model: nn.Module, discovery: Discovery, removal: Removal) -> Iterator[None]:
    saved: list[tuple[torch.Tensor, Any, torch.Tensor]] = []
    tensors = {name: tensor for name, tensor, _ in named_tensors(model)}
    streamed = ExitStack()
    try:
        for (name, dim), positions in removed_positions(discovery, removal).items():
            if is_streamed(tensors[name]):
                gone = torch.from_numpy(positions)
                streamed.enter_context(zeroed(tensors[name], dim, gone))
                continue
            tensor = tensors[name].detach()
            if not tensor.is_floating_point():
                continue
            index: Any = (*[slice(None)] * dim, torch.from_numpy(positions).to(tensor.device))
            saved.append((tensor, index, tensor[index].clone()))
            tensor[index] = 0
        yield
    finally:
        streamed.close()
        # Slices along two axes overlap: the first one saved holds the original values.
        for tensor, index, part in reversed(saved):
            tensor[index] = part


@contextmanager
def _bypassed(model: nn.Module, modules: tuple[str, ...]) -> Iterator[None]:
    given: dict[nn.Module, torch.Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # A layer may write into what it is given.
        given[module] = hidden_in(args, kwargs).clone()

    def after(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
        source = given.pop(module)
        if isinstance(output, tuple | list):
            return type(output)([source, *output[1:]])
        return source

    with ExitStack() as hooks:
        for name in modules:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield


def twin_logits(
    model: nn.Module, discovery: Discovery, removal: Removal, tokens: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the logits of the dense model with the removed units silenced.

    Args:
        model: the dense model that was traced; it comes back unchanged.
        removal: group name -> units, in any collection, or a mask that is true for them.
        tokens: token ids, shape (batch, sequence), for the first scene of the trace; None for all
            scenes with random tokens.

    Returns:
        One tensor (batch, tokens of the call, vocabulary) per call of the model.

    Raises:
        InfeasibleError: a group is unknown, or has no such units; or the discovery is not of this
            model.
        UserError: the tokens are none of the model's.
    """
    model, removal = module_of(model), checked_removal(discovery, removal)
    if changed := changed_since(model, discovery):
        raise InfeasibleError(f"{changed}: run discover again on the model as it is now")
    return joined(run_twin(model, discovery, removal, _scenes(model, discovery, tokens)))


def pruned_logits(
    model: nn.Module, discovery: Discovery, tokens: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the logits of the pruned model on the tokens that ``twin_logits`` uses.

    Raises:
        VerificationError: the model cannot run.
        UserError: the tokens are none of the model's.
    """
    model = module_of(model)
    return joined(run_pruned(model, _scenes(model, discovery, tokens)))


def _scenes(
    model: nn.Module, discovery: Discovery, tokens: torch.Tensor | None
) -> tuple[Scene, ...]:
    scenes: tuple[Scene, ...] = discovery.graph.scenes
    return scenes if tokens is None else (replace(scenes[0], tokens=token_ids(tokens, model)),)


def joined(outcomes: Iterable[Outcome[Logits]]) -> Logits:
    return [*chain.from_iterable(map(result_of, outcomes))]


def run_twin(
    model: nn.Module, discovery: Discovery, removal: Removal, scenes: Sequence[Scene]
) -> list[Outcome[Logits]]:
    """Run scenes with the removed units silenced."""
    jobs = _jobs(partial(_twin_scene, discovery, removal), model, scenes)
    with in_view(model), _silenced(model, discovery, removal):
        return [*in_step(model, jobs, "verify: twin")]


def run_pruned(model: nn.Module, scenes: Sequence[Scene]) -> Iterator[Outcome[Logits]]:
    """Run scenes on the same tokens."""
    return in_step(model, _jobs(_pruned_scene, model, scenes), "verify: pruned")


def run_both(
    dense: nn.Module,
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    scenes: Sequence[Scene],
) -> tuple[list[Outcome[Logits]], list[Outcome[Logits]]]:
    """Run streamed models as ``run_twin`` and ``run_pruned`` do, with half the reads."""
    twin = _jobs(partial(_twin_scene, discovery, removal), dense, scenes)
    pruned = _jobs(_pruned_scene, model, scenes)
    # Only the twin is to be in view.
    sides = [Side(dense, twin, partial(in_view, dense)), Side(model, pruned)]
    with _silenced(dense, discovery, removal):
        found = together(sides, "verify: blocks")
    return found[: len(scenes)], found[len(scenes) :]


def _jobs(
    run: Callable[[Scene, torch.Tensor, nn.Module], Logits],
    model: nn.Module,
    scenes: Sequence[Scene],
) -> list[Job[Logits]]:
    return [partial(run, one, tokens_of(model, one, seed=1)) for one in scenes]


def _twin_scene(
    discovery: Discovery, removal: Removal, scene: Scene, tokens: torch.Tensor, model: nn.Module
) -> Logits:
    graph = discovery.graph
    trace = Trace(atoms=copy.deepcopy(graph.trace.atoms), tensors=dict(graph.trace.tensors))
    deleted = graph.system.with_replicas(graph.deleted(removal))
    twin = _Twin(trace, deleted)
    gone = removed_modules(discovery, removal)
    # Sizes keep their origin as in the trace, so that the same axes are fixed.
    with traced(model, twin), _bypassed(model, gone):
        label_model(twin, model)
        logits = watched(model, scene, tokens, twin)
    return [few(tensor.detach()).clone() for tensor in logits]


def _pruned_scene(scene: Scene, tokens: torch.Tensor, model: nn.Module) -> Logits:
    try:
        with staged(model, training=scene.training), unwritten(model):
            logits = scene.run(model, tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may end in any
        raise VerificationError(
            f"the pruned model cannot run on {scene.name} ({in_short(error)}); nothing was saved. "
            "Leave the structure out with --structures, and please report the model."
        ) from error
    return [few(tensor.detach()).clone() for tensor in logits]
