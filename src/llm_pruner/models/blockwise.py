"""The chain of blocks inside a model: found by watching it run, then run one at a time.

A model is such a chain if its layers are called once each, in order, each on the very hidden state
that the one before returned, and if nothing else carries a gradient from one block to another or
past them. ``find_chain`` checks it on a few tokens, without a list of architectures. Passes that
run blocks forward alone also take models that hand more from block to block (``carries``), such as
Gemma 4, whose later blocks read the keys and values of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from llm_pruner.models.forward import own_forward, run_for_logits
from llm_pruner.models.layers import heaviest_list
from llm_pruner.models.streaming import turn

_PROBE_TOKENS = 16


class NotBlockwise(Exception):  # noqa: N818 - a finding, not an error
    """The model is not a chain of blocks; says why."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass before or after the block of interest."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


Call = Callable[..., Any]
Handler = Callable[[int, Call, tuple[Any, ...], dict[str, Any]], Any]
Carried = dict[int | str, dict[Any, Any]]
"""Place or name of an argument -> what blocks have put into that mapping, detached."""


@dataclass
class Chain:
    """A model whose blocks can be run one at a time.

    Attributes:
        blocks: in the order of execution.
        owned: per block, the scored parameters in it, by name.
        outside: the scored parameters in no block, by name.
        below: names of those in ``outside`` that the input of the first block depends on.
        vocabulary: number of logits per token.
        forms: per block, what it returns, without the tensors.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    owned: list[dict[str, nn.Parameter]]
    outside: dict[str, nn.Parameter]
    below: frozenset[str] = frozenset()
    vocabulary: int = 0
    forms: list[Any] = field(default_factory=list, repr=False)
    _handler: Handler | None = field(default=None, repr=False)

    @property
    def bottom(self) -> bool:
        """Whether the input of the first block depends on one of ``outside``."""
        return not self.below.isdisjoint(self.outside)

    def after_surgery(self, model: nn.Module) -> Chain | None:
        """Return the chain, with nothing scored, of what surgery made; None if modules are gone."""
        names = {id(module): name for name, module in self.model.named_modules()}
        after = dict(model.named_modules())
        if [*after] != [*names.values()]:
            return None
        blocks = tuple(after[names[id(block)]] for block in self.blocks)
        return replace(self, model=model, blocks=blocks, owned=[{} for _ in blocks], outside={})

    def places(self) -> dict[int, int]:
        """Return id of each module in a block -> number of the block."""
        return {id(one): at for at, block in enumerate(self.blocks) for one in block.modules()}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Route every block's forward through the handler of the pass in progress."""
        with own_forward(*self.blocks):
            for index, block in enumerate(self.blocks):
                block.forward = partial(self._forward, index, block.forward)
            yield

    def _forward(self, index: int, original: Call, /, *args: Any, **kwargs: Any) -> Any:
        if self._handler is None:
            return original(*args, **kwargs)
        return self._handler(index, original, args, kwargs)

    def run(
        self, input_ids: torch.Tensor, handler: Handler, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of a pass with ``handler`` in place of blocks; see run_for_logits."""
        with self.handled(handler):
            return run_for_logits(self.model, input_ids, positions)

    @contextmanager
    def handled(self, handler: Handler) -> Iterator[None]:
        """Inside, and inside of ``opened``, ``handler`` stands for every block."""
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    def entry(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden state that enters the first block; nothing after it runs."""

        def handler(_: int, _o: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _Stop(hidden_of(args, kwargs))

        try:
            self.run(input_ids, handler)
        except _Stop as stop:
            return stop.output
        raise NotBlockwise("no block was called")

    def run_block(
        self,
        index: int,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        carried: Carried | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (input, output) of one block on ``hidden``; the input is a leaf with gradient.

        The model runs from its start, because only it knows the block's other arguments; blocks
        before return their input. What they left beside it, and this one will, is in ``carried``.
        """

        def handler(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = hidden_of(args, kwargs)
            if at < index:
                return self.as_output(at, given)
            leaf = hidden.to(given.device).detach().requires_grad_()
            leaves.append(leaf)
            args, kwargs = with_hidden(args, kwargs, leaf)
            with _carrying({} if carried is None else carried, args, kwargs):
                output = original(*args, **kwargs)
            raise _Stop(output_of(output))

        leaves: list[torch.Tensor] = []
        try:
            self.run(input_ids, handler)
        except _Stop as stop:
            return leaves[0], stop.output
        raise NotBlockwise(f"block {index} was not called")

    def states(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return the hidden state that enters each block."""
        found: list[torch.Tensor] = []

        def handler(_: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.append(hidden_of(args, kwargs))
            return original(*args, **kwargs)

        self.run(input_ids, handler)
        return found

    @contextmanager
    def resumed(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Inside, the model runs from a block on, with ``hidden`` before it."""

        def handler(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if at < index:
                return self.as_output(at, hidden_of(args, kwargs))
            if at == index:
                args, kwargs = with_hidden(args, kwargs, hidden)
            return original(*args, **kwargs)

        with self.handled(handler):
            yield

    def as_output(self, index: int, hidden: torch.Tensor) -> Any:
        """Return ``hidden`` in the form in which the block returns it."""
        return with_output(self.forms[index], hidden)


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the hidden state among a block's arguments: the first floating-point tensor."""
    value = args[0] if args else next(iter(_floating(kwargs).values()), None)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
        raise NotBlockwise("a block's first argument is not a hidden state")
    return value


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with another hidden state."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, next(iter(_floating(kwargs))): hidden}


def _mappings(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int | str, MutableMapping[Any, Any]]:
    """Return the arguments that a block can leave something in for those behind it."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {name: one for name, one in named if isinstance(one, MutableMapping)}


@contextmanager
def _carrying(carried: Carried, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, mappings hold what was carried so far; what a block puts in or replaces is added."""
    mappings = _mappings(args, kwargs)
    for name, one in mappings.items():
        one.update(carried.get(name, {}))
    before = {name: dict(one) for name, one in mappings.items()}
    try:
        yield
    finally:
        for name, one in mappings.items():
            for key, value in one.items():
                if before[name].get(key, carried) is not value:  # never the value of a key
                    carried.setdefault(name, {})[key] = _detached(value)


def _detached(value: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _floating(kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        key: value
        for key, value in kwargs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def output_of(output: Any) -> torch.Tensor:
    """Return the hidden state that a block returned, alone or first in a tuple or list."""
    value = output[0] if type(output) in (tuple, list) and output else output
    if not isinstance(value, torch.Tensor):
        raise NotBlockwise("a block does not return a hidden state")
    return value


def with_output(output: Any, hidden: torch.Tensor) -> Any:
    """Return what a block returned with another hidden state in it."""
    return hidden if isinstance(output, torch.Tensor) else type(output)((hidden, *output[1:]))


def _form_of(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.new_empty(0)
    return type(output)(None if isinstance(item, torch.Tensor) else item for item in output)


_PROVEN: WeakKeyDictionary[nn.Module, dict[bool, tuple[Any, ...]]] = WeakKeyDictionary()
"""Model -> whether blocks may carry -> what was seen of it; a proof reads all weights twice."""


def find_chain(
    model: nn.Module,
    input_ids: torch.Tensor,
    scored: Mapping[str, nn.Parameter],
    *,
    carries: bool = False,
) -> Chain:
    """Return the model's chain of blocks, proven on the first few tokens; or NotBlockwise.

    Args:
        model: with no parameter that requires a gradient.
        input_ids: shape (samples, seq_len).
        scored: the parameters whose gradients will be asked for.
        carries: whether blocks may leave more than a hidden state for later ones, without its
            gradient; then ``run_block`` needs ``carried``.
    """
    ids = input_ids[:1, :_PROBE_TOKENS]
    chain = _with_scored(model, tuple(heaviest_list(model) or ()), scored)
    state = [[*map(id, model.modules())], [one.shape for one in model.parameters()]]
    for carried, (seen, names, below, vocabulary, forms) in _PROVEN.get(model, {}).items():
        if carried <= carries and seen == state and names.issuperset(scored):
            return replace(chain, below=below, vocabulary=vocabulary, forms=forms)
    try:
        with requiring_gradients(scored), chain.opened():
            _probe(chain, ids, carries)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # autograd's: a block writes into its input, for instance
        raise NotBlockwise(f"a block does not run on its own: {error}") from error
    found = (state, frozenset(scored), chain.below, chain.vocabulary, chain.forms)
    _PROVEN.setdefault(model, {})[carries] = found
    return chain


def _with_scored(
    model: nn.Module, blocks: tuple[nn.Module, ...], scored: Mapping[str, nn.Parameter]
) -> Chain:
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise NotBlockwise("two blocks share a parameter")
    owned: list[dict[str, nn.Parameter]] = [{} for _ in blocks]
    outside: dict[str, nn.Parameter] = {}
    for name, parameter in scored.items():
        owner = owners.get(id(parameter))
        (outside if owner is None else owned[owner])[name] = parameter
    return Chain(model, blocks, owned, outside)


@contextmanager
def requiring_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters require a gradient; after it, they do not."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def _probe(chain: Chain, ids: torch.Tensor, carries: bool) -> None:
    """Run the model once with all borders cut, and once per block; note what the passes need.

    Raises NotBlockwise if a gradient crosses a border elsewhere, or a block does not repeat itself.
    """
    entries: list[torch.Tensor] = []  # what block i was given; that of the first with its graph
    inputs: list[torch.Tensor] = []  # the leaf that it ran on
    outputs: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []  # what was passed on
    parameters = [list(owned.values()) for owned in chain.owned]
    outside = list(chain.outside.values())

    def handler(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = hidden_of(args, kwargs)
        if at == 0 and entries and torch.equal(given, entries[0]):
            # The model is run again, with targets, if that is how it gives all logits.
            for noted in (entries, inputs, outputs, leaves, chain.forms):
                noted.clear()
        if at != len(outputs) or (leaves and not _is_same(given, leaves[-1])):
            raise NotBlockwise(f"block {at} does not run on the output of the block before it")
        if len(given) != len(ids):  # Gemma 3n has four hidden states, and samples behind them
            raise NotBlockwise("the hidden states of a sample are not together")
        leaf = given.detach().requires_grad_()
        args, kwargs = with_hidden(args, kwargs, leaf)
        for one in _mappings(args, kwargs).values() if carries else ():
            one.update(_detached(dict(one)))
        with turn(chain.blocks[at]):
            output = original(*args, **kwargs)
            hidden = output_of(output)
            if hidden.shape != given.shape or hidden.dtype != given.dtype:
                raise NotBlockwise(f"block {at} changes the shape or type of the hidden state")
            rest = [p for index, own in enumerate(parameters) if index != at for p in own]
            others = [*inputs, *leaves, *outside, *rest]
            if not depends(hidden, [leaf]) or depends(hidden, others):
                raise NotBlockwise(f"block {at} depends on more than its hidden state and weights")
        entries.append(given)
        inputs.append(leaf)
        outputs.append(hidden.detach())
        chain.forms.append(_form_of(output))
        leaves.append(hidden.detach().requires_grad_())
        return with_output(output, leaves[-1])

    logits = chain.run(ids, handler)
    if len(outputs) < max(1, len(chain.blocks)):
        raise NotBlockwise(f"only {len(outputs)} of {len(chain.blocks)} blocks are called")
    chain.vocabulary = logits.shape[-1]
    above = [*inputs, *leaves[:-1], *(p for own in parameters for p in own)]
    if not depends(logits, [leaves[-1]]) or depends(logits, above):
        raise NotBlockwise("the logits depend on more than the last block's output")
    chain.below = frozenset(
        name for name, one in chain.outside.items() if depends(entries[0], [one])
    )
    carried: Carried = {}
    for index, output in enumerate(outputs):
        try:
            _, again = chain.run_block(index, ids, inputs[index], carried)
        except (NotBlockwise, RuntimeError):
            raise
        except Exception as error:  # whatever code says to a None in place of a tensor
            raise NotBlockwise("the blocks return more than a hidden state") from error
        if not torch.allclose(again, output, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise NotBlockwise(f"block {index} gives another output when it runs again")


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or a slice that leaves nothing out."""
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one is other or (same and one.shape == other.shape and one.dtype == other.dtype)


def depends(output: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether a gradient comes from ``output`` to one of ``inputs``."""
    if not output.requires_grad or not inputs:
        return False
    gradients = torch.autograd.grad(
        output, list(inputs), torch.ones_like(output), retain_graph=True, allow_unused=True
    )
    return any(gradient is not None for gradient in gradients)
