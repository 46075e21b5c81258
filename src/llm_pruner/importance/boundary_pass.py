"""The backward pass of the calibration loss, block by block, for one who collects its gradients.

One forward pass keeps the hidden states at the boundaries between blocks and yields the gradient of
the loss at the last boundary. Then, from the last block to the first, each block is run again on
its stored input and the gradient is pulled back through it: no more than one block's activations
and weight gradients exist at a time. A model that is no chain of blocks runs as a whole.

Where a few samples' activations of all blocks take no more than ``ACTIVATIONS``, and nothing else
is collected for each block, no block is run twice: these samples go forward through all blocks, and
the gradient straight back. As many samples go together where the weights do not stay in memory and
blocks are run again, so that the sums are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn

from llm_pruner.errors import NeedsMemory, UserError
from llm_pruner.models.activation_store import ActivationStore, HiddenStates, free_on_disk
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
from llm_pruner.runtime.processes import ALONE, Processes
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
"""Fewer cost more, since each product then reads its weights for them alone, than a second run."""

ACTIVATIONS = 2**30
"""Bytes of activations that may be held."""

_LOGIT_BYTES = 2**27
"""Bytes of logits held at a time; their gradient takes as much again."""

_ROWS = 256
"""Rows of logits that are turned into float32 at a time."""

_HEAD = 0.25
"""Most arithmetic of the output layer, in that of the blocks, with the loss at all positions."""

_LARGE_VOCABULARY = 2**16
"""Rows of an output layer below which the loss is taken at all positions."""

_SPARSEST = 4
"""No fewer than one position in so many says what the loss is."""

_START = 8
"""Power of two that the largest entry of a float16 cotangent is brought to at first."""

_BACKOFF = 2.0**-8
_ATTEMPTS = 5


_Run: TypeAlias = tuple[int, torch.Tensor, torch.Tensor, list[tuple[str, torch.Tensor]]]
"""A block, its input, its output and what the collector has seen in it."""

Seen: TypeAlias = tuple[str, torch.Tensor, torch.Tensor | None]
"""A module, what it was given or has returned, and the gradient of that."""


_like: tuple[int, int, bool] | None = None


@contextmanager
def as_in(blocks: int, vocabulary: int, *, streamed: bool = False) -> Iterator[None]:
    """Inside, positions have a loss as in a model of so many blocks and logits for each token."""
    global _like
    before, _like = _like, (blocks, vocabulary, streamed)
    try:
        yield
    finally:
        _like = before


class Collector:
    """Takes the gradients of a backward pass as it comes to them.

    Attributes:
        parameters: those whose gradients are wanted, by name.
        together: whether several samples may be pulled back at once, so that what is collected is
            their sum.
        label: what the progress bar says.
        modules: ids of the modules besides that the pass has to reach.
        light: whether what is collected of all blocks at once takes little memory.
        processes: those that share the samples, ``TOKENS`` at a time.
        keep: takes the hidden states of all samples where one process has them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        together: bool,
        label: str,
        modules: Iterable[int] = (),
        processes: Processes = ALONE,
        keep: HiddenStates | None = None,
    ) -> None:
        self.parameters, self.together, self.label = dict(parameters), together, label
        self.modules = frozenset(modules)
        self.processes = processes
        self.keep = keep if processes.count == 1 else None

    light = False

    def tells_apart(
        self, owned: Mapping[str, nn.Parameter], run: Callable[[], torch.Tensor]
    ) -> bool:
        """Whether `seen` is all it needs to tell apart samples that go through a block together.

        Asked before a block's first sample, where ``together`` is not set. The gradients of its
        parameters are not taken then.

        Args:
            owned: the block's parameters among ``parameters``.
            run: returns the block's output for two samples, (2, tokens, hidden).
        """
        del owned, run
        return False

    def seen(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, tensor) noted since the last call, to get a gradient each."""
        return []

    def add_seen(self, part: slice, seen: Iterable[Seen], factor: float) -> None:
        """Take the gradients of what `seen` returned; the true ones are ``factor`` times them."""

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:
        """Take the gradient of a parameter, summed over the samples of ``part``."""

    def passed(
        self,
        block: int,
        part: slice,
        hidden: torch.Tensor,
        output: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """See a block's input and output, and the gradient at its output."""

    def add_up(self, block: int | None, names: Iterable[str], batch: slice, owner: int) -> None:
        """Add what a batch of ``owner`` gave to the sums, in order, in the first process alone."""

    def finished(self, block: int | None, names: Iterable[str]) -> None:
        """No more gradients come from a block (None: from outside of them), nor for ``names``."""

    def pull(
        self,
        outputs: Sequence[torch.Tensor],
        cotangents: Sequence[tuple[torch.Tensor, float]],
        part: slice,
        names: Iterable[str],
        hidden: torch.Tensor | None = None,
        seen: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor | None, float]:
        """Pull a gradient back to all that is wanted; return that of ``hidden`` and its factor."""
        seen, names = self.seen() if seen is None else seen, list(names)
        inputs = [tensor for _, tensor in seen] + [self.parameters[name] for name in names]
        if hidden is not None:
            inputs.append(hidden)
        if not inputs:
            return None, 1.0
        found, factor = pull_back(outputs, inputs, cotangents, part)
        self.add_seen(part, [(*one, at) for one, at in zip(seen, found, strict=False)], factor)
        for name, gradient in zip(names, found[len(seen) :], strict=False):
            if gradient is not None:
                self.add_weight(name, part, gradient, factor)
        return (None if hidden is None else found[-1]), factor


def run_backward(
    model: nn.Module, chain: Chain | None, input_ids: torch.Tensor, collector: Collector
) -> None:
    """Run all samples, (samples, seq_len), and have ``collector`` take their gradients.

    ``model`` has no parameter that requires a gradient; ``chain`` was found with the collector's,
    None runs it as a whole. Raises UserError, see ``score``.
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
    shared = Batches(samples, length, collector.processes)
    with requiring_gradients(collector.parameters):
        for batch, owner in track(shared.all, collector.label):
            for part in shared.parts(batch, size):
                logits = run_for_logits(model, input_ids[part])
                cotangent = loss_cotangent(logits, input_ids[part], part.start)
                collector.pull([logits], [cotangent], part, collector.parameters)
            collector.add_up(None, collector.parameters, batch, owner)
    collector.finished(None, collector.parameters)


class Batches:
    """Samples, ``TOKENS`` at a time: ``all``, each with its process, and this one's ``own``."""

    def __init__(self, samples: int, length: int, processes: Processes) -> None:
        found = batches(samples, max(1, TOKENS // length))
        self.all = [(batch, number % processes.count) for number, batch in enumerate(found)]
        self.own = [batch for batch, owner in self.all if owner == processes.rank]
        self.shared = processes.count > 1

    def parts(self, batch: slice, size: int) -> list[slice]:
        """Return slices of at most ``size`` samples of a batch; none if another process has it."""
        count = batch.stop - batch.start if batch in self.own else 0
        return [slice(batch.start + i.start, batch.start + i.stop) for i in batches(count, size)]


class _BlockPass:
    """The hidden states and gradients at the boundaries, and how they come about."""

    states: ActivationStore
    gradients: ActivationStore
    each = ACTIVATIONS + 1  # bytes of all blocks' activations of a sample, if they may be held
    copies = 0  # and of what their products round weights to, for however many samples

    def __init__(self, chain: Chain, input_ids: torch.Tensor, collector: Collector) -> None:
        self.chain, self.ids, self.collector = chain, input_ids, collector
        samples, length = input_ids.shape
        self.count = len(chain.blocks)
        places, watched = chain.places(), collector.modules
        wanted = [at for at, owned in enumerate(chain.owned) if owned]
        wanted += [at for module, at in places.items() if module in watched]
        self.lowest = 0 if chain.bottom else min(wanted, default=self.count)
        self.batches = Batches(samples, length, collector.processes)
        self.begins: dict[int, int] = {}  # sample -> the first that the head saw with it
        all_seen = not gives_chosen(chain.model) or watched - places.keys()
        stride = 1 if all_seen else loss_stride(chain)
        self.stride = min(stride, length - 1)

    def _take_positions(self, stride: int) -> None:
        """Note at one position in how many the loss is taken, and how many samples of a batch the
        head then has room for; and how many go forward and back together (0: blocks are run again
        for more of them)."""
        samples, length = self.ids.shape
        vocabulary = self.chain.vocabulary if _like is None else _like[1]
        logits = _LOGIT_BYTES * stride // (length * vocabulary * 4)
        self.stride, self.headed = stride, max(1, min(samples, logits, TOKENS // length))
        room = (ACTIVATIONS - self.copies) // self.each
        size = min(max(1, _TOKENS_HELD // length), self.headed, room)
        self.held = 0
        if size * length >= _FEWEST_HELD:
            batch = max(1, TOKENS // length)
            self.held = self.headed = math.ceil(batch / math.ceil(batch / size))

    @torch.no_grad()
    def _prove_positions(self) -> None:
        """Have the loss taken at all positions, if the model gives other logits when asked for
        some."""
        own = self.batches.own
        if self.stride == 1 or not own:
            return
        sample = slice(own[0].start, own[0].start + 1)
        positions, handler = self._positions(sample), self._skipping(sample, [])
        every = self.chain.run(self.ids[sample], handler)[:, positions].float()
        some = self.chain.run(self.ids[sample], handler, positions).float()
        if not torch.allclose(some, every, rtol=0.0, atol=0.01 * float(every.abs().max())):
            self._take_positions(1)

    def _skipping(
        self, part: slice, seen: list[torch.Tensor], *, with_gradient: bool = False
    ) -> Handler:
        """Return what stands for the blocks: the last one returns the hidden state that is stored
        behind it. What enters the first one is noted in ``seen``, and behind it what the last one
        returns, which may be a leaf ``with_gradient``."""
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
        """Return the positions of some samples whose next token's loss is taken; None for all."""
        if self.stride == 1:
            return None
        first = self.begins.get(part.start, part.start) // self.headed % self.stride
        return torch.arange(first, self.ids.shape[1] - 1, self.stride, device=self.ids.device)

    def run(self) -> None:
        """Pull the gradient back through every block down to the lowest, then to the rest."""
        chain, collector = self.chain, self.collector
        with chain.opened():
            samples = len(self.ids)
            collector.seen()  # by the chain's probes
            need = (self.count + 1) * samples * chain.entry(self.ids[:1]).nbytes
            if 2 * need > free_on_disk():
                collector.keep = None  # others would be glad of them, but need room themselves
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
        if not self.held or self.batches.shared or is_model_streamed(self.chain.model):
            return False
        if _like is not None and _like[2]:
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
        for batch, owner in self.batches.all:
            with turn(*ends):
                for part in self.batches.parts(batch, self.headed):
                    self.begins |= dict.fromkeys(range(part.start, part.stop), part.start)
                    self._head(part)
            collector.add_up(None, (), batch, owner)
        order = range(self.count - 1, self.lowest - 1, -1)
        steps = [(index, *one) for index in order for one in self.batches.all]
        with ExitStack() as held:
            for index, batch, owner in track(steps, f"{collector.label}: blocks"):
                if batch.start == 0:
                    held.enter_context(turn(chain.blocks[index]))
                    apart = self._tells_apart(index)
                size = self.held or (samples if collector.together or apart else 1)
                for part in self.batches.parts(batch, size):
                    self._block(index, part, {} if apart else chain.owned[index])
                collector.add_up(index, chain.owned[index], batch, owner)
                if batch.stop == samples:
                    self._passed(index)
                    collector.finished(index, chain.owned[index])
                    held.close()
                    torch.clear_autocast_cache()
        if chain.outside:
            size = self.headed if collector.together else 1
            label = f"{collector.label}: embedding and head"
            with requiring_gradients(chain.outside), turn(*ends):
                for batch, owner in track(self.batches.all, label):
                    for part in self.batches.parts(batch, size):
                        self._outside(part)
                    collector.add_up(None, chain.outside, batch, owner)
                collector.finished(None, chain.outside)

    def _measure(self, index: int) -> None:
        """Note the bytes that the way back through all blocks needs, by those of one block.

        They are the same wherever weights lie: what has the shape of one is left out.
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
        blocks = self.count if _like is None else _like[0]
        self.each = max(1, sum(found.values())) * blocks
        if torch.is_autocast_enabled("cpu"):
            self.copies = blocks * sum(2 * w.numel() for w in weights if w.dtype == torch.float32)

    def _by_sample(self) -> None:
        """Run some samples after others through all blocks, and straight back."""
        collector, order = self.collector, range(self.count - 1, self.lowest - 1, -1)
        if self.stride > 1 and self.batches.own:
            first = self.batches.own[0].start
            with torch.no_grad():
                self._through(slice(first, first + 1), None, [])
            self._prove_positions()
            if not self.held:
                self._by_block()
                return
        for batch, owner in track(self.batches.all, collector.label):
            for part in self.batches.parts(batch, self.headed):
                self.begins |= dict.fromkeys(range(part.start, part.stop), part.start)
                self._there_and_back(part)
            for index in (None, *order):
                collector.add_up(index, (), batch, owner)
        for index in order:
            collector.finished(index, ())

    def _through(
        self, part: slice, positions: torch.Tensor | None, runs: list[_Run]
    ) -> torch.Tensor:
        """Return the logits of some samples, and add to ``runs`` those of the blocks down to the
        lowest."""

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
        """Run some samples through all blocks and pull the gradient back through each."""
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
        """Forget the hidden states before a block, if nobody else is to have them."""
        if self.collector.keep is None:
            self.states.drop(index)

    @torch.no_grad()
    def _forward(self) -> None:
        """Store the hidden states of all samples, block after block."""
        size = self.held or len(self.ids)
        own = [part for batch, _ in self.batches.all for part in self.batches.parts(batch, size)]
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
        """Store the gradient at the last boundary, and of inputs seen above the last block."""
        seen: list[torch.Tensor] = []
        positions, handler = self._positions(part), self._skipping(part, seen, with_gradient=True)
        logits = self.chain.run(self.ids[part], handler, positions)
        cotangent = loss_cotangent(logits, self.ids[part], part.start, positions)
        self._store(part, *self.collector.pull([logits], [cotangent], part, (), seen[-1]))

    def _tells_apart(self, index: int) -> bool:
        """Whether samples can go through a block together though they are to be told apart."""
        own = self.batches.own
        if self.collector.together or not own:
            return False
        # One sample twice, so that all processes find the same.
        sample = slice(own[0].start, own[0].start + 1)

        def run() -> torch.Tensor:
            hidden = self.states.read(index, sample)
            twice = hidden.expand(2, *hidden.shape[1:])
            return self.chain.run_block(index, self.ids[sample].expand(2, -1), twice)[1]

        return self.collector.tells_apart(self.chain.owned[index], run)

    def _block(self, index: int, part: slice, owned: Mapping[str, nn.Parameter]) -> None:
        """Pull the gradient back through one block, and to its parameters ``owned``."""
        with requiring_gradients(owned):
            hidden, output = self.chain.run_block(
                index, self.ids[part], self.states.read(index, part)
            )
            gradient = self.gradients.read(0, part).to(output.device)
            below = self.collector.pull([output], [(gradient, 1.0)], part, owned, hidden)
        self.collector.passed(index, part, hidden, output, gradient)
        self._store(part, *below)

    def _store(self, part: slice, gradient: torch.Tensor | None, factor: float) -> None:
        """Store the gradient at a boundary, in float32 or wider."""
        self.gradients.write(0, part, _widened(gradient, factor))

    def _outside(self, part: slice) -> None:
        """Pull back to the parameters outside the blocks (embedding, last norm, head).

        Bottom and top run together, so that a tensor that is used in both, as a tied embedding,
        gets the sum of both gradients before it is squared.
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
    """Return the gradient at a boundary in float32 or wider."""
    if gradient is None:
        raise AssertionError("a boundary without a gradient passed the probe")
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide if factor == 1.0 else wide * factor


def loss_stride(chain: Chain) -> int:
    """Return how many positions there are for each whose loss is taken.

    1 but for models whose output layer, of a large vocabulary, would take more than a quarter of
    the blocks' arithmetic: forward and backward through it at all positions, beside two times
    forward and one time backward through the blocks.
    """
    count = len(chain.blocks)
    like, vocabulary = (count, chain.vocabulary) if _like is None else _like[:2]
    if vocabulary < _LARGE_VOCABULARY:
        return 1
    model: Any = chain.model
    head = vocabulary * model.get_input_embeddings().weight.shape[1]
    held = sum(one.numel() for block in chain.blocks for one in block.parameters())
    return max(1, min(_SPARSEST, math.ceil(4 * head * count / (6 * held * like * _HEAD))))


def pull_back(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[tuple[torch.Tensor, float]],
    samples: slice,
) -> tuple[list[torch.Tensor | None], float]:
    """Return vector-Jacobian products as (gradients, factor): the true ones are their product.

    In float16 the cotangents, (tensor, factor) for each output, are first multiplied by a power of
    two that makes the largest entry large, because gradients of a language model lie around the
    smallest float16 number; if that overflows, by smaller ones. UserError if each overflows.
    """
    half = any(tensor.dtype == torch.float16 for tensor in (*outputs, *inputs))
    scale = 1.0
    if half:
        largest = max(float(tensor.abs().max()) * factor for tensor, factor in cotangents)
        if largest > 0.0 and math.isfinite(largest):
            scale = 2.0 ** (_START - math.frexp(largest)[1])
    for _ in range(_ATTEMPTS if half else 1):
        vectors = [
            (tensor if factor * scale == 1.0 else tensor * (factor * scale)).to(output.dtype)
            for output, (tensor, factor) in zip(outputs, cotangents, strict=True)
        ]
        gradients: list[torch.Tensor | None] = list(
            torch.autograd.grad(outputs, inputs, vectors, retain_graph=half, allow_unused=True)
        )
        if not half or all(bool(g.isfinite().all()) for g in gradients if g is not None):
            return gradients, 1.0 / scale
        scale *= _BACKOFF
    raise UserError(
        f"the gradient of calibration samples {samples.start} to {samples.stop - 1} overflows "
        "float16; load the model in bfloat16 or float32"
    )


def batches(samples: int, size: int) -> list[slice]:
    """Cut ``samples`` into slices of at most ``size``."""
    return [slice(at, min(at + size, samples)) for at in range(0, samples, size)]


def loss_cotangent(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    first_sample: int,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Return the gradient of the loss at the logits, as (cotangent, factor): their product.

    The loss of one sample is the mean over its predicted tokens (seq_len - 1, or one behind each of
    ``positions``) of the cross-entropy, in float32; the gradient is that of the sum over the
    samples given. For float16 the factor holds the division by the token count, which would
    underflow in the cotangent.

    Args:
        logits: shape (samples, seq_len, vocabulary), or of ``positions`` alone.
        input_ids: shape (samples, seq_len).
        first_sample: number of the first sample, for the message.
        positions: those that ``logits`` are of; None for all.

    Raises:
        UserError: the loss of a sample is NaN or infinite.
    """
    half = logits.dtype == torch.float16
    targets = input_ids[:, 1:] if positions is None else input_ids[:, positions + 1]
    targets = targets.to(logits.device)
    samples, count = targets.shape
    scale = 1.0 / count
    cotangent = torch.zeros_like(logits, requires_grad=False)
    with torch.no_grad():
        for sample in range(samples):
            total = 0.0
            for start in range(0, count, _ROWS):
                rows = slice(start, min(start + _ROWS, count))
                target = targets[sample, rows, None]
                values = logits[sample, rows]
                values = values.to(torch.promote_types(values.dtype, torch.float32))
                log_probs = torch.log_softmax(values, -1)
                total -= float(log_probs.gather(-1, target).sum())
                gradient = log_probs.exp_()
                gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=gradient.dtype))
                cotangent[sample, rows] = gradient if half else gradient.mul_(scale)
            if not math.isfinite(total):
                raise UserError(
                    f"the loss of calibration sample {first_sample + sample} is {total * scale}, "
                    "so nothing can be scored; look at this sample, or load the model in float32"
                )
    return cotangent, (scale if half else 1.0)
