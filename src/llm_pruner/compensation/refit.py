"""Refit the consumers of a pruned model, block after block, to follow the dense model.

For each block, the dense model's block runs on the dense hidden states and the pruned one on its
own. A consumer (``o_proj``, ``down_proj``) is then fitted by least squares so that

- the hidden state behind it is the dense one, where its output, or a multiple that is the same in
  the whole block, is added to the hidden state: this also takes back earlier errors;
- its output is the dense one, where the block does something else with it, such as a norm.

Tokens are weighted by 1 / mean(h^2) of the dense hidden state h, because the norms of later blocks
see every token at that scale, and massive activations would decide the fit. The first token of a
sample, where most models have their attention sink, counts as much as a quarter of all.

Where layers went behind a block, the last consumer in it is fitted to the dense hidden state behind
these layers (ReplaceMe, arXiv 2505.02819). Where anything went but heads and FFN channels, every
consumer that is left is fitted; otherwise those alone that lost inputs.

Two hidden states per token are held at a time, in memory or in files. Dense hidden states that an
earlier pass left are not computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_pruner.compensation.least_squares import RIDGES, Rows, best_refit, equations
from llm_pruner.errors import UserError
from llm_pruner.models.activation_store import ActivationStore, HiddenStates
from llm_pruner.models.blockwise import Carried, Chain, NotBlockwise, find_chain
from llm_pruner.models.forward import first_tensor, undisturbed
from llm_pruner.models.layers import Renaming, kept_layers
from llm_pruner.models.linear_modules import (
    consumers_of,
    input_dim,
    linear_modules,
    set_weight,
    weight_of,
)
from llm_pruner.models.streaming import new_weights_in, turn
from llm_pruner.runtime.progress import track
from llm_pruner.surgery.removal import removed_modules, removed_positions
from llm_pruner.types import Discovery, Removal

KINDS = ("heads", "query_heads", "value_dim", "ffn")
"""Kinds of groups whose consumers are repaired."""


FIRST = 0.25
"""Weight of a sample's first token, in weights of all its tokens."""

HELD_OUT = 8
"""One sample in this many chooses the ridge before it is fitted like the others."""

HELD_OUT_TOKENS = 4096
"""No more tokens than this choose the ridge."""

_TOKENS = 2048
_MEMORY = 2**26
"""Bytes up to which the pruned model's hidden states, the most used, stay in memory."""


@dataclass(frozen=True)
class Refitted:
    """What became of one consumer, by its name in the pruned model.

    ``before`` and ``after`` are the squared error over that of the target on held-out tokens;
    ``ridge`` is None where the weight stays.
    """

    module: str
    ridge: float | None
    before: float
    after: float

    @property
    def changed(self) -> bool:
        return self.ridge is not None


def refit_(
    model: nn.Module,
    dense: nn.Module,
    discovery: Discovery,
    removal: Removal,
    input_ids: torch.Tensor,
    ridges: tuple[float, float] = RIDGES,
    known: HiddenStates | None = None,
) -> list[Refitted]:
    """Refit the consumers of a pruned model in place.

    Args:
        model: the pruned model.
        dense: the model before the removal; left as it was.
        discovery: of the dense model.
        removal: what was removed, in its numbering.
        input_ids: shape (samples, seq_len); at least two samples.
        ridges: the least and the largest to choose from, see `best_refit`.
        known: hidden states of the dense model; used for as many samples as are the same here.

    Returns:
        The consumers in the order of the forward pass.

    Raises:
        UserError: too few samples, or a model that is not a chain of blocks.
    """
    if len(input_ids) < 2:
        raise UserError(
            f"least squares needs at least 2 calibration samples and got {len(input_ids)}; "
            "give more, or use --compensation none"
        )
    consumers = _consumers_left(model, dense, discovery, removal)
    weights = [(one.module, one.module.get_parameter("weight")) for one in consumers.values()]
    learned = [(module, weight.requires_grad) for module, weight in weights]
    with undisturbed(model), undisturbed(dense), torch.no_grad():
        ids = input_ids.detach().to(next(model.parameters()).device, torch.long)
        try:
            with torch.enable_grad():
                whole = find_chain(dense, ids, {}, carries=True)
                pruned = whole.after_surgery(model) or find_chain(model, ids, {}, carries=True)
        except NotBlockwise as reason:
            raise UserError(
                f"the model cannot be refitted block by block: {reason}; use --compensation none"
            ) from reason
        gone = removed_modules(discovery, removal)
        found = _Refit(pruned, whole, consumers, gone, ids, ridges, known).run()
    for module, required in learned:  # of weights that are others now
        module.get_parameter("weight").requires_grad_(required)
    return found


def held_out_samples(samples: int, seq_len: int) -> torch.Tensor:
    """Return which samples choose the ridge, shape (samples,): the last ones, since packed samples
    share documents with their neighbours.
    """
    count = max(1, min(samples // HELD_OUT, HELD_OUT_TOKENS // seq_len))
    return torch.arange(samples, device="cpu") >= samples - count


@dataclass(frozen=True)
class _Consumer:
    name: str
    module: nn.Module
    out: torch.Tensor
    fitted: bool


def _consumers_left(
    model: nn.Module, dense: nn.Module, discovery: Discovery, removal: Removal
) -> dict[int, _Consumer]:
    removed = removed_positions(discovery, removal)
    rename = Renaming(kept_layers(dense, removed_modules(discovery, removal)))
    consumers: dict[int, _Consumer] = {}
    everywhere = any(
        group.kind not in KINDS for group in discovery.groups if len(removal.get(group.name, ()))
    )
    tied = set(discovery.aliases) | set(discovery.aliases.values())
    nothing, linear = np.zeros(0, dtype=np.int64), linear_modules(dense)
    for group in discovery.groups:
        if group.kind not in KINDS:
            continue
        for consumer in consumers_of(dense, group, linear):
            weight, name = f"{consumer.module}.weight", rename(consumer.module)
            if name is None or weight in tied:
                continue
            before = dense.get_submodule(consumer.module)
            inputs = input_dim(before) or 0
            lost = removed.get((weight, inputs), nothing)
            rows = np.arange(weight_of(before).shape[0])
            kept = torch.from_numpy(np.delete(rows, removed.get((weight, 1 - inputs), nothing)))
            fitted = everywhere or len(lost) > 0
            consumers[id(before)] = _Consumer(name, model.get_submodule(name), kept, fitted)
    return consumers


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


class _Rows:
    """A tensor per token of all samples; those of the first ``count`` may be ``known`` already."""

    def __init__(
        self, samples: int, memory: int, known: HiddenStates, block: int = 0, count: int = 0
    ) -> None:
        self._store = ActivationStore(range(1), samples, memory)
        self._known, self._block = known, block
        self._count = count if known.has(block) else 0

    def has(self, part: slice) -> bool:
        return bool(part.stop <= self._count)

    def read(self, part: slice) -> torch.Tensor:
        """Return a range of samples; not to be changed in place."""
        return self._known.read(self._block, part) if self.has(part) else self._store.read(0, part)

    def write(self, part: slice, values: torch.Tensor) -> None:
        self._store.write(0, part, values)

    def close(self) -> None:
        self._store.close()


class _Refit:
    def __init__(
        self,
        pruned: Chain,
        dense: Chain,
        consumers: Mapping[int, _Consumer],
        gone: Collection[str],
        ids: torch.Tensor,
        ridges: tuple[float, float],
        known: HiddenStates | None,
    ) -> None:
        self.ridges, self.known = ridges, known or HiddenStates()
        self.pruned, self.dense, self.consumers, self.ids = pruned, dense, consumers, ids
        names = {id(module): name for name, module in dense.model.named_modules()}
        self.twins = [i for i, block in enumerate(dense.blocks) if names[id(block)] not in gone]
        if len(self.twins) != len(pruned.blocks):
            raise UserError("the pruned model has other blocks; use --compensation none")
        samples, length = ids.shape
        size = max(1, _TOKENS // length)
        # The samples from here on choose the ridge.
        self.split = samples - int(held_out_samples(samples, length).sum())
        self.count = self.known.count(ids)
        ends = sorted({0, min(self.count, samples), self.split, samples})
        self.parts = [
            slice(at, min(at + size, end))
            for begin, end in pairwise(ends)
            for at in range(begin, end, size)
        ]
        self.hidden = self._rows(_MEMORY)
        self.found: list[Refitted] = []
        self.carried: dict[tuple[int, int], Carried] = {}  # of a chain, first sample
        self.last: dict[int, float] = {}  # number of a consumer in its block -> ridge

    def run(self) -> list[Refitted]:
        """Walk through all blocks and return what became of each consumer."""
        with self.pruned.opened(), self.dense.opened():
            target = self._dense_rows(0)
            for part in self.parts:
                self.hidden.write(part, self.pruned.entry(self.ids[part]))
                if not target.has(part):
                    target.write(part, self.dense.entry(self.ids[part]))
            at = 0
            for index in track(range(len(self.pruned.blocks)), "least squares"):
                while at < self.twins[index]:
                    target = self._dense_past(at, target)
                    at += 1
                with turn(self.dense.blocks[at], self.pruned.blocks[index]):
                    at, target = self._block(index, at, target)
            target.close()
            self.hidden.close()
        return self.found

    def _rows(self, memory: int = _MEMORY // 4) -> _Rows:
        return _Rows(len(self.ids), memory, self.known)

    def _dense_rows(self, block: int) -> _Rows:
        return _Rows(len(self.ids), _MEMORY // 4, self.known, block, self.count)

    def _dense_past(self, at: int, target: _Rows) -> _Rows:
        behind = self._dense_rows(at + 1)
        self._advance(self.dense, at, target, behind)
        target.close()
        return behind

    def _advance(self, chain: Chain, index: int, hidden: _Rows, behind: _Rows) -> None:
        missing = [part for part in self.parts if not behind.has(part)]
        with turn(*(chain.blocks[index : index + 1] if missing else ())):
            for part in missing:
                behind.write(part, self._run(chain, index, part, hidden.read(part)))

    def _block(self, index: int, at: int, target: _Rows) -> tuple[int, _Rows]:
        inside = {id(module) for module in self.dense.blocks[at].modules()}
        if not any(consumer.fitted for key, consumer in self.consumers.items() if key in inside):
            self._advance(self.pruned, index, self.hidden, self.hidden)
            return at + 1, self._dense_past(at, target)
        order, references, factor, following = self._dense_outputs(at, target)
        target.close()
        at += 1
        while factor and order and at < self._next(index):
            following = self._dense_past(at, following)
            at += 1
        for number, consumer in enumerate(order):
            if not consumer.fitted:
                continue
            weight = weight_of(consumer.module)
            wished = references.get(number, following)
            fit, held_out = equations(weight, self.split * self.ids.shape[1]), Rows(weight)
            final = bool(factor) and number + 1 == len(order)
            run = order[: number + 1] if factor else [consumer]
            read = self._rows() if final else None
            for part in self.parts:
                states = self.hidden.read(part)
                inputs, before = self._reach(index, part, states, run)
                reference = wished.read(part)
                wanted = reference[..., consumer.out]
                if factor:
                    wanted = (wanted.float() - states.float()) / factor - before
                else:
                    reference = following.read(part)
                if isinstance(bias := getattr(consumer.module, "bias", None), torch.Tensor):
                    wanted = wanted - bias.to(wanted.device)
                if read is not None:
                    # What the block adds to, and what is left to multiply: no need to run it again.
                    read.write(part, inputs)
                    self.hidden.write(part, states.float() + factor * before)
                importance = 1 / reference.float().square().mean(-1).clamp_min(1e-12)
                importance[:, 0] *= max(1.0, FIRST * importance.shape[1])
                (fit if part.stop <= self.split else held_out).add(
                    inputs.flatten(0, 1),
                    wanted.flatten(0, 1).to(inputs.device),
                    importance.flatten().to(inputs.device),
                )
            found = best_refit(fit, held_out, self.ridges, self.last.get(number))
            del fit, held_out
            if found.ridge is not None:
                set_weight(consumer.module, found.weight, new_weights_in.get() or weight.dtype)
                self.last[number] = found.ridge
            self.found.append(Refitted(consumer.name, found.ridge, found.before, found.after))
            if read is not None:
                for part in self.parts:
                    base = self.hidden.read(part)
                    output = consumer.module(read.read(part).to(weight.device))
                    self.hidden.write(part, base.to(output.device) + factor * output)
                read.close()
        if not (factor and order and order[-1].fitted):
            self._advance(self.pruned, index, self.hidden, self.hidden)
        for rest in references.values():
            rest.close()
        return at, following

    def _run(self, chain: Chain, index: int, part: slice, states: torch.Tensor) -> torch.Tensor:
        """Return the output of a block, with what those before it left for these samples."""
        carried = self.carried.setdefault((id(chain), part.start), {})
        return chain.run_block(index, self.ids[part], states, carried)[1]

    def _next(self, index: int) -> int:
        return [*self.twins, len(self.dense.blocks)][index + 1]

    def _dense_outputs(
        self, at: int, target: _Rows
    ) -> tuple[list[_Consumer], dict[int, _Rows], float, _Rows]:
        """Run a dense block on what is not known.

        Returns:
            Its consumers in the order of their calls; by number, what the fitted ones are to give;
            the factor of their outputs in the hidden state, which then is what they are to give (0:
            none, it is their outputs); and the block's output.
        """
        order: list[_Consumer] = []
        references: dict[int, _Rows] = {}
        factor = 0.0
        calls: list[tuple[_Consumer, torch.Tensor]] = []
        following = self._dense_rows(at + 1)
        last: _Consumer | None = None  # to be run, where the block's output is known

        def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            # A copy, beside the states: code may go on in the tensor itself, as Falcon's does.
            calls.append((self.consumers[id(module)], output.to("cpu", copy=True)))
            if calls[-1][0] is last:
                raise _Reached(output)

        with ExitStack() as hooks:
            for module in self.dense.blocks[at].modules():
                if id(module) in self.consumers:
                    hooks.enter_context(module.register_forward_hook(note))
            for part in self.parts:
                first, known = part is self.parts[0], following.has(part)
                if known and not first and not references:
                    continue
                calls.clear()
                last = order[max(references)] if known and references else None
                states = target.read(part)
                output = states
                with suppress(_Reached):
                    output = self._run(self.dense, at, part, states)
                if not known:
                    following.write(part, output)
                if first:
                    names = [consumer.name for consumer, _ in calls]
                    order = [
                        consumer
                        for consumer, value in calls
                        if names.count(consumer.name) == 1 and _sees_all(value, states)
                    ]
                found = {consumer.name: value for consumer, value in calls}
                values = [_by_token(found[one.name], states) for one in order if one.name in found]
                if first:
                    factor = _adds_up(states, values, output.to(states.device))
                    stored = order[:-1] if factor else order
                    references = {
                        n: self._rows() for n, consumer in enumerate(stored) if consumer.fitted
                    }
                behind = states.float()
                for number, value in enumerate(values if references else ()):
                    behind = behind + factor * value if factor else value
                    if number in references:
                        references[number].write(part, behind)
        return order, references, factor, following

    def _reach(
        self, index: int, part: slice, states: torch.Tensor, order: Sequence[_Consumer]
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        before: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Reached(first_tensor(args, named))

        with ExitStack() as hooks:
            for consumer in order[:-1]:
                hooks.enter_context(
                    consumer.module.register_forward_hook(
                        lambda _m, _a, output: before.append(
                            _by_token(output, states).to(states.device, torch.float32, copy=True)
                        )
                    )
                )
            last = order[-1].module
            hooks.enter_context(last.register_forward_pre_hook(stop, with_kwargs=True))
            try:
                self._run(self.pruned, index, part, states)
            except _Reached as reached:
                return _by_token(reached.value, states), sum(before) if before else 0.0
        raise AssertionError(f"{order[-1].name} was not called")


def _adds_up(states: torch.Tensor, outputs: Sequence[torch.Tensor], behind: torch.Tensor) -> float:
    """Return f if a block is h + f * (its consumers' outputs), and nothing else; 0 otherwise."""
    if any(output.shape != states.shape for output in outputs) or not outputs:
        return 0.0
    added = (behind - states).double()
    given = torch.stack([output.double() for output in outputs]).sum(0)
    # Where consumers are added to each other first, their sum is as coarse as they are.
    short = any(one.dtype in (torch.float16, torch.bfloat16) for one in (*outputs, behind))
    rounded = 2 * torch.finfo(behind.dtype).eps * behind.double().norm()
    close = max((1e-2 if short else 1e-4) * added.norm(), rounded)
    fitted = float((given * added).sum() / given.square().sum().clamp_min(1e-30))
    return next((f for f in (1.0, fitted) if f and (added - f * given).norm() <= close), 0.0)


def _sees_all(value: torch.Tensor, states: torch.Tensor) -> bool:
    return value.shape[:-1].numel() == states.shape[:-1].numel()


def _by_token(value: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return rows of features as (samples, seq_len, features), as the hidden states are."""
    return value.reshape(*states.shape[:-1], value.shape[-1])
