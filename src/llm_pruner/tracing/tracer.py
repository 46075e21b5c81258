"""Follows a model's run, and keeps for every tensor which deletion removes which position.

Every ATen operation passes through ``Tracer`` (a ``TorchDispatchMode``), whatever Python code
called it. Its rule (``ops``) states how the axes of its result follow from those of its inputs. An
operation without a rule freezes its inputs.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_pruner.tracing.atoms import empty_rows, product_rows
from llm_pruner.tracing.ghosts import GhostRunner
from llm_pruner.tracing.ops import Call, Operation, UnplacedError, operation, tensors_in
from llm_pruner.tracing.scenes import storage_of
from llm_pruner.tracing.sizes import Equation, Expr, TracedInt, code_line, expr_of, leaves
from llm_pruner.tracing.stand_ins import COMPILED_CODE, TRANSFORMED_CODE
from llm_pruner.tracing.trace import Axes, Choice, Ragged, Role, Trace
from llm_pruner.types import IntArray


class Marks:
    """A dictionary by identity of tensors, which it does not keep alive.

    Entries are kept by ``id`` and vanish with their tensor, before another can have that id.
    """

    def __init__(self) -> None:
        self._found: dict[int, list[Any]] = {}

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._found

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        return self._found[id(tensor)][1]

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> None:
        known = self._found.get(id(tensor))
        if known is not None:
            known[1] = value
        else:
            forget = partial(self._found.pop, id(tensor))
            self._found[id(tensor)] = [weakref.ref(tensor, forget), value]

    def get(self, tensor: torch.Tensor) -> Any:
        """Return the value of a tensor, or None."""
        known = self._found.get(id(tensor))
        if known is None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{type(tensor).__name__} is no tensor")
        return known and known[1]


class Tracer(TorchDispatchMode):
    """Labels the axes of every tensor of a run in ``trace``; ``ghosts`` runs the operations.

    Attributes:
        labels: the rows (see ``atoms``) of every axis of a tensor.
        domains: the rows of the axis whose positions an integer tensor holds (from ``topk``).
        counts: tensors that count how often each position was chosen.
        weights: parameters, buffers and what is made of them alone -> rows of axes that were
            reduced away.
        vocabulary: tensors of token ids.
        cut_from: slices -> rows of the axis that they were cut from.
        unread: new tensors that nothing has read -> their atoms.
        function: name of the torch function that runs.
    """

    def __init__(self, trace: Trace, ghosts: GhostRunner | None = None) -> None:
        super().__init__()
        self._ghosts = ghosts
        self.trace = trace
        self.atoms = trace.atoms
        self.labels = Marks()
        self.domains = Marks()
        self.counts = Marks()
        self.weights = Marks()
        self.names = Marks()
        self.vocabulary = Marks()
        self.cut_from = Marks()
        self.unread = Marks()
        self.function: str | None = None
        self._shared: dict[str, int] = {}
        self._frozen_rows: dict[tuple[str, int], IntArray] = {}
        self._fixed: dict[int, IntArray] = {}
        self._ragged: dict[int, Ragged] = {}
        self._packed: set[int] = set()
        self._lengths: dict[int, int] = {}
        self._written: set[int] = set()
        self._trained: set[int] = set()
        self._buffers: set[int] = set()
        self._clock = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip a wrapper around each operation: nothing compiles during a trace."""
        return False

    # ------------------------------------------------------------- labelling

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Give a parameter or buffer one atom per position of each axis."""
        if name not in self.trace.tensors:
            self.trace.tensors[name] = [
                empty_rows(1) if size == 1 else self.atoms.fresh(size) for size in tensor.shape
            ]
        known = self.trace.tensors[name]
        if len(known) == tensor.dim():
            self.labels[tensor] = [
                rows if len(rows) == size else self.frozen_rows(size, "its length has changed")
                for rows, size in zip(known, tensor.shape, strict=True)
            ]
        self.weights[tensor] = ()
        self.names[tensor] = name
        trained = isinstance(tensor, torch.nn.Parameter)
        (self._trained if trained else self._buffers).add(storage_of(tensor))

    def frozen_rows(self, count: int, reason: str) -> IntArray:
        """Return rows that are never deleted, with the reason."""
        if reason not in self._shared:
            atom = self.atoms.fresh(1)
            self.atoms.freeze(atom, reason)
            self._shared[reason] = int(atom[0, 0])
        if (reason, count) not in self._frozen_rows:
            rows = np.full((count, 1), self._shared[reason], dtype=np.int64)
            self._frozen_rows[reason, count] = rows
        return self._frozen_rows[reason, count]

    def add_tokens(self, tokens: torch.Tensor) -> None:
        """Label token ids (batch, sequence), the input of a model."""
        batch, sequence = tokens.shape
        self.labels[tokens] = [
            self.frozen_rows(batch, "the batch"),
            self.frozen_rows(sequence, "the sequence"),
        ]
        self.vocabulary[tokens] = True

    def label(self, tensor: torch.Tensor) -> Axes:
        """Return the rows of every axis; tensors from outside the trace are constants."""
        axes = self.labels.get(tensor)
        if axes is None or len(axes) != tensor.dim():
            axes = self.labels[tensor] = self.frozen_axes(tensor, "a constant in the code")
        return list(axes)

    def frozen_axes(self, tensor: torch.Tensor, reason: str) -> Axes:
        """Return rows that are never deleted for every axis of a tensor."""
        return [self.frozen_rows(size, reason) for size in tensor.shape]

    def freeze_axes(self, tensor: torch.Tensor, reason: str) -> None:
        """State that no axis of a tensor can shrink."""
        for rows in self.label(tensor):
            self.freeze(rows, reason)

    def set_label(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Label a result; axes of one position carry no atoms."""
        for rows, size in zip(axes, tensor.shape, strict=True):  # ValueError: of other dimensions
            if len(rows) != size:
                raise ValueError(f"label {[len(r) for r in axes]} for shape {tuple(tensor.shape)}")
            if size == 1 and rows.size:
                # The code takes this position of a longer axis, so it must stay.
                self.freeze(rows, "single positions of it are taken")
        self.labels[tensor] = [_ONE if len(rows) == 1 else rows for rows in axes]

    def unify(self, left: IntArray, right: IntArray) -> IntArray:
        """State that two axes shrink together."""
        self.atoms.unify(left, right)
        return left if left.shape[1] <= right.shape[1] else right

    def freeze(self, rows: IntArray, reason: str) -> None:
        """State that an axis cannot shrink."""
        self.atoms.freeze(rows, reason)

    def merge(self, outer: IntArray, inner: IntArray) -> IntArray:
        """Return the rows of two merged axes; an inner replica axis becomes one atom per pair.

        Where replicas are the outer axis (`b (r kv) n d`), code finds the original of a copy by its
        position, so a copy goes for all originals at once.
        """
        if len(outer) == 1:
            return inner
        if len(inner) == 1:
            return outer
        if self.atoms.is_replica(inner) and not self.atoms.is_replica(outer):
            live = self.atoms.resolve(outer)
            if live.shape[1] and (live > 0).any(axis=1).all():
                pairs = self._pairs(outer, inner).reshape(-1, 1)
                return np.concatenate([product_rows(outer, inner[:, :0]), pairs], axis=1)
        return product_rows(outer, inner)

    def _pairs(self, outer: IntArray, inner: IntArray) -> IntArray:
        known = self._ragged.get(int(inner[0, 0]))
        shape = len(outer), len(inner)
        if known is not None and known.pairs.shape == shape and self.atoms.same(known.outer, outer):
            return known.pairs
        pairs = self.atoms.fresh(len(outer) * len(inner)).reshape(shape)
        self._add_ragged(Ragged(outer, pairs, inner))
        return pairs

    def _add_ragged(self, ragged: Ragged) -> None:
        self.trace.ragged.append(ragged)
        self._ragged[int(ragged.inner[0, 0])] = ragged

    def _unpack(self, grid: IntArray) -> tuple[IntArray, IntArray] | None:
        """Split an axis of replica pairs again (query heads into groups by key-value head).

        Each outer position keeps as many inner ones, but not the same ones. So the inner axis is a
        new one, which must not be reduced over until it is merged again.
        """
        for ragged in reversed(self.trace.ragged):
            if ragged.pairs.shape != grid.shape[:2]:
                continue
            hit = grid == self.atoms.find(ragged.pairs)[:, :, None]
            if not (hit.sum(axis=2) == 1).all():
                continue
            rest = np.sort(np.where(hit, 0, grid), axis=2)[:, :, 1:]
            if (rest == rest[:, :1]).all():
                inner = self.atoms.fresh(grid.shape[1], replica=True)
                self._packed.add(int(inner[0, 0]))
                self._add_ragged(Ragged(ragged.outer, ragged.pairs, inner))
                return rest[:, 0], inner
        return None

    def require_whole(self, rows: IntArray) -> None:
        """Freeze an axis that is reduced over if its positions differ from group to group."""
        if rows.size and int(rows[0, 0]) in self._packed:
            self.freeze(rows, "the query heads of a group are reduced over")

    def split(self, rows: IntArray, outer: int, inner: int) -> tuple[IntArray, IntArray]:
        """Return the rows of the two axes that an axis of outer * inner positions is viewed as."""
        if outer == 1:
            return empty_rows(1), rows
        if inner == 1:
            return rows, empty_rows(1)
        live = self.atoms.resolve(rows)
        if live.shape[1] == 0:
            return rows.reshape(outer, inner, -1)[:, 0], rows.reshape(outer, inner, -1)[0]
        grid = live.reshape(outer, inner, -1)
        by_outer = (grid == grid[:, :1]).all(axis=(0, 1))
        by_inner = (grid == grid[:1]).all(axis=(0, 1))
        if (by_outer | by_inner).all():
            return grid[:, 0][:, by_outer], grid[0][:, by_inner & ~by_outer]
        unpacked = self._unpack(grid)
        if unpacked is not None:
            return unpacked
        if grid.shape[2] > 2:
            # Two new axes cannot be paired with three atoms: freeze those along neither.
            odd = grid[:, :, ~(by_outer | by_inner)]
            self.freeze(odd.reshape(len(rows), -1), "two views of one axis divide it differently")
            return self.split(rows, outer, inner)
        first, second = self.atoms.fresh(outer), self.atoms.fresh(inner)
        self.atoms.unify(rows, product_rows(first, second))
        return first, second

    def note(self, role: Role, rows: IntArray) -> None:
        """Remember how an axis is used; this gives its group a kind."""
        if len(rows) > 1:
            self.trace.roles.setdefault(role, []).append(rows)

    def choose(self, tensor: torch.Tensor, dim: int, count: int) -> None:
        """Record that ``count`` positions along an axis are chosen by value."""
        rows = self.label(tensor)[dim]
        if self.atoms.resolve(rows).size == 0:
            return
        available = len(rows)
        if tensor.is_floating_point() and tensor.numel():
            # DeepSeek-V2 masks with zeros, others with minus infinity.
            masked = (tensor == -torch.inf) | (tensor == 0)
            available -= int(masked.sum(dim).max())
        self.trace.choices.append(Choice(rows, count, max(available, count)))

    def look_up(self, rows: IntArray, index: torch.Tensor) -> None:
        """Called for every axis that an index reads or writes; subclasses override it."""

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or a constant buffer, or a view or cast of one."""
        return tensor in self.weights and storage_of(tensor) not in self._written

    def is_made_up(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter, or made of one, whose values a ghost made up."""
        known = self._ghosts is not None and tensor in self.weights
        return known and storage_of(tensor) not in self._buffers

    # ------------------------------------- called by the function mode (SizeMode)

    def axes(self, tensor: torch.Tensor) -> Axes | None:
        """Return the rows of a tensor that the trace knows, or None."""
        return self.labels.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def length(self, tensor: torch.Tensor, dim: int) -> Any:
        """Return the size of an axis as an integer that remembers the axis."""
        self._mark_read(tensor)
        rows = self.label(tensor)[dim]
        if len(rows) == 1 or id(rows) in self._fixed:
            return len(rows)
        if not self.atoms.resolve(rows).size:
            self._fixed[id(rows)] = rows  # kept alive, so that no other rows get this id
            return len(rows)
        number = self._lengths.setdefault(id(rows), len(self.trace.lengths))
        if number == len(self.trace.lengths):
            self.trace.lengths.append(rows)
        expr = ("len", number)
        return TracedInt(len(rows), expr, self.used_as_number)

    def _mark_read(self, tensor: torch.Tensor) -> None:
        """Record that something reads the values or the size of a tensor."""
        if tensor in self.unread:
            self.trace.unread -= self.unread[tensor]

    def sized(self, size: int | TracedInt, rows: IntArray, where: str) -> None:
        """Record that an integer is the length of an axis; a literal one freezes it."""
        if len(rows) == 0:
            return
        expr = expr_of(size)
        if next(leaves(expr), None) is not None:
            self.trace.equations.append(Equation(expr, rows, where))
        elif len(rows) > 1:
            self.freeze(rows, f"its size {len(rows)} is written in the code ({where})")

    def tie_windows(self, rows: IntArray, step: int, where: str) -> None:
        """State that every ``step`` neighbouring positions go together."""
        whole = len(rows) // step
        if not rows.size or not whole:
            self.freeze(rows, f"left over by a {where}")
            return
        windows = rows[: whole * step].reshape(whole, step, -1)
        for offset in range(1, step):
            self.atoms.unify(windows[:, 0], windows[:, offset])
        if len(rows) % step:
            self.freeze(rows[whole * step :], f"left over by a {where}")

    def used_as_number(self, expr: Expr) -> None:
        """Record where the code calculates with a size, or compares it."""
        if expr not in self.trace.numbers:
            self.trace.numbers[expr] = code_line()

    def values_read(self, tensor: torch.Tensor, where: str) -> None:
        """Freeze a tensor whose values the code reads: what it does with them is unknown."""
        reason = f"the code follows its values ({where})"
        self.freeze_axes(tensor, reason)
        self._freeze_domains([tensor], reason)

    # ---------------------------------------------------------------- running

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = operation(func)
        inputs = tensors_in([*args, *kwargs.values()])
        self._clock += 1
        for tensor in inputs:
            if tensor in self.names:
                self.trace.order.setdefault(self.names[tensor], self._clock)
            self._mark_read(tensor)
        if known.mutates and inputs and inputs[0] in self.weights:
            self._written |= {storage_of(inputs[0])} - self._trained
        before = args
        if known.reshapes:  # the rule must see the old axes
            before = (inputs[0].detach(), *args[1:])
            self.labels[before[0]] = self.label(inputs[0])
            inputs = [before[0], *inputs[1:]]
        call = Call(known.name, inputs, self.execute(known, args, kwargs))
        try:
            if self.function in (COMPILED_CODE, TRANSFORMED_CODE):
                raise UnplacedError(f"read by {self.function}, which cannot be followed")
            if known.op.rule is None:
                raise UnplacedError(f"no rule for the operation {call.name}")
            if known.op.domain == "read":
                self._freeze_domains(inputs, f"its positions are chosen by {call.name}")
            known.op.rule(self, call, **known.asked(known.op.rule, before, kwargs))
        except (UnplacedError, ValueError, LookupError, TypeError) as error:
            # The rule was not made for this form of the call.
            form = f"no rule for this form of the operation {call.name}"
            reason = str(error) if isinstance(error, UnplacedError) else form
            for tensor in inputs:
                self.freeze_axes(tensor, reason)
            for tensor in call.results:
                self.set_label(tensor, self.frozen_axes(tensor, reason))
            self._freeze_domains(inputs, reason)
        else:
            if known.op.domain == "kept" and inputs[0] in self.domains:
                for tensor in call.results:
                    self.domains[tensor] = self.domains[inputs[0]]
        self.follow(known, call, args)
        return call.out

    def _freeze_domains(self, tensors: list[torch.Tensor], reason: str) -> None:
        for tensor in tensors:
            if tensor in self.domains:
                self.freeze(self.domains[tensor], reason)

    def follow(self, known: Operation, call: Call, args: tuple[Any, ...]) -> None:
        """Mark results as weights, token ids or slices if their inputs are."""
        if known.view and call.inputs[0] in self.cut_from:
            for tensor in call.results:
                if tensor not in self.cut_from:
                    self.cut_from[tensor] = self.cut_from[call.inputs[0]]
        # A buffer that was written to (a cache) counts as an activation.
        is_weight = known.op.makes_weights and all(one in self.weights for one in call.inputs)
        are_tokens = False
        if known.op.moves and (first := tensors_in(args[:1])):
            are_tokens = all(one in self.vocabulary for one in first)
            is_weight = all(map(self.is_weight, first))
        lost = tuple(rows for one in call.inputs for rows in self.weights.get(one) or ())
        for tensor in call.results:
            if is_weight:
                self.weights[tensor] = lost
            if are_tokens:
                self.vocabulary[tensor] = True

    def execute(self, known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation; the twin overrides this."""
        if self._ghosts is not None:
            return self._ghosts.run(known, args, kwargs)
        return known.func(*args, **kwargs)


_ONE = empty_rows(1)
