"""The inputs and outputs of the children of module lists.

``Layers`` tells whether a layer could be removed. A layer whose inputs depend on its place in the
list (a mask by parity, a scale by index) would get other inputs once layers before it are gone. So
the inputs of all layers are compared by value. ``Siblings`` runs experts that no token reached.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from llm_pruner.models.layers import is_layer_list
from llm_pruner.tracing.sizes import code_line, plain
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Marks, Tracer
from llm_pruner.types import IntArray

_DEPTH = 4
_MANY = 1 << 22

Given = dict[str, Any]
"""Place in the arguments -> the value, or a digest of a tensor's values."""


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden states among a module's arguments: the first, or the first float tensor."""
    if args:
        return args[0]
    named = kwargs.get("hidden_states")
    others = (v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next(others, None) if named is None else named


class Layers:
    """Records for each layer of each module list its inputs, and whether it could be left out.

    Attributes:
        axes: layer -> for each call the (input, output) rows of the last axis and then of those
            between sequence and last axis (streams); None if the output cannot replace the input.
        given: module list -> number of the layer -> its inputs, call by call.
        where: module list -> the line of code that calls its layers.
    """

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self.axes: dict[str, list[list[tuple[IntArray, IntArray]] | None]] = defaultdict(list)
        self.given: dict[str, dict[int, list[Given]]] = defaultdict(lambda: defaultdict(list))
        self.where: dict[str, str] = {}
        self._tracer = tracer
        self._digests = Marks()
        self._returned = Marks()
        self._views = 0
        self._first: dict[str, str] = {}
        # Weak references: holding a tensor would change the operations of the run.
        self._last: dict[str, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._chained: dict[str, bool] = {}
        self._beside: dict[str, list[weakref.ref[torch.Tensor]]] = {}
        self._arguments: dict[tuple[str, int | str], weakref.ref[torch.Tensor]] = {}
        self._handles = [
            register(partial(note, path, index), with_kwargs=True)
            for path, module in model.named_modules()
            if is_layer_list(module) and len(module) > 1
            for index, child in module._modules.items()
            if child is not None and index.isdigit()
            for register, note in (
                (child.register_forward_pre_hook, self._enter),
                (child.register_forward_hook, self._note),
            )
        ]

    def _enter(self, parent: str, index: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Record whether a layer gets the very output of the one before it."""
        source = hidden_in(args, kwargs)
        before, version = self._last.get(parent, (None, 0))
        first = self._first.setdefault(parent, index) == index
        same = isinstance(source, torch.Tensor) and before is not None and before() is source
        self._chained[parent] = first or (same and source._version == version)

    def _note(
        self, parent: str, index: str, _: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        source = hidden_in(args, kwargs)
        if parent not in self.where:
            self.where[parent] = code_line(passing_calls=True)
        self.given[parent][int(index)].append(
            {
                key: self._value(value, (parent, index))
                for key, value in _parts({**dict(enumerate(args)), **kwargs}, "", 0)
                if value is not source
            }
        )
        for key, value in _parts([output], "", 0):
            if isinstance(value, torch.Tensor):
                self._returned[value] = ((parent, index), key)
        several = isinstance(output, tuple | list)
        result, *rest = output if several and output else [output]
        chained = self._stands_alone(parent, source, args, kwargs) and self._chained[parent]
        if isinstance(result, torch.Tensor):
            self._last[parent] = (weakref.ref(result), result._version)
        self._beside[parent] = [weakref.ref(t) for t in rest if isinstance(t, torch.Tensor)]
        before_it, behind_it = self._tracer.axes(source), self._tracer.axes(result)
        pairs = None
        if chained and before_it and behind_it and _lengths(before_it) == _lengths(behind_it):
            every = list(zip(before_it, behind_it, strict=True))
            pairs = [every[-1], *every[2:-1]]
        self.axes[f"{parent}.{index}"].append(pairs)

    def _stands_alone(self, parent: str, source: Any, args: Any, kwargs: Any) -> bool:
        """Whether the hidden states are all that a layer gets of the layers before it.

        Not so if it gets something else that the last one returned, or another tensor of the hidden
        size that is not the same for all layers (the states of earlier layers).
        """
        alone = True
        made = self._beside.get(parent, [])
        for key, value in [*enumerate(args), *kwargs.items()]:
            if not isinstance(value, torch.Tensor) or value is source:
                continue
            if any(other() is value for other in made):
                alone = False
            before = self._arguments.get((parent, key))
            self._arguments[parent, key] = weakref.ref(value)
            axes, hidden = self._tracer.axes(value), self._tracer.axes(source)
            if before is None or before() is value or not axes or not hidden:
                continue
            atoms = self._tracer.atoms
            if atoms.resolve(axes[-1]).size and atoms.same(axes[-1], hidden[-1]):
                alone = False
        return alone

    def _value(self, value: Any, child: tuple[str, str]) -> Any:
        if not isinstance(value, torch.Tensor):
            return plain(value)
        if value in self._returned and self._returned[value][0] == child:
            return "its own", self._returned[value][1]  # keys and values of the call before
        if value not in self._digests:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                if not self._tracer.is_made_up(value):
                    self._digests[value] = _digest(value)
                else:  # equal for this weight only: its name, or a number for a view of one
                    self._views += 1
                    self._digests[value] = self._tracer.names.get(value) or ("view", self._views)
        return self._digests[value]

    def by_place(self) -> dict[str, str]:
        """Return the module lists whose layers get different inputs -> which input and where."""
        found = {}
        for path, children in self.given.items():
            first, *others = children.values()
            names = [name for other in others for name in different(first, other)]
            if names:
                found[path] = f"{names[0]} differs from layer to layer ({self.where[path]})"
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _lengths(axes: Axes) -> list[int]:
    return [len(rows) for rows in axes]


def different(left: list[Given], right: list[Given]) -> Iterator[str]:
    """Yield the arguments in which the inputs of two layers differ, call by call."""
    for one, other in zip(left, right, strict=False):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                yield f"argument {name}"


def _parts(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of everything comparable in the arguments; no other objects."""
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, int | float | str):
        yield name, value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif depth < _DEPTH and isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _parts(item, f"{name}.{place}", depth + 1)


def _digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    kind = (str(tensor.dtype), tuple(tensor.shape))
    values = tensor.detach()
    if values.is_meta:
        return kind
    if values.numel() > _MANY:
        values = values[(slice(0, 8),) * values.dim()]
    if values.is_complex():
        values = torch.view_as_real(values)
    data = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (*kind, hashlib.blake2b(data, digest_size=16).hexdigest())


class Siblings:
    """Records which children of module lists and dictionaries ran, and on what."""

    def __init__(self, model: nn.Module) -> None:
        self._parents = [
            module
            for module in model.modules()
            if isinstance(module, nn.ModuleList | nn.ModuleDict)
        ]
        self._calls: dict[nn.Module, tuple[Any, Any, Any]] = {}
        self._where: dict[nn.Module, str] = {}
        self._handles = [
            child.register_forward_hook(self._hook, with_kwargs=True)
            for parent in self._parents
            for child in parent.children()
        ]

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A call without tokens shows nothing.
        if all(tensor.numel() for tensor in _tensors((args, kwargs))):
            self._calls.setdefault(module, (args, kwargs, output))
            self._where.setdefault(module, code_line(passing_calls=True))

    def run_rest(self, tracer: Tracer) -> None:
        """Run each child that was not called on the inputs of an equal sibling."""
        for parent in self._parents:
            called = [child for child in parent.children() if child in self._calls]
            for child in [child for child in parent.children() if child not in self._calls]:
                like = self._like(child, called)
                if like is None:
                    continue
                args, kwargs, expected = self._calls[like]
                try:
                    output = child(*args, **kwargs)
                except Exception:  # it stays unreached
                    continue
                for one, other in zip(_tensors(output), _tensors(expected), strict=False):
                    axes = tracer.label(one), tracer.label(other)
                    if _lengths(axes[0]) == _lengths(axes[1]):
                        for left, right in zip(*axes, strict=True):
                            tracer.unify(left, right)

    def _like(self, child: nn.Module, called: list[nn.Module]) -> nn.Module | None:
        """Return the first of several equal siblings that one line of code called, or None.

        That line calls experts. A single sibling is no evidence: others may get other inputs, as
        cross-attention does.
        """

        def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
            with torch._C.DisableTorchFunction():  # not a comparison of the model's code
                return [(name, parameter.shape) for name, parameter in module.named_parameters()]

        by_line: dict[str, nn.Module] = {}
        for other in called:
            if type(child) is type(other) and shapes(child) == shapes(other):
                first = by_line.setdefault(self._where[other], other)
                if first is not other:
                    return first
        return None

    def close(self) -> None:
        """Remove the hooks, and drop the recorded inputs."""
        for handle in self._handles:
            handle.remove()
        self._calls.clear()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
