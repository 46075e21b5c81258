"""The backward pass of the calibration loss, block by block.

One forward pass keeps the hidden states at the boundaries between blocks and gives the gradient of
the loss at the last boundary. Then, from the last block to the first, each block runs again on its
stored input and the gradient is pulled back through it: no more than one block's activations and
weight gradients exist at a time. A model that is no chain of blocks runs as a whole.

Where a few samples' activations of all blocks take no more than ``ACTIVATIONS``, and little is
collected for each block, no block runs twice: these samples go forward through all blocks, and the
gradient straight back. The batches are the same in both cases, and so are the sums.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, closing, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn

from llm_pruner.errors import NeedsMemory
from llm_pruner.importance.collector import Collector
from llm_pruner.importance.loss import loss_cotangent
from llm_pruner.models.activation_store import ActivationStore, free_on_disk
from llm_pruner.models.blockwise import (
    Call,
    Chain,
    Handler,
    hidden_of,
    output_of,
    requiring_gradients,
    with_hidden,
)
from llm_pruner.models.forward import gives_chosen, run_for_logits
from llm_pruner.models.streaming import ends_of, is_model_streamed, turn
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.progress import track

MEMORY = 2**26
"""Bytes of hidden states and their gradients held in memory; the rest goes to files."""

TOKENS = 2048
"""Tokens that go through a block together, where samples need not be told apart."""

_TOKENS_WHOLE = 1024
"""Tokens that go through the whole model together, with all its activations held."""

_TOKENS_HELD = 512
"""Tokens that go forward and back together, with the activations of all blocks held."""

_FEWEST_HELD = 256
"""Of fewer tokens together each product is slower than running the blocks a second time."""

ACTIVATIONS = 2**30
"""Bytes of activations that may be held."""

_LOGIT_BYTES = 2**27
"""Bytes of logits held at a time; their gradient takes as much again."""

_LARGE_VOCABULARY = 2**16
"""Rows of an output layer below which the loss is taken at all positions."""

_HEAD, _SPARSEST = 0.25, 4
"""Of larger ones it is taken at one position in at most ``_SPARSEST``, so that the output layer
takes no more than this share of the blocks' arithmetic."""

_Run: TypeAlias = tuple[int, torch.Tensor, torch.Tensor, list[tuple[str, torch.Tensor]]]
"""A block, its input, its output and what the collector has seen in it."""


def run_backward(
    model: nn.Module, chain: Chain | None, input_ids: torch.Tensor, collector: Collector
) -> None:
    """Run all samples, (samples, seq_len), and have ``collector`` take their gradients.

    ``model`` has no parameter that requires a gradient; without ``chain`` it runs as a whole.
    """
    if chain is not None:
        _BlockPass(chain, input_ids, collector).run()
        return
    if is_model_streamed(model):
        raise NeedsMemory(
            "the model is no chain of blocks, so no gradients can be taken with its weights read "
            "block by block"
        )
    samples, length = input_ids.shape
    size = max(1, _TOKENS_WHOLE // length) if collector.together else 1
    with requiring_gradients(collector.parameters):
        for batch in track(batches(samples, max(1, TOKENS // length)), collector.label):
            for part in parts_of(batch, size):
                logits = run_for_logits(model, input_ids[part])
                cotangent = loss_cotangent(logits, input_ids[part], part.start)
                collector.pull([logits], [cotangent], part, collector.parameters)
            collector.add_up(None, collector.parameters, batch)
    collector.finished(None, collector.parameters)


def batches(samples: int, size: int) -> list[slice]:
    """Cut ``samples`` into slices of at most ``size``."""
    return [slice(at, min(at + size, samples)) for at in range(0, samples, size)]


def parts_of(batch: slice, size: int) -> list[slice]:
    """Cut a batch into slices of at most ``size`` samples."""
    found = batches(batch.stop - batch.start, size)
    return [slice(batch.start + one.start, batch.start + one.stop) for one in found]


class _BlockPass:
    states: ActivationStore
    gradients: ActivationStore
    each = ACTIVATIONS + 1  # bytes of all blocks' activations of a sample, if they may be held
    copies = 0  # bytes of weights rounded by autocast

    def __init__(self, chain: Chain, input_ids: torch.Tensor, collector: Collector) -> None:
        self.chain, self.ids, self.collector = chain, input_ids, collector
        samples, length = input_ids.shape
        self.count = len(chain.blocks)
        places, watched = chain.places(), collector.modules
        wanted = [at for at, owned in enumerate(chain.owned) if owned]
        wanted += [at for module, at in places.items() if module in watched]
        self.lowest = 0 if chain.bottom else min(wanted, default=self.count)
        self.batches = batches(samples, max(1, TOKENS // length))
        self.begins: dict[int, int] = {}  # sample -> the first that the head saw with it
        all_seen = not gives_chosen(chain.model) or watched - places.keys()
        stride = 1 if all_seen else loss_stride(chain)
        self.stride = min(stride, length - 1)

    def _take_positions(self, stride: int) -> None:
        """Set ``stride`` (the loss is taken at one position in so many), ``headed`` (samples that
        go through the head together) and ``held`` (samples whose activations of all blocks are
        held; 0 if blocks run again)."""
        samples, length = self.ids.shape
        logits = _LOGIT_BYTES * stride // (length * self.chain.vocabulary * 4)
        self.stride, self.headed = stride, max(1, min(samples, logits, TOKENS // length))
        room = (ACTIVATIONS - self.copies) // self.each
        size = min(max(1, _TOKENS_HELD // length), self.headed, room)
        self.held = 0
        if size * length >= _FEWEST_HELD:
            batch = max(1, TOKENS // length)
            self.held = self.headed = math.ceil(batch / math.ceil(batch / size))

    @torch.no_grad()
    def _prove_positions(self) -> None:
        """Take the loss at all positions if the model gives other logits when asked for some."""
        if self.stride == 1:
            return
        sample = slice(0, 1)
        positions, handler = self._positions(sample), self._skipping(sample, [])
        every = self.chain.run(self.ids[sample], handler)[:, positions].float()
        some = self.chain.run(self.ids[sample], handler, positions).float()
        if not torch.allclose(some, every, rtol=0.0, atol=0.01 * float(every.abs().max())):
            self._take_positions(1)

    def _skipping(
        self, part: slice, seen: list[torch.Tensor], *, with_gradient: bool = False
    ) -> Handler:
        """Return a handler that runs no block: the last one returns its stored output.

        ``seen`` gets what enters the first block, and that output, a leaf ``with_gradient``.
        """
        top = self.states.read(self.count, part)

        def handler(at: int, _: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = hidden_of(args, kwargs)
            if at == 0:
                seen.append(given)
            if at + 1 == self.count:
                given = top.to(given.device).detach().requires_grad_(with_gradient)
                seen.append(given)
            return self.chain.as_output(at, given)

        return handler

    def _positions(self, part: slice) -> torch.Tensor | None:
        """Return the positions at which the loss of some samples is taken; None for all."""
        if self.stride == 1:
            return None
        first = self.begins.get(part.start, part.start) // self.headed % self.stride
        return torch.arange(first, self.ids.shape[1] - 1, self.stride, device=self.ids.device)

    def run(self) -> None:
        chain, collector = self.chain, self.collector
        with chain.opened():
            samples = len(self.ids)
            collector.seen()  # by the chain's probes
            need = (self.count + 1) * samples * chain.entry(self.ids[:1]).nbytes
            if 2 * need > free_on_disk():
                collector.keep = None  # no room on the disk for the states and what reads them
            light = collector.light and collector.together
            if light and not (chain.outside or any(chain.owned)):
                self._measure(self.count // 2)
            self._take_positions(self.stride)
            holds = self._holds()
            # Where the loss may have to be taken at all positions, blocks may be run again.
            last_alone = holds and collector.keep is None and self.stride == 1
            first = self.count if last_alone else 0
            states = ActivationStore(range(first, self.count + 1), samples, MEMORY // 4)
            with (
                closing(ActivationStore(range(1), samples, MEMORY * 3 // 4)) as self.gradients,
                closing(states) if collector.keep is None else nullcontext(states) as self.states,
            ):
                if holds:
                    self._by_sample()
                else:
                    self._by_block()
            if collector.keep is not None:
                collector.keep.keep(self.ids, states)

    def _holds(self) -> bool:
        """Whether one process holds ``held`` samples' activations, so that no block runs again."""
        if not self.held or is_model_streamed(self.chain.model):
            return False
        return free_bytes(str(self.ids.device)) > 2 * ACTIVATIONS

    def _by_block(self) -> None:
        """Run all samples through one block after the other, and back through each again."""
        chain, collector, samples = self.chain, self.collector, len(self.ids)
        ends, before = ends_of(chain.model), self.held
        self._forward()
        with turn(*ends):
            self._prove_positions()
        if self.held != before:
            self._forward()  # of as many samples together as in all else
        for batch in self.batches:
            with turn(*ends):
                for part in parts_of(batch, self.headed):
                    self.begins |= dict.fromkeys(range(part.start, part.stop), part.start)
                    self._head(part)
            collector.add_up(None, (), batch)
        order = range(self.count - 1, self.lowest - 1, -1)
        steps = [(index, batch) for index in order for batch in self.batches]
        with ExitStack() as held:
            for index, batch in track(steps, f"{collector.label}: blocks"):
                if batch.start == 0:
                    held.enter_context(turn(chain.blocks[index]))
                size = self.held or (samples if collector.together else 1)
                for part in parts_of(batch, size):
                    self._block(index, part)
                collector.add_up(index, chain.owned[index], batch)
                if batch.stop == samples:
                    self._passed(index)
                    collector.finished(index, chain.owned[index])
                    held.close()
                    torch.clear_autocast_cache()
        if chain.outside:
            size = self.headed if collector.together else 1
            label = f"{collector.label}: embedding and head"
            with requiring_gradients(chain.outside), turn(*ends):
                for batch in track(self.batches, label):
                    for part in parts_of(batch, size):
                        self._outside(part)
                    collector.add_up(None, chain.outside, batch)
                collector.finished(None, chain.outside)

    def _measure(self, index: int) -> None:
        """Set the bytes of activations of all blocks, ``each``, from those of one block.

        Tensors with the shape of a weight are left out.
        """
        sample, block = self.ids[:1], self.chain.blocks[index]
        weights = [one for one in block.parameters() if one.ndim > 1]
        shapes = {tuple(one.shape[-2:]) for one in weights}
        shapes |= {shape[::-1] for shape in shapes} | {(one.numel(),) for one in block.parameters()}
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) not in shapes:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # or it would hold the node that it is saved for

        with turn(block), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = self.chain.run_block(index, sample, self.chain.entry(sample))
            for _, tensor in self.collector.seen():
                note(tensor)
        del kept  # not before, so that no two tensors were at one place
        self.each = max(1, sum(found.values())) * self.count
        if torch.is_autocast_enabled("cpu"):
            self.copies = self.count * sum(
                2 * w.numel() for w in weights if w.dtype == torch.float32
            )

    def _by_sample(self) -> None:
        collector, order = self.collector, range(self.count - 1, self.lowest - 1, -1)
        if self.stride > 1:
            with torch.no_grad():
                self._through(slice(0, 1), None, [])
            self._prove_positions()
            if not self.held:
                self._by_block()
                return
        for batch in track(self.batches, collector.label):
            for part in parts_of(batch, self.headed):
                self.begins |= dict.fromkeys(range(part.start, part.stop), part.start)
                self._there_and_back(part)
            for index in (None, *order):
                collector.add_up(index, (), batch)
        for index in order:
            collector.finished(index, ())

    def _through(
        self, part: slice, positions: torch.Tensor | None, runs: list[_Run]
    ) -> torch.Tensor:
        def handler(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = hidden_of(args, kwargs).detach()
            if self.collector.keep is not None:
                self.states.write(at, part, given)
            wanted = at >= self.lowest and torch.is_grad_enabled()
            args, kwargs = with_hidden(args, kwargs, given.requires_grad_(wanted))
            with torch.set_grad_enabled(wanted):
                output = output_of(original(*args, **kwargs))
            if wanted:
                runs.append((at, given, output, self.collector.seen()))
            output = output.detach().to(given.dtype)
            if at + 1 == self.count:
                self.states.write(self.count, part, output)
                output.requires_grad_(torch.is_grad_enabled())
                runs.append((self.count, output, output, []))
            return self.chain.as_output(at, output)

        return self.chain.run(self.ids[part], handler, positions)

    def _there_and_back(self, part: slice) -> None:
        runs: list[_Run] = []
        positions = self._positions(part)
        logits = self._through(part, positions, runs)
        cotangent = loss_cotangent(logits, self.ids[part], part.start, positions)
        _, top, *_ = runs.pop()
        below = self.collector.pull([logits], [cotangent], part, (), top)
        del logits, cotangent
        while runs:
            index, hidden, output, seen = runs.pop()
            gradient = _widened(*below).to(output.device)
            below = self.collector.pull([output], [(gradient, 1.0)], part, (), hidden, seen)
            self.collector.passed(index, part, hidden, output, gradient)

    def _passed(self, index: int) -> None:
        if self.collector.keep is None:
            self.states.drop(index)

    @torch.no_grad()
    def _forward(self) -> None:
        size = self.held or len(self.ids)
        own = [part for batch in self.batches for part in parts_of(batch, size)]
        for part in own:
            self.states.write(0, part, self.chain.entry(self.ids[part]))
        steps = [(index, part) for index in range(self.count) for part in own]
        with ExitStack() as held:
            for index, part in track(steps, f"{self.collector.label}: forward"):
                if part is own[0]:
                    held.enter_context(turn(self.chain.blocks[index]))
                before = self.states.read(index, part)
                _, output = self.chain.run_block(index, self.ids[part], before)
                self.states.write(index + 1, part, output)
                if part is own[-1]:
                    held.close()
                    if index < self.lowest:
                        self._passed(index)

    def _head(self, part: slice) -> None:
        seen: list[torch.Tensor] = []
        positions, handler = self._positions(part), self._skipping(part, seen, with_gradient=True)
        logits = self.chain.run(self.ids[part], handler, positions)
        cotangent = loss_cotangent(logits, self.ids[part], part.start, positions)
        self._store(part, *self.collector.pull([logits], [cotangent], part, (), seen[-1]))

    def _block(self, index: int, part: slice) -> None:
        owned = self.chain.owned[index]
        with requiring_gradients(owned):
            hidden, output = self.chain.run_block(
                index, self.ids[part], self.states.read(index, part)
            )
            gradient = self.gradients.read(0, part).to(output.device)
            below = self.collector.pull([output], [(gradient, 1.0)], part, owned, hidden)
        self.collector.passed(index, part, hidden, output, gradient)
        self._store(part, *below)

    def _store(self, part: slice, gradient: torch.Tensor | None, factor: float) -> None:
        self.gradients.write(0, part, _widened(gradient, factor))

    def _outside(self, part: slice) -> None:
        """Pull back to the parameters outside the blocks (embedding, last norm, head).

        Bottom and top run together, so that a tied embedding gets the sum of both gradients.
        """
        seen: list[torch.Tensor] = []
        positions = self._positions(part)
        logits = self.chain.run(self.ids[part], self._skipping(part, seen), positions)
        pairs = [(logits, loss_cotangent(logits, self.ids[part], part.start, positions))]
        if self.chain.bottom:
            gradient = self.gradients.read(0, part).to(seen[0].device)
            pairs.append((seen[0], (gradient, 1.0)))
        outputs, cotangents = zip(*(one for one in pairs if one[0].requires_grad), strict=True)
        self.collector.seen()  # in the forward pass already
        self.collector.pull(outputs, cotangents, part, self.chain.outside)


def _widened(gradient: torch.Tensor | None, factor: float) -> torch.Tensor:
    if gradient is None:
        raise AssertionError("a boundary without a gradient passed the probe")
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide if factor == 1.0 else wide * factor


def loss_stride(chain: Chain) -> int:
    """Return at one position in how many the loss is taken: 1, or for a large vocabulary up to 4.

    It bounds the output layer's forward and backward pass by a quarter of the blocks' arithmetic.
    """
    if chain.vocabulary < _LARGE_VOCABULARY:
        return 1
    model: Any = chain.model
    head = chain.vocabulary * model.get_input_embeddings().weight.shape[1]
    held = sum(one.numel() for block in chain.blocks for one in block.parameters())
    return max(1, min(_SPARSEST, math.ceil(4 * head / (6 * held * _HEAD))))
