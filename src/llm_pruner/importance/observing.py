"""What criteria on activations see: inputs of linear modules, and derivatives by gates.

Where the inputs of consumers are enough, each block runs forward once, and nothing above the last
that is watched. Else the loss is pulled back as well; no weight gradient is formed where a group's
consumer is a linear module: its input and the gradient of that input are enough. For other
consumers (the fused tensors of a mixture of experts) the gate's derivative is taken from the
gradient of the tensor, one sample at a time: the sum over a unit's slice of weight times gradient
is the same number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.boundary_pass import (
    MEMORY,
    TOKENS,
    Collector,
    Seen,
    batches,
    run_backward,
)
from llm_pruner.importance.observation import Observation, Reading
from llm_pruner.models.activation_store import ActivationStore
from llm_pruner.models.blockwise import Chain, NotBlockwise, find_chain
from llm_pruner.models.consumers import Consumer, add_gram_, consumers_of, weight_of
from llm_pruner.models.streaming import turn
from llm_pruner.runtime.progress import track
from llm_pruner.types import FloatArray, Group, Member

Measured = TypeVar("Measured")

SEGMENT = 128
"""Tokens whose contributions to a gate's derivative are summed before they are squared."""

_LOG = logging.getLogger(__name__)


class _MixedSamplesError(Exception):
    """A module gets the tokens of several samples in one row: take samples one at a time."""


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
        needs: as `Measure` has it.
        formula: from an observation to what is wanted of it.
        where_linear: more of it, for groups that a linear module reads.

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
    try:
        watch.run(chain, input_ids)
    except _MixedSamplesError:
        watch = _Watch(model, groups, needs, where_linear, input_ids, formula)
        watch.together = False
        watch.run(chain, input_ids)
    return {group.name: watch.found[group.name] for group in groups}


_NOTHING = torch.zeros((), dtype=torch.float64)


@dataclass
class _Moments:
    """Sums over the inputs of one module, as `Reading` has them."""

    tokens: int = 0
    total: torch.Tensor = _NOTHING
    square: torch.Tensor = _NOTHING
    gram: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, with_gram: bool) -> None:
        self.tokens += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.square = self.square + rows.square().sum(0).double()
        if with_gram:
            if self.gram is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_gram_(self.gram, rows)


class _Watch(Collector, Generic[Measured]):
    """What is looked at, and the sums so far.

    Attributes:
        found: group name -> the formula's value, once the group has seen all tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        needs: Collection[str],
        where_linear: Collection[str],
        input_ids: torch.Tensor,
        formula: Callable[[Observation], Measured],
    ) -> None:
        samples, self._length = input_ids.shape
        self._model, self._groups, self._formula = model, groups, formula
        self._needs, self._where_linear = set(needs), {*needs, *where_linear}
        self._layers = [group for group in groups if group.kind == "layers"]
        self._consumers: dict[str, tuple[Consumer, ...]] = {}
        self._members: dict[str, list[tuple[Group, Member]]] = {}
        for group in groups:
            if group.kind == "layers":
                continue
            self._consumers[group.name] = consumers_of(model, group)
            if self._consumers[group.name]:
                continue
            if self._needs - {"gates", "tokens"}:
                raise UserError(
                    f"no linear module reads {group.name}, so its activations are unknown; use "
                    "the criterion fisher, gate or taylor"
                )
            for member in _last(group):
                self._members.setdefault(member.tensor, []).append((group, member))
        self._readers: dict[str, list[Consumer]] = {}
        for consumer in (one for found in self._consumers.values() for one in found):
            self._readers.setdefault(consumer.module, []).append(consumer)
        names = [*self._readers, *(name for group in self._layers for name in group.modules)]
        known = dict(model.named_parameters(remove_duplicate=False))
        super().__init__(
            {name: known[name] for name in self._members},
            together=not self._members,
            label="activations",
            modules=(id(model.get_submodule(name)) for name in names),
        )
        # What a forward pass shows is all that is asked for.
        self._forward_only = not self._members and self._where_linear <= {"moments", "gram"}
        self._seen: list[tuple[str, torch.Tensor]] = []
        segments = -(-self._length // SEGMENT)
        self._gates = {group.name: np.zeros((samples, segments, group.size)) for group in groups}
        self._token_squares: dict[str, FloatArray] = {}
        self._moments: dict[str, _Moments] = {}
        self._inside: Sequence[Sequence[Group]] = ()
        self._places: Mapping[str, Mapping[int, int]] = {}
        self.found: dict[str, Measured] = {}

    def run(self, chain: Chain | None, input_ids: torch.Tensor) -> None:
        """See all tokens and apply the formula to every group."""
        if chain is not None:
            self._inside = self._groups_inside(chain)
            if not self._forward_only:
                self._places = _places(self._model, chain, self._layers)
        with ExitStack() as hooks:
            for path in self._readers:
                reader = self._model.get_submodule(path)
                hooks.enter_context(reader.register_forward_pre_hook(partial(self._note, path)))
            if self._forward_only:
                self._look(chain, input_ids)
            else:
                run_backward(self._model, chain, input_ids, self)
        self._finish(self._groups)

    def _note(
        self, path: str, _: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """Note an input, which becomes a leaf if nothing below it takes a gradient."""
        value, *rest = args
        if self._forward_only:
            self._seen.append((path, value))
            return None
        if not torch.is_grad_enabled():
            return None
        fresh = not value.requires_grad
        if fresh:
            value = value.detach().requires_grad_()
        self._seen.append((path, value))
        return (value, *rest) if fresh else None

    def seen(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, input) noted since the last call, and forget them."""
        seen, self._seen = self._seen, []
        return seen

    @torch.no_grad()
    def _look(self, chain: Chain | None, input_ids: torch.Tensor) -> None:
        """Run forward, block by block unless something outside of the blocks is watched."""
        samples, length = input_ids.shape
        parts = batches(samples, max(1, TOKENS // length))
        blocks = [] if chain is None else [{id(m) for m in one.modules()} for one in chain.blocks]
        if chain is None or self.modules - set().union(*blocks):
            for part in track(parts, self.label):
                self._model(input_ids[part])
                self._take(part)
            return
        highest = max((at for at, block in enumerate(blocks) if block & self.modules), default=-1)
        with chain.opened(), ActivationStore(range(1), samples, MEMORY) as hidden:
            for part in parts:
                hidden.write(0, part, chain.entry(input_ids[part]))
            steps = [(index, part) for index in range(highest + 1) for part in parts]
            with ExitStack() as held:
                for index, part in track(steps, f"{self.label}: blocks"):
                    if part is parts[0]:
                        held.enter_context(turn(chain.blocks[index]))
                    _, output = chain.run_block(index, input_ids[part], hidden.read(0, part))
                    hidden.write(0, part, output)
                    self._take(part)
                    if part is parts[-1]:
                        self._finish(self._inside[index])
                        held.close()

    def _take(self, part: slice) -> None:
        """Take what a forward pass has shown."""
        self.add_inputs(part, [(*one, None) for one in self.seen()], 1.0)

    @torch.no_grad()
    def add_inputs(self, part: slice, seen: Iterable[Seen], factor: float) -> None:
        """Add inputs and their gradients, which are ``factor`` times those given."""
        for path, value, gradient in seen:
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            if gradient is not None and {"gates", "tokens"} & self._needs:
                product = value * gradient
                self._add_gates(path, part, product, factor)
                if "tokens" in self._needs:
                    self._add_tokens(path, product.flatten(0, -2), factor)
            if {"moments", "gram"} & self._where_linear:
                moments = self._moments.setdefault(path, _Moments())
                moments.add(value.flatten(0, -2), "gram" in self._where_linear)

    def _add_gates(self, path: str, part: slice, product: torch.Tensor, factor: float) -> None:
        count = part.stop - part.start
        if product.shape[:-1] == (count, self._length):
            rows = _sum_segments(product)
        elif count == 1:
            # Which token a row belongs to is unknown: the whole sample is one segment.
            rows = product.flatten(0, -2).sum(0)[None, None]
        else:
            raise _MixedSamplesError(path)
        features = rows.double().mul_(factor).cpu().numpy()
        for consumer in self._readers[path]:
            units = features[:, :, consumer.index].sum(3)
            self._gates[consumer.group][part, : rows.shape[1]] += units

    def _add_tokens(self, path: str, rows: torch.Tensor, factor: float) -> None:
        for consumer in self._readers[path]:
            index = torch.from_numpy(consumer.index).to(rows.device)
            if index.shape[1] == 1:
                squares = rows.square().sum(0)[index[:, 0]]
            else:
                squares = rows[:, index].sum(2).square().sum(0)
            found = squares.double().mul(factor**2).cpu().numpy()
            self._token_squares[consumer.group] = self._token_squares.get(consumer.group, 0) + found

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:
        """Add the gates of groups that no linear module reads."""
        weight = self.parameters[name].detach()
        product = weight.to(torch.promote_types(weight.dtype, torch.float32)) * gradient
        for group, member in self._members[name]:
            others = [axis for axis in range(product.ndim) if axis != member.dim]
            # A sum over no axes at all would be one over all of them.
            summed = product.sum(others) if others else product
            features = summed.double().mul(factor).cpu().numpy()
            self._gates[group.name][part, 0] += features[member.index].sum(1)

    def passed(
        self,
        block: int,
        part: slice,
        hidden: torch.Tensor,
        output: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """Add the gate of a whole layer: what it adds to the hidden state times the gradient."""
        for group in self._layers:
            if (unit := self._places[group.name].get(block)) is not None:
                step = (output.detach() - hidden.detach()).to(gradient.dtype) * gradient
                sums = _sum_segments(step).sum(-1).double().cpu().numpy()
                self._gates[group.name][part, :, unit] = sums

    def finished(self, block: int | None, names: Iterable[str]) -> None:  # noqa: ARG002
        """Apply the formula to the groups of a block."""
        if block is not None:
            self._finish(self._inside[block])

    def _finish(self, groups: Sequence[Group]) -> None:
        """Apply the formula to groups that will see no more tokens, and drop what they saw."""
        left = [group for group in groups if group.name not in self.found]
        consumers = {group.name: self._consumers.get(group.name, ()) for group in left}
        for group in left:
            seen = Observation(
                group,
                gates=self._gates.pop(group.name) if "gates" in self._needs else None,
                token_squares=self._token_squares.get(group.name),
                readings=tuple(
                    self._reading(one)
                    for one in consumers[group.name]
                    if one.module in self._moments
                ),
            )
            self.found[group.name] = self._formula(seen)
        for module in {one.module for found in consumers.values() for one in found}:
            self._moments.pop(module, None)

    def _reading(self, consumer: Consumer) -> Reading:
        moments = self._moments[consumer.module]
        return Reading(
            consumer,
            weight_of(self._model.get_submodule(consumer.module)).float(),
            moments.tokens,
            moments.total.cpu().numpy(),
            moments.square.cpu().numpy(),
            moments.gram,
        )

    def _groups_inside(self, chain: Chain) -> list[list[Group]]:
        """Return, for each block, the groups that only modules of this block read."""
        # Seen from the last block to the first, a module of several blocks ends with the first.
        places = {
            id(module): index
            for index, block in reversed(list(enumerate(chain.blocks)))
            for module in block.modules()
        }
        whole: dict[str, int | None] = {}
        for name, consumers in self._consumers.items():
            at = {places.get(id(self._model.get_submodule(one.module))) for one in consumers}
            whole[name] = at.pop() if len(at) == 1 else None
        found: list[list[Group]] = [[] for _ in chain.blocks]
        for group in self._groups:
            block = whole.get(group.name)
            # A module's sums are dropped with a group, so its other groups must end here too.
            modules = {consumer.module for consumer in self._consumers.get(group.name, ())}
            others = [reader.group for module in modules for reader in self._readers[module]]
            if block is not None and all(whole[other] == block for other in others):
                found[block].append(group)
        return found


def _sum_segments(values: torch.Tensor) -> torch.Tensor:
    """Sum over each segment: (samples, tokens, features) -> (samples, segments, features)."""
    return torch.stack([part.sum(1) for part in values.split(SEGMENT, dim=1)], dim=1)


def _last(group: Group) -> list[Member]:
    """Return the members that execute last."""
    members = [member for member in group.members if not member.buffer]
    last = max((member.order for member in members), default=0)
    return [member for member in members if member.order == last]


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
