"""What criteria on activations see: inputs of linear modules, and derivatives by gates.

Where the inputs are enough, each block runs forward once. Else the loss is pulled back as well. For
a linear module its input and the gradient of that input give the derivative by a gate. For other
consumers (the fused tensors and the router of a mixture of experts) it is the sum over a unit's
slice of weight times gradient, one sample at a time. What has consumers of both kinds has the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.boundary_pass import MEMORY, TOKENS, batches, run_backward
from llm_pruner.importance.collector import Collector, Seen
from llm_pruner.importance.members import last_of_each_layer, other_readers
from llm_pruner.importance.observation import Measure, Observation, Reading
from llm_pruner.models.activation_store import ActivationStore, HiddenStates, free_on_disk
from llm_pruner.models.blockwise import Chain, NotBlockwise, find_chain
from llm_pruner.models.forward import first_tensor
from llm_pruner.models.linear_modules import (
    Consumer,
    add_gram_,
    complete_gram_,
    consumers_of,
    input_dim,
    linear_modules,
    weight_of,
)
from llm_pruner.models.streaming import turn
from llm_pruner.runtime.progress import track
from llm_pruner.types import FloatArray, Group, Member

SEGMENT = 128
"""Tokens whose contributions to a gate's derivative are summed before they are squared."""

_LOG = logging.getLogger(__name__)


class _MixedSamplesError(Exception):
    """A module gets the tokens of several samples in one row."""


def measure(
    model: nn.Module,
    input_ids: torch.Tensor,
    groups: Sequence[Group],
    how: Measure,
    keep: HiddenStates | None,
) -> dict[str, FloatArray]:
    """Return the importance of the units of every group.

    In a chain of blocks a group is scored as soon as its block is done, and what was observed is
    dropped, so that no more than one block's Gram matrices are held.

    Args:
        input_ids: shape (samples, seq_len), on the model's device.
    """
    watching = partial(_Watch, model, input_ids, groups, how, keep)
    watch = watching()
    try:
        chain = find_chain(model, input_ids, watch.parameters)
        if watch.looks_in_front_of(chain, input_ids):
            raise NotBlockwise("gradients are asked for in front of the first block")
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
        watch = watching()
        watch.together = False
        watch.run(chain, input_ids)
    return {group.name: watch.found[group.name] for group in groups if group.name in watch.found}


@dataclass
class _Moments:
    """Sums over the inputs of one module: ``sums`` are their number, total and squares, shape
    (1 + 2 in_features,), float64; ``gram``, None unless asked for, see `complete_gram_`.
    """

    sums: torch.Tensor
    gram: torch.Tensor | None

    @classmethod
    def zeros(cls, module: nn.Module, with_gram: bool) -> _Moments:
        weight = module.get_parameter("weight")
        features = weight.shape[input_dim(module) or 0]
        wide = torch.promote_types(weight.dtype, torch.float32)
        gram = weight.new_zeros(features, features, dtype=wide) if with_gram else None
        return cls(weight.new_zeros(1 + 2 * features, dtype=torch.float64), gram)

    def add(self, rows: torch.Tensor) -> None:
        count = self.sums.new_tensor([len(rows)])
        self.sums += torch.cat([count, rows.sum(0).double(), rows.square().sum(0).double()])
        if self.gram is not None:
            add_gram_(self.gram, rows)

    def add_sums(self, other: _Moments) -> None:
        self.sums += other.sums
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram


class _Watch(Collector):
    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        groups: Sequence[Group],
        how: Measure,
        keep: HiddenStates | None,
    ) -> None:
        samples, self._length = input_ids.shape
        self._model, self._groups, self._how = model, groups, how
        self._needs, self._where_linear = how.needs, how.needs | how.where_linear
        self._layers = [group for group in groups if group.kind == "layers"]
        self._consumers: dict[str, tuple[Consumer, ...]] = {}
        self._members: dict[str, list[tuple[Group, Member]]] = {}
        linear, known = linear_modules(model), dict(model.named_parameters(remove_duplicate=False))
        for group in groups:
            if group.kind == "layers":
                continue
            consumers = self._consumers[group.name] = consumers_of(model, group, linear)
            others = other_readers(group, consumers, known)
            if self._needs - {"gates", "tokens"} and (others or not consumers):
                raise UserError(
                    f"not only linear modules read {group.name}, so its inputs are unknown; use "
                    "the criterion fisher, gate or taylor"
                )
            for member in others if consumers else last_of_each_layer(group, known):
                self._members.setdefault(member.tensor, []).append((group, member))
        # Of these no module sees all: there are gates of whole samples, and nothing else.
        self._unseen = {group.name for found in self._members.values() for group, _ in found}
        self._readers: dict[str, list[Consumer]] = {}
        for consumer in (one for found in self._consumers.values() for one in found):
            self._readers.setdefault(consumer.module, []).append(consumer)
        # Modules whose inputs are summed up.
        self._summed = {
            path
            for path, read in self._readers.items()
            if {"moments", "gram"} & self._where_linear
            and any(one.group not in self._unseen for one in read)
        }
        names = [*self._readers, *(name for group in self._layers for name in group.modules)]
        super().__init__(
            {name: known[name] for name in self._members},
            together=not self._members,
            label="activations",
            modules=(id(model.get_submodule(name)) for name in names),
            keep=keep,
        )
        self.light = "gram" not in self._where_linear
        # What a forward pass shows is all that is asked for.
        self._forward_only = not self._members and self._where_linear <= {"moments", "gram"}
        self._seen: list[tuple[str, torch.Tensor]] = []
        segments = -(-self._length // SEGMENT)
        self._gates = {
            group.name: np.zeros((samples, segments, group.size))
            for group in groups
            if {"gates", "tokens"} & self._where_linear
            or group.name in self._unseen
            or group.kind == "layers"
        }
        # Of the batch that is going through a block, and of those before it.
        self._batch_squares: dict[str, FloatArray] = {}
        self._token_squares: dict[str, FloatArray] = {}
        self._batch_moments: dict[str, _Moments] = {}
        self._moments: dict[str, _Moments] = {}
        self._paths: dict[int | None, list[str]] = {}
        self._inside: Sequence[Sequence[Group]] = ()
        self._places: Mapping[str, Mapping[int, int]] = {}
        self.found: dict[str, FloatArray] = {}

    def run(self, chain: Chain | None, input_ids: torch.Tensor) -> None:
        """See all tokens and apply the formula to every group."""
        inside = {} if chain is None else chain.places()
        blocks = {path: inside.get(id(self._model.get_submodule(path))) for path in self._readers}
        for path, block in blocks.items():
            self._paths.setdefault(block, []).append(path)
        if chain is not None:
            self._inside = self._groups_inside(len(chain.blocks), blocks)
            if not self._forward_only:
                self._places = _places(self._model, chain, self._layers)
        with ExitStack() as hooks:
            for path in self._readers:
                reader = self._model.get_submodule(path)
                note = partial(self._note, path)
                hooks.enter_context(reader.register_forward_pre_hook(note, with_kwargs=True))
            if self._forward_only:
                self._look(chain, input_ids)
            else:
                run_backward(self._model, chain, input_ids, self)
        self._finish(self._groups)

    def looks_in_front_of(self, chain: Chain, input_ids: torch.Tensor) -> bool:
        """Whether a watched module runs in front of the first block, where no gradient is."""
        called: list[str] = []
        with ExitStack() as hooks:
            for path in () if self._forward_only else self._readers:
                reader = self._model.get_submodule(path)
                note = partial(lambda name, *_: called.append(name), path)
                hooks.enter_context(reader.register_forward_pre_hook(note))
            with torch.no_grad(), chain.opened():
                chain.entry(input_ids[:1])
        return bool(called)

    def _note(
        self, path: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        value = given = first_tensor(args, named)
        if self._forward_only:
            self._seen.append((path, value))
            return None
        if not torch.is_grad_enabled():
            return None
        leaf = not value.requires_grad
        value = value.detach().requires_grad_() if leaf else value.view_as(value)
        self._seen.append((path, value))
        changed = {key: value if one is given else one for key, one in named.items()}
        return tuple(value if one is given else one for one in args), changed

    def seen(self) -> list[tuple[str, torch.Tensor]]:
        seen, self._seen = self._seen, []
        return seen

    @torch.no_grad()
    def _look(self, chain: Chain | None, input_ids: torch.Tensor) -> None:
        samples, length = input_ids.shape
        shared = batches(samples, max(1, TOKENS // length))
        places = {} if chain is None else chain.places()
        if chain is None or self.modules - places.keys():
            self._paths = {None: [*self._readers]}
            for batch in track(shared, self.label):
                self._model(input_ids[batch])
                self._take(batch)
                self.add_up(None, (), batch)
            return
        highest = max((places[module] for module in self.modules), default=-1)
        with chain.opened():
            need = (highest + 2) * samples * chain.entry(input_ids[:1]).nbytes
        keep = self.keep if 2 * need < free_on_disk() else None
        states = ActivationStore(range(1 if keep is None else highest + 2), samples, MEMORY)
        with chain.opened(), closing(states) if keep is None else nullcontext(states) as hidden:
            for part in shared:
                hidden.write(0, part, chain.entry(input_ids[part]))
            steps = [(index, part) for index in range(highest + 1) for part in shared]
            with ExitStack() as held:
                for index, part in track(steps, f"{self.label}: blocks"):
                    if part.start == 0:
                        held.enter_context(turn(chain.blocks[index]))
                    before, behind = (0, 0) if keep is None else (index, index + 1)
                    given = hidden.read(before, part)
                    _, output = chain.run_block(index, input_ids[part], given)
                    hidden.write(behind, part, output)
                    self._take(part)
                    self.add_up(index, (), part)
                    if part.stop == samples:
                        self._finish(self._inside[index])
                        held.close()
        if keep is not None:
            keep.keep(input_ids, states)

    def _take(self, part: slice) -> None:
        self.add_seen(part, [(*one, None) for one in self.seen()], 1.0)

    @torch.no_grad()
    def add_seen(self, part: slice, seen: Iterable[Seen], factor: float) -> None:
        for path, value, gradient in seen:
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            if gradient is not None and {"gates", "tokens"} & self._where_linear:
                product = value * gradient
                self._add_gates(path, part, product, factor)
                if "tokens" in self._where_linear:
                    self._add_tokens(path, product.flatten(0, -2), factor)
            if path in self._summed:
                self._of_batch(path).add(value.flatten(0, -2))

    def _of_batch(self, path: str) -> _Moments:
        if path not in self._batch_moments:
            module = self._model.get_submodule(path)
            self._batch_moments[path] = _Moments.zeros(module, "gram" in self._where_linear)
        return self._batch_moments[path]

    @torch.no_grad()
    def add_up(self, block: int | None, names: Iterable[str], batch: slice) -> None:  # noqa: ARG002
        paths = self._paths.get(block, ())
        groups = {one.group for path in paths for one in self._readers[path]}
        if "tokens" in self._where_linear:
            for group in groups & self._gates.keys():
                none = np.zeros(self._gates[group].shape[2])
                found = self._batch_squares.pop(group, none)
                self._token_squares[group] = self._token_squares.get(group, 0) + found
        for path in paths:
            if path not in self._summed:
                continue
            sums = self._of_batch(path)
            del self._batch_moments[path]
            if path in self._moments:
                self._moments[path].add_sums(sums)
            else:
                self._moments[path] = sums

    def _add_gates(self, path: str, part: slice, product: torch.Tensor, factor: float) -> None:
        count = part.stop - part.start
        if product.shape[:-1] == (count, self._length):
            rows = _sum_segments(product)
        elif not self.together:
            # Which token a row belongs to is unknown: the whole sample is one segment.
            rows = product.flatten(0, -2).sum(0)[None, None]
        else:
            raise _MixedSamplesError(path)
        features = rows.double().mul_(factor).cpu().numpy()
        for consumer in self._readers[path]:
            units = features[:, :, consumer.index].sum(3)
            if consumer.group in self._unseen:
                units = units.sum(1, keepdims=True)
            self._gates[consumer.group][part, : units.shape[1]] += units

    def _add_tokens(self, path: str, rows: torch.Tensor, factor: float) -> None:
        for consumer in self._readers[path]:
            index = torch.from_numpy(consumer.index).to(rows.device)
            if index.shape[1] == 1:
                squares = rows.square().sum(0)[index[:, 0]]
            else:
                squares = rows[:, index].sum(2).square().sum(0)
            found = squares.double().mul(factor**2).cpu().numpy()
            self._batch_squares[consumer.group] = self._batch_squares.get(consumer.group, 0) + found

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:
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
        if block is not None:
            self._finish(self._inside[block])

    def _finish(self, groups: Sequence[Group]) -> None:
        left = [group for group in groups if group.name not in self.found]
        consumers = {group.name: self._consumers.get(group.name, ()) for group in left}
        for group in left:
            gates = self._gates.pop(group.name, None)
            read = () if group.name in self._unseen else consumers[group.name]
            squares = self._token_squares.get(group.name)
            seen = Observation(
                group,
                gates=gates if "gates" in (self._where_linear if read else self._needs) else None,
                token_squares=squares if read else None,
                readings=tuple(
                    self._reading(one)
                    for one in read
                    if one.module in self._moments and self._moments[one.module].sums[0]
                ),
            )
            blind = self._how.reads_inputs and not seen.readings  # its readers saw no token
            self.found[group.name] = np.zeros(group.size) if blind else self._how.values(seen)
        for module in {one.module for found in consumers.values() for one in found}:
            self._moments.pop(module, None)

    def _reading(self, consumer: Consumer) -> Reading:
        moments = self._moments[consumer.module]
        sums = moments.sums.cpu().numpy()
        features = len(sums) // 2
        return Reading(
            consumer,
            weight_of(self._model.get_submodule(consumer.module)).float(),
            int(sums[0]),
            sums[1 : 1 + features],
            sums[1 + features :],
            None if moments.gram is None else complete_gram_(moments.gram),
        )

    def _groups_inside(self, count: int, blocks: Mapping[str, int | None]) -> list[list[Group]]:
        whole: dict[str, int | None] = {}
        for name, consumers in self._consumers.items():
            at = {blocks[one.module] for one in consumers}
            whole[name] = at.pop() if len(at) == 1 and name not in self._unseen else None
        found: list[list[Group]] = [[] for _ in range(count)]
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


def _places(
    model: nn.Module, chain: Chain, groups: Sequence[Group]
) -> Mapping[str, Mapping[int, int]]:
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
                f"the hidden state does not pass through each of {group.name}; use taylor, or "
                "leave layers out of the structures"
            )
        found[group.name] = places
    return found
