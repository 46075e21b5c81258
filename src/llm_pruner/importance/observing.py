"""A forward and, for gates, a backward pass for activation criteria, block by block where possible.

Where the inputs of consumers are enough, each block runs once, and nothing above the last that is
watched. Else the loss is pulled back as well; no weight gradient is formed where a group's consumer
is a linear module: its input and the gradient of that input are enough. For other consumers (the
fused tensors of a mixture of experts) the gate's derivative is taken from the gradient of the
tensor, one sample at a time: the sum over a unit's slice of weight times gradient is the same
number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.boundary_pass import TOKENS, forward, hidden_form, parts_of, store_slope
from llm_pruner.importance.gradients import batches, loss_cotangent, pull_back
from llm_pruner.importance.needs import parameters_by_name
from llm_pruner.importance.observation import Observation
from llm_pruner.importance.taps import ConsumerTap, MixedSamplesError, segments, sum_segments
from llm_pruner.models.blockwise import Borders, Chain, NotBlockwise, find_chain
from llm_pruner.models.consumers import Consumer, consumers_of
from llm_pruner.models.forward import run_for_logits
from llm_pruner.runtime.progress import track
from llm_pruner.types import FloatArray, Group, Member

Measured = TypeVar("Measured")

_LOG = logging.getLogger(__name__)
_BUDGET = 2**26


def observe(
    model: nn.Module,
    input_ids: torch.Tensor,
    groups: Sequence[Group],
    needs: Collection[str],
    where_linear: Collection[str] = (),
) -> dict[str, Observation]:
    """Return what ``needs`` names of every group; see `measure`."""
    return measure(model, input_ids, groups, needs, lambda seen: seen, where_linear)


def measure(
    model: nn.Module,
    input_ids: torch.Tensor,
    groups: Sequence[Group],
    needs: Collection[str],
    formula: Callable[[Observation], Measured],
    where_linear: Collection[str] = (),
) -> dict[str, Measured]:
    """Return the formula's value for the observation of every group.

    In a chain of blocks it is called as soon as a group's block is done, and what was observed is
    dropped, so that no more than one block's Gram matrices are held.

    Args:
        model: in eval mode, with no parameter that requires a gradient.
        input_ids: shape (samples, seq_len), on the model's device.
        groups: what to look at.
        needs: of ``NEEDS``.
        formula: from an observation to what is wanted of it.
        where_linear: more of ``NEEDS``, for groups that a linear module reads.

    Raises:
        UserError: a group has no linear consumer and more than gates is asked for; layers are asked
            for in a model whose blocks do not run one after the other; a loss is not finite.
    """
    watch = _Watch(model, groups, needs, where_linear, input_ids, formula)
    try:
        chain = find_chain(model, input_ids, watch.parameters)
    except NotBlockwise as reason:
        if layers := [group.name for group in groups if group.kind == "layers"]:
            raise UserError(
                f"{layers[0]} cannot be scored by activations, because {reason}; use taylor, or "
                "leave layers out of the structures"
            ) from reason
        _LOG.info("activations of the whole model at once: %s", reason)
        chain = None
    if watch.looks_only:
        with watch.tap.listening(to_all=True), torch.no_grad():
            _look(chain, watch, input_ids)
    else:
        try:
            _pass(chain, watch, input_ids, together=not watch.weights)
        except MixedSamplesError:
            watch = _Watch(model, groups, needs, where_linear, input_ids, formula)
            _pass(chain, watch, input_ids, together=False)
    watch.finish(groups)
    return {group.name: watch.found[group.name] for group in groups}


def _look(chain: Chain | None, watch: _Watch[Any], input_ids: torch.Tensor) -> None:
    """Run forward, block by block unless something outside of the blocks is watched."""
    samples, length = input_ids.shape
    parts = batches(samples, max(1, TOKENS // length))
    highest = None if chain is None else _highest_block(watch, chain)
    if chain is None or highest is None:
        for part in track(parts, "activations"):
            watch.model(input_ids[part])
            watch.look(part)
        return
    inside = _groups_inside(watch, chain)
    with chain.opened():
        shape, dtype = hidden_form(chain, input_ids)
        with Borders(range(1), (samples, *shape), dtype, _BUDGET) as hidden:
            for part in parts:
                hidden.write(0, part, chain.entry(input_ids[part]))
            steps = [(index, part) for index in range(highest + 1) for part in parts]
            for index, part in track(steps, "activations: blocks"):
                _, output = chain.run_block(index, input_ids[part], hidden.read(0, part))
                hidden.write(0, part, output)
                watch.look(part)
                if part is parts[-1]:
                    watch.finish(inside[index])


def _pass(
    chain: Chain | None, watch: _Watch[Any], input_ids: torch.Tensor, *, together: bool
) -> None:
    samples, length = input_ids.shape
    with watch.tap.listening(), watch.gradients():
        if chain is not None:
            _blockwise(chain, watch, input_ids, together)
            return
        size = max(1, TOKENS // length) if together else 1
        for part in track(batches(samples, size), "activations"):
            logits = run_for_logits(watch.model, input_ids[part])
            cotangent = loss_cotangent(logits, input_ids[part], part.start)
            watch.pull([logits], [cotangent], part, list(watch.weights))


class _Watch(Generic[Measured]):
    """What is looked at, and the sums so far."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        needs: Collection[str],
        where_linear: Collection[str],
        input_ids: torch.Tensor,
        formula: Callable[[Observation], Measured],
    ) -> None:
        samples, length = input_ids.shape
        self.model, self.groups, self.needs, self.formula = model, groups, needs, formula
        self.found: dict[str, Measured] = {}
        self.consumers: dict[str, tuple[Consumer, ...]] = {}
        self.weights: dict[str, list[tuple[Group, Member]]] = {}
        known = parameters_by_name(model)
        for group in groups:
            if group.kind == "layers":
                continue
            self.consumers[group.name] = consumers_of(model, group)
            if self.consumers[group.name]:
                continue
            if set(needs) - {"gates", "tokens"}:
                raise UserError(
                    f"no linear module reads {group.name}, so its activations are unknown; use "
                    "the criterion fisher, gate or taylor"
                )
            for member in _last(group):
                self.weights.setdefault(member.tensor, []).append((group, member))
        self.parameters = {name: known[name] for name in self.weights}
        self.tap = ConsumerTap(model, self.consumers, (samples, length), {*needs, *where_linear})
        self.gates: dict[str, FloatArray] = {
            group.name: np.zeros((samples, segments(length), group.size)) for group in groups
        }

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside, the tensors that are read without a linear module require a gradient."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    @property
    def looks_only(self) -> bool:
        """Whether the inputs of consumers are all that is asked for."""
        asked = {*self.needs, *self.tap.needs}
        return not self.weights and asked <= {"moments", "gram"}

    def look(self, part: slice) -> None:
        """Take what a forward pass has shown."""
        seen = self.tap.taken()
        self.tap.give(part, seen, [None] * len(seen), 1.0)

    def pull(
        self,
        outputs: Sequence[torch.Tensor],
        cotangents: Sequence[tuple[torch.Tensor, float]],
        part: slice,
        names: Sequence[str],
        leaf: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, float]:
        """Pull a gradient back to all that is watched; return that of ``leaf`` and its factor."""
        tapped = self.tap.taken()
        inputs = [tensor for _, tensor in tapped] + [self.parameters[name] for name in names]
        if leaf is not None:
            inputs.append(leaf)
        if not inputs:
            return None, 1.0
        found, factor = pull_back(outputs, inputs, cotangents, part)
        self.tap.give(part, tapped, found[: len(tapped)], factor)
        for name, gradient in zip(names, found[len(tapped) :], strict=False):
            if gradient is not None:
                self._add_weight(name, part, gradient, factor)
        return (found[-1] if leaf is not None else None), factor

    def _add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:
        weight = self.parameters[name].detach()
        product = weight.to(torch.promote_types(weight.dtype, torch.float32)) * gradient
        for group, member in self.weights[name]:
            others = [axis for axis in range(product.ndim) if axis != member.dim]
            # A sum over no axes at all would be one over all of them.
            summed = product.sum(others) if others else product
            features = summed.double().mul(factor).cpu().numpy()
            self.gates[group.name][part, 0] += features[member.index].sum(1)

    def finish(self, groups: Sequence[Group]) -> None:
        """Apply the formula to groups that will see no more tokens."""
        left = [group for group in groups if group.name not in self.found]
        for group in left:
            gates = self.tap.gates.get(group.name, self.gates[group.name])
            seen = Observation(
                group,
                gates=gates if "gates" in self.needs else None,
                token_squares=self.tap.token_squares.get(group.name),
                readings=self.tap.readings(self.consumers.get(group.name, ())),
            )
            self.found[group.name] = self.formula(seen)
        for group in left:
            self.tap.forget(self.consumers.get(group.name, ()))


def _last(group: Group) -> list[Member]:
    """Return the members that execute last."""
    members = [member for member in group.members if not member.buffer]
    last = max((member.order for member in members), default=0)
    return [member for member in members if member.order == last]


def _blockwise(chain: Chain, watch: _Watch[Any], input_ids: torch.Tensor, together: bool) -> None:
    samples, count = len(input_ids), len(chain.blocks)
    parts, headed = parts_of(chain, input_ids, together)
    layers = [group for group in watch.groups if group.kind == "layers"]
    inside = _groups_inside(watch, chain)
    places = _places(watch.model, chain, layers)
    lowest = 0 if layers else _lowest_block(watch, chain)
    with chain.opened():
        shape, dtype = hidden_form(chain, input_ids)
        watch.tap.taken()
        full = (samples, *shape)
        slope_type = torch.promote_types(dtype, torch.float32)
        with (
            Borders(range(1), full, slope_type, _BUDGET) as slopes,
            Borders(range(lowest, count), full, dtype, _BUDGET) as borders,
        ):
            for part in track(headed, "activations: forward"):
                forward(
                    chain, input_ids, part, borders, slopes, range(lowest, count), tap=watch.tap
                )
            steps = [(i, part) for i in range(count - 1, lowest - 1, -1) for part in parts]
            for index, part in track(steps, "activations: blocks"):
                leaf, output = chain.run_block(index, input_ids[part], borders.read(index, part))
                slope = slopes.read(0, part).to(output.device)
                below, factor = watch.pull(
                    [output], [(slope, 1.0)], part, list(chain.owned[index]), leaf
                )
                for group in layers:
                    if index in places[group.name]:
                        step = (output.detach() - leaf.detach()).to(slope.dtype) * slope
                        watch.gates[group.name][part, :, places[group.name][index]] = (
                            sum_segments(step).sum(-1).double().cpu().numpy()
                        )
                store_slope(slopes, part, below, factor)
                if part is parts[-1]:
                    borders.drop(index)
                    watch.finish(inside[index])


def _groups_inside(watch: _Watch[Any], chain: Chain) -> list[list[Group]]:
    """Return, for each block, the groups that only modules of this block read."""
    found: list[list[Group]] = [[] for _ in chain.blocks]
    # Blocks are seen from the last to the first: a module of several blocks ends with the first.
    places = {
        id(module): index
        for index, block in reversed(list(enumerate(chain.blocks)))
        for module in block.modules()
    }
    readers: dict[str, set[str]] = {}
    for name, consumers in watch.consumers.items():
        for consumer in consumers:
            readers.setdefault(consumer.module, set()).add(name)
    for group in watch.groups:
        modules = [c.module for c in watch.consumers.get(group.name, ())]
        blocks = {places.get(id(watch.model.get_submodule(path))) for path in modules}
        (at,) = blocks if len(blocks) == 1 else (None,)
        # A module's sums are dropped with a group, so its other groups must end here too.
        if at is not None:
            found[at].append(group)
    whole = {group.name: at for at, groups in enumerate(found) for group in groups}
    for groups in found:
        groups[:] = [
            group
            for group in groups
            if all(
                whole.get(other) == whole[group.name]
                for consumer in watch.consumers[group.name]
                for other in readers[consumer.module]
            )
        ]
    return found


def _places(
    model: nn.Module, chain: Chain, groups: Sequence[Group]
) -> Mapping[str, Mapping[int, int]]:
    """Return, for each group of layers, block number -> unit."""
    number = {id(block): index for index, block in enumerate(chain.blocks)}
    found: dict[str, dict[int, int]] = {}
    for group in groups:
        places = {
            number[id(module)]: unit
            for unit, name in enumerate(group.modules)
            if id(module := model.get_submodule(name)) in number
        }
        if len(places) != group.size:
            raise UserError(
                f"{group.name} are not the blocks that the hidden state passes through, so their "
                "activations are unknown; use taylor, or leave layers out of the structures"
            )
        found[group.name] = places
    return found


def _watched(watch: _Watch[Any]) -> set[int]:
    modules = {c.module for found in watch.consumers.values() for c in found}
    return {id(watch.model.get_submodule(path)) for path in modules}


def _highest_block(watch: _Watch[Any], chain: Chain) -> int | None:
    """Return the last block that holds something watched; None if something is in no block."""
    watched = _watched(watch)
    blocks = [{id(module) for module in block.modules()} & watched for block in chain.blocks]
    if watched - set().union(*blocks):
        return None
    return max((index for index, found in enumerate(blocks) if found), default=-1)


def _lowest_block(watch: _Watch[Any], chain: Chain) -> int:
    """Return the first block that holds something watched."""
    watched = _watched(watch)
    for index, block in enumerate(chain.blocks):
        if chain.owned[index] or any(id(module) in watched for module in block.modules()):
            return index
    return len(chain.blocks)
