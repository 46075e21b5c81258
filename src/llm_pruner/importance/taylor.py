"""Sums of the terms of a Taylor expansion of the loss: gradients of weights, and their squares.

Gradients add up over samples, so as many samples go through a block together as is fast. Their
squares do not. Where each wanted parameter belongs to a linear module that gets the tokens of a
sample in rows of their own, samples go together all the same: what the module was given, and the
gradient of what it returned, give each sample's gradient of the weight as a product of its own.
Elsewhere one sample goes at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.importance.boundary_pass import Collector, Seen, run_backward
from llm_pruner.importance.criteria import Criterion
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, depends, find_chain, requiring_gradients
from llm_pruner.models.linear_modules import input_dim
from llm_pruner.runtime.processes import Processes
from llm_pruner.types import FloatArray

_LOG = logging.getLogger(__name__)

_TILE = 2**20
"""Entries of a sample's gradient that are squared at a time: with their sums, what a processor's
last cache holds."""


@dataclass(frozen=True)
class Sums:
    """Sums of a term over one tensor, in float64.

    Attributes:
        by_dim: for each axis, shape (size of the axis,), the term summed over all other axes.
        total: sum over the whole tensor.
    """

    by_dim: tuple[FloatArray, ...]
    total: float


def reduced(term: torch.Tensor) -> Sums:
    """Return the sums over a tensor."""
    vectors = []
    for dim in range(term.ndim):
        others = [axis for axis in range(term.ndim) if axis != dim]
        vector = term.sum(others) if others else term
        vectors.append(vector.double().cpu().numpy().copy())
    return Sums(tuple(vectors), float(term.sum()))


@dataclass(frozen=True)
class _Note:
    """A call of a module, and how often what it saw had been written to by then."""

    path: str
    given: torch.Tensor
    output: torch.Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether nothing has been written over since."""
        return self.given._version + self.output._version == self.version


class _Linears:
    """Linear modules that hold wanted parameters (``held``: their paths), and what they saw."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._modules: dict[str, nn.Module] = {}
        self.held: dict[str, str] = {}
        for name in parameters:
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            if key in ("weight", "bias") and _is_plain(module):
                self._modules[path] = module
                self.held[name] = path
        self._noting, self._hidden = False, dict[str, nn.Parameter]()
        self._notes: list[_Note] = []
        self._given: list[torch.Tensor] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what they are given and what they return is noted, once `hold` said so."""
        with ExitStack() as hooks:
            for path, module in self._modules.items():
                hooks.enter_context(module.register_forward_pre_hook(self._enter))
                hooks.enter_context(module.register_forward_hook(partial(self._leave, path)))
            yield

    def _enter(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        """Hide the parameters from autograd while their module uses them."""
        for parameter in self._hidden_in(module):
            parameter.requires_grad_(False)

    def _hidden_in(self, module: nn.Module) -> list[nn.Parameter]:
        hidden = {id(one) for one in self._hidden.values()}
        return [one for one in module.parameters(recurse=False) if id(one) in hidden]

    def _leave(
        self, path: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        for parameter in self._hidden_in(module):
            parameter.requires_grad_(True)
        if not self._noting or not torch.is_grad_enabled():
            return None
        fresh = not output.requires_grad
        if fresh:  # nothing below takes a gradient
            output = output.detach().requires_grad_()
        # A module that is called by keyword shows no input, which `hold` refuses.
        given = args[0].detach() if args else output.new_empty(0)
        self._notes.append(_Note(path, given, output, given._version + output._version))
        return output if fresh else None

    def hold(self, owned: Mapping[str, nn.Parameter], run: Callable[[], torch.Tensor]) -> bool:
        """Whether such modules alone use each of a block's wanted parameters ``owned``, with a row
        of tokens for each sample, by ``run`` on two of them, (2, tokens, hidden); then they are
        noted from now on.
        """
        distinct = len({id(one) for one in owned.values()}) == len(owned)
        self._noting = bool(owned) and distinct and owned.keys() <= self.held.keys()
        if not self._noting:
            return not owned
        self._hidden = dict(owned)
        try:
            with requiring_gradients(owned):
                output = run()
                elsewhere = depends(output, [*owned.values()])
        finally:
            self._hidden = {}
        notes, self._notes = self._notes, []
        rows = output.shape[:-1]
        told = len(rows) == 2 and rows[0] == 2 != rows[1]
        self._noting = (
            told
            and not elsewhere
            # What other samples alone call, such as an expert, is unknown.
            and {one.path for one in notes} >= {self.held[name] for name in owned}
            and all(one.given.shape[:-1] == rows and one.is_unchanged() for one in notes)
        )
        torch.clear_autocast_cache()  # of copies of weights that required a gradient
        return self._noting

    def returned(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, output) noted since the last call; the inputs wait for `gradients`."""
        notes, self._notes = self._notes, []
        self._given = [one.given for one in notes]
        return [(one.path, one.output) for one in notes]

    def gradients(
        self, seen: Iterable[Seen]
    ) -> Iterator[tuple[str, Iterator[tuple[slice, torch.Tensor]]]]:
        """Yield each wanted parameter and, sample after sample, rows and their gradient."""
        calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (path, _, gradient), given in zip(seen, self._given, strict=False):
            if gradient is not None:
                if given.ndim != 3 or given.shape[:-1] != gradient.shape[:-1]:
                    raise AssertionError(f"{path} got tokens of several samples in one row")
                wide = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
                calls.setdefault(path, []).append((given.to(wide), gradient.to(wide)))
        self._given = []
        for name, path in self.held.items():
            if path in calls:
                # The tokens of all calls of a module are one row.
                given, gradient = (torch.cat(both, 1) for both in zip(*calls[path], strict=True))
                if name.endswith(".bias"):
                    yield name, ((slice(None), one) for one in gradient.sum(1))
                elif input_dim(self._modules[path]) == 1:
                    yield name, _products(gradient, given)
                else:
                    yield name, _products(given, gradient)


def _products(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of left^T right of each sample: (samples, tokens, m), (.., n) -> (rows, n)."""
    left = left.transpose(1, 2).contiguous()
    step = max(1, _TILE // right.shape[2])
    for start in range(0, left.shape[1], step):
        rows = slice(start, start + step)
        for one, other in zip(left[:, rows], right, strict=True):
            yield rows, one @ other


def _is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, adds its bias, and does nothing else."""
    forward = type(module).forward
    plain = forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module)
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def taylor_sums(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    criterion: Criterion,
    input_ids: torch.Tensor,
    processes: Processes,
    keep: HiddenStates | None,
) -> dict[str, Sums]:
    """Return the sums of the criterion's term over each tensor; nothing but in the first process.

    Args:
        model: in eval mode, with no parameter that requires a gradient.
        parameters: those wanted, by name.
        criterion: of the name ``taylor``.
        input_ids: shape (samples, seq_len), on the model's device.
        processes, keep: see ``score``.
    """
    sums = _TaylorSums(model, parameters, criterion, len(input_ids), processes, keep)
    try:
        chain = find_chain(model, input_ids, parameters)
    except NotBlockwise as reason:
        _LOG.info("gradients of the whole model at once: %s", reason)
        chain = None
    with nullcontext() if sums.together else sums.linears.watched():
        run_backward(model, chain, input_ids, sums)
    return {name: sums.found[name] for name in parameters if name in sums.found}


class _TaylorSums(Collector):
    """The terms of ``Criterion``: sums over samples of the gradient g and of its square, times w.

    They are float32, or float64 for float64 weights: squares of gradients do not fit narrower
    types. Those of a batch are added to those of the batches before it. A block's are reduced and
    forgotten once its last sample is through.

    Attributes:
        found: tensor -> sums of its term; in the first process.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        criterion: Criterion,
        samples: int,
        processes: Processes,
        keep: HiddenStates | None,
    ) -> None:
        super().__init__(
            parameters,
            together=criterion.order == "first",  # which adds up; a square is of one sample
            label="importance",
            processes=processes,
            keep=keep,
        )
        self._criterion, self._samples = criterion, samples
        self._first: dict[str, torch.Tensor] = {}
        self._second: dict[str, torch.Tensor] = {}
        self._batch_first: dict[str, torch.Tensor] = {}
        self._batch_second: dict[str, torch.Tensor] = {}
        self.linears = _Linears(model, parameters)
        self.found: dict[str, Sums] = {}

    def tells_apart(
        self, owned: Mapping[str, nn.Parameter], run: Callable[[], torch.Tensor]
    ) -> bool:
        """Whether the gradients of all these are products of what linear modules see."""
        return self.linears.hold(owned, run)

    def seen(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, output) of each linear module that ran since the last call."""
        return self.linears.returned()

    @torch.no_grad()
    def add_seen(self, part: slice, seen: Iterable[Seen], factor: float) -> None:  # noqa: ARG002
        """Add each sample's gradients, and their squares."""
        for name, products in self.linears.gradients(seen):
            wide = torch.promote_types(self.parameters[name].dtype, torch.float32)
            asked = self._criterion.order
            first = self._so_far(self._batch_first, name) if asked != "second" else None
            second = self._so_far(self._batch_second, name)
            for rows, gradient in products:
                exact = gradient.to(wide)
                if first is not None:
                    first[rows].add_(exact, alpha=factor)
                second[rows].addcmul_(exact, exact, value=factor * factor)

    def _so_far(self, sums: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in sums:
            weight = self.parameters[name].detach()
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums[name] = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
        return sums[name]

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:  # noqa: ARG002
        """Add a gradient, and its square."""
        if self._criterion.order != "second":
            if name not in self._batch_first and factor == 1.0:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._batch_first[name] = gradient.to(
                    wide, memory_format=torch.contiguous_format, copy=True
                )
            else:
                self._so_far(self._batch_first, name).add_(gradient, alpha=factor)
        if self._criterion.order != "first":
            square = self._so_far(self._batch_second, name)
            exact = gradient.to(square.dtype)
            square.addcmul_(exact, exact, value=factor * factor)

    @torch.no_grad()
    def add_up(self, block: int | None, names: Iterable[str], batch: slice, owner: int) -> None:  # noqa: ARG002
        """Add what a batch gave, which a process has run, to what those before it gave."""
        both = ((self._batch_first, self._first), (self._batch_second, self._second))
        asked = {"first": both[:1], "second": both[1:]}.get(self._criterion.order, both)
        wanted = [(name, *sums) for sums in asked for name in names]
        given = [self._so_far(sums, name) for name, sums, _ in wanted]
        found = self.processes.hand_in(owner, given)
        for (name, _, before), one in zip(wanted, found, strict=False):
            before[name] = before[name].add_(one) if name in before else one
        self._batch_first, self._batch_second = {}, {}

    @torch.no_grad()
    def finished(self, block: int | None, names: Iterable[str]) -> None:  # noqa: ARG002
        """Reduce the terms of these tensors."""
        for name in names if self.processes.is_first else ():
            term = self._term(name, self.parameters[name].detach()).div_(self._samples)
            if self._criterion.reduction == "element":
                term.abs_()
            self.found[name] = reduced(term)
            self._first.pop(name, None)
            self._second.pop(name, None)

    def _term(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return g w, F w^2 / 2, or their difference, times the number of samples; in place."""
        if self._criterion.order == "first":
            return self._so_far(self._first, name).mul_(weight)
        square = self._so_far(self._second, name)
        if self._criterion.order == "second":
            return square.mul_(weight).mul_(weight).mul_(0.5)
        return square.mul_(weight).mul_(-0.5).add_(self._so_far(self._first, name)).mul_(weight)
