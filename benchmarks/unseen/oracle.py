"""What a pruned model must compute, worked out without the project's trace or twin.

The dense model runs with the removed positions of its weights set to zero. It also runs as it is,
on the same input. A slice of an activation that is zero in the first run and not in the second is
dead, and an operation that would still see it is computed on the others: means, norms, softmax,
top-k and the like over that axis. What a function with f(0) != 0 makes of a dead slice is zeroed
again. Removed layers return their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from unseen.copies import own_copy

Run = Callable[[nn.Module], list[torch.Tensor]]

AVERAGES = {"mean", "nanmean"}
ON_LIVING = {"var", "std", "var_mean", "std_mean", "amax", "amin", "logsumexp", "prod", "median"}
EXTREMES = {"max", "min", "argmax", "argmin"}
SOFTMAX = {"softmax", "log_softmax", "gumbel_softmax"}
NOT_ZERO_AT_ZERO = (
    {"sigmoid", "exp", "softplus", "cos", "log", "log2", "logsigmoid", "rsqrt", "reciprocal", "pow"}
    | {
        "exp2",
        "hardsigmoid",
        "logcumsumexp",
        "clamp",
        "clamp_min",
        "clip",
        "cosh",
        "sinc",
        "special_expit",
    }
    | {"float_power", "__pow__", "__rpow__", "__rtruediv__", "__rdiv__"}
)
SUMS = {"add", "sub", "rsub", "__add__", "__radd__", "__sub__", "__rsub__", "__iadd__", "__isub__"}
QUOTIENTS = {"div", "true_divide", "divide", "__truediv__", "__itruediv__"}
ORDER = {"topk", "sort", "argsort", "cumprod"}
WATCHED = AVERAGES | ON_LIVING | EXTREMES | SOFTMAX | NOT_ZERO_AT_ZERO | SUMS | QUOTIENTS | ORDER
NORMS = {"layer_norm", "rms_norm", "group_norm"}


class Double(TorchFunctionMode):
    """Computes in float64 what code casts to float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return self.call(*_in_double(func, args, kwargs or {}))

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        return func(*args, **kwargs)


def _in_double(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    if func is torch.Tensor.float:
        func = torch.Tensor.double

    def widened(value: Any) -> Any:
        return wide.get(value, value) if isinstance(value, torch.dtype) else value

    return func, tuple(map(widened, args)), {key: widened(v) for key, v in kwargs.items()}


def _name(func: Any) -> tuple[str, bool]:
    """Return the name of an operation and whether it works in place."""
    name = getattr(func, "__name__", "")
    place = name.endswith("_") and not name.endswith("__")
    return name.rstrip("_") if place else name, place or name.startswith("__i")


def _zeros(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return for each axis which of its positions hold only zeros, shape (size,)."""
    some = tensor.detach() != 0
    every = range(tensor.dim())
    return [
        ~(some.any(dim=[d for d in every if d != axis]) if tensor.dim() > 1 else some)
        for axis in every
    ]


class Reference(Double):
    """Notes which slices are zero in a run of the dense model; used again in the zeroed one.

    Attributes:
        strict: only what has a gradient can be dead. Routing that changes with what was zeroed may
            leave an expert without a token, which is not dead.
        lost: the runs called different operations, so that some dead slices are not known.
    """

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.notes: list[tuple[str, tuple[int, ...], list[torch.Tensor]]] = []
        self.place = 0
        self.replays = False
        self.lost = False

    def again(self) -> Reference:
        """Go back to the first note, for the run of the zeroed model."""
        self.place, self.replays = 0, True
        return self

    def meet(self, other: Reference) -> None:
        """Keep of the zero slices those that are zero in another run as well."""
        for note, second in zip(self.notes, other.notes, strict=False):
            if note[:2] == second[:2]:
                for zeros, more in zip(note[2], second[2], strict=True):
                    zeros &= more

    def dead(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor | None]:
        """Return for each axis which positions are dead, None where none is."""
        zeros = _zeros(tensor)
        if not self.replays:
            self.notes.append((name, tuple(tensor.shape), zeros))
            return [None] * tensor.dim()
        if self.place < len(self.notes):
            known, shape, before = self.notes[self.place]
            self.place += 1
            if (known, shape) == (name, tuple(tensor.shape)):
                if self.strict and not tensor.requires_grad:
                    return [None] * tensor.dim()
                found = [now & ~old for now, old in zip(zeros, before, strict=True)]
                # An axis that is dead as a whole is the shadow of another one.
                return [d if bool(d.any()) and not bool(d.all()) else None for d in found]
        self.lost = True
        return [None] * tensor.dim()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, place = _name(func)
        if name not in WATCHED and name not in NORMS:
            return func(*args, **kwargs)
        source = args[0] if args else kwargs.get("input")
        if name in ("rsub", "__rsub__", "__radd__") and len(args) > 1:
            source = args[0]
        if name in SUMS and isinstance(args[0], int | float):
            args = (torch.as_tensor(args[0]), *args[1:])
            source = args[1]
        if not isinstance(source, torch.Tensor) or not source.is_floating_point():
            return func(*args, **kwargs)
        if source.dim() == 0:
            return func(*args, **kwargs)
        if name in QUOTIENTS:
            return self._divide(func, name, args, kwargs)
        if name in SUMS:
            return self._add(func, name, args, kwargs, place)
        dead = self.dead(name, source)
        if all(d is None for d in dead):
            return func(*args, **kwargs)
        if name in NOT_ZERO_AT_ZERO:
            mask = _spread(dead, source)
            if place:
                func(*args, **kwargs)
                return source.masked_fill_(mask, 0)
            safe = source.masked_fill(mask, 1)
            return func(safe, *args[1:], **kwargs).masked_fill(mask, 0)
        if name in NORMS:
            return self._norm(func, name, source, dead, args, kwargs)
        return self._reduce(func, name, source, dead, args, kwargs)

    def _add(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: bool
    ) -> Any:
        left = args[0]
        right = args[1] if len(args) > 1 else kwargs.get("other")
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or out.dim() == 0:
            return out
        mask = None
        for one, other in ((left, right), (right, left)):
            if not isinstance(one, torch.Tensor) or one.dim() == 0 or not one.is_floating_point():
                continue
            dead = self.dead(name, one)
            shape = tuple(other.shape) if isinstance(other, torch.Tensor) else ()
            for axis, gone in enumerate(dead):
                back = one.dim() - axis
                if gone is None or one.shape[axis] != out.shape[out.dim() - back]:
                    continue
                # What the other brings along its own axis stays.
                if back <= len(shape) and shape[-back] != 1:
                    continue
                here = gone.view([-1] + [1] * (back - 1))
                mask = here if mask is None else mask | here
        if mask is None:
            return out
        return out.masked_fill_(mask, 0) if place else out.masked_fill(mask, 0)

    def _divide(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        below = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(below, torch.Tensor) and below.is_floating_point() and below.dim():
            dead = self.dead(name, below)
            if any(d is not None for d in dead):
                args = (args[0], below.masked_fill(_spread(dead, below), 1), *args[2:])
        return func(*args, **kwargs)

    def _norm(
        self,
        func: Any,
        name: str,
        source: torch.Tensor,
        dead: list[torch.Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if name == "group_norm":
            return self._group_norm(func, dead[1], args, kwargs)
        gone = dead[-1]
        named = dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False))
        if name == "rms_norm":
            named = dict(zip(("input", "shape", "weight", "eps"), args, strict=False))
        named |= kwargs
        shape = named.get("shape", named.get("normalized_shape"))
        if gone is None:
            return func(*args, **kwargs)
        if len(shape) != 1:
            self.lost = True
            return func(*args, **kwargs)
        alive = torch.nonzero(~gone)[:, 0]
        weight, bias = (
            None if named.get(key) is None else named[key][alive] for key in ("weight", "bias")
        )
        part = source.index_select(-1, alive)
        eps = named.get("eps")
        if name == "layer_norm":
            out = F.layer_norm(part, (len(alive),), weight, bias, 1e-5 if eps is None else eps)
        else:
            out = F.rms_norm(part, (len(alive),), weight, eps)
        return torch.zeros_like(source).index_copy(source.dim() - 1, alive, out)

    def _group_norm(
        self,
        func: Any,
        gone: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if gone is not None:
            groups = gone.view(args[1] if len(args) > 1 else kwargs["num_groups"], -1)
            # A group that is dead as a whole disturbs no other.
            self.lost |= not torch.equal(groups.any(1), groups.all(1))
        return func(*args, **kwargs)

    def _reduce(
        self,
        func: Any,
        name: str,
        source: torch.Tensor,
        dead: list[torch.Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        given = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        if name == "topk":
            given = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        elif name in ("sort", "argsort") and given is None:
            given = -1
        if isinstance(given, torch.Tensor | bool) or (name in ("std", "var") and given is None):
            given = None
        if given is None:
            axes = list(range(source.dim()))
        else:
            axes = [
                a % source.dim() for a in (given if isinstance(given, tuple | list) else [given])
            ]
        touched = [axis for axis in axes if dead[axis] is not None]
        if not touched:
            return func(*args, **kwargs)
        if name in AVERAGES:
            out = func(*args, **kwargs)
            for axis in touched:
                gone = dead[axis]
                assert gone is not None
                out = out * (len(gone) / int((~gone).sum()))
            return out
        if len(touched) > 1:
            self.lost = True
            return func(*args, **kwargs)
        (axis,) = touched
        gone = dead[axis]
        assert gone is not None
        alive = torch.nonzero(~gone)[:, 0]
        if name in SOFTMAX:
            out = func(source.index_select(axis, alive), *args[1:], **kwargs)
            return torch.zeros_like(source).index_copy(axis, alive, out.to(source.dtype))
        if name in ("topk", "max", "min", "median") and given is not None:
            values, places = func(source.index_select(axis, alive), *args[1:], **kwargs)
            return _Pair(values, alive[places])
        if name in ("argmax", "argmin"):
            return alive[func(source.index_select(axis, alive), *args[1:], **kwargs)]
        if name in ON_LIVING or name in EXTREMES:
            return func(source.index_select(axis, alive), *args[1:], **kwargs)
        self.lost = True
        return func(*args, **kwargs)


class _Pair(tuple[torch.Tensor, torch.Tensor]):
    """Values and places, as operations that choose return them."""

    def __new__(cls, values: torch.Tensor, indices: torch.Tensor) -> _Pair:
        return super().__new__(cls, (values, indices))

    @property
    def values(self) -> torch.Tensor:
        return self[0]

    @property
    def indices(self) -> torch.Tensor:
        return self[1]


def _spread(dead: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Return dead positions as a mask that broadcasts over the tensor."""
    mask = torch.zeros([1] * like.dim(), dtype=torch.bool)
    for axis, gone in enumerate(dead):
        if gone is not None:
            mask = mask | gone.view([-1 if d == axis else 1 for d in range(like.dim())])
    return mask


def zeroed(model: nn.Module, gone: dict[tuple[str, int], np.ndarray[Any, Any]]) -> nn.Module:
    """Return a copy of the model with the given positions of (tensor, axis) set to zero."""
    model = own_copy(model)
    for (name, dim), positions in gone.items():
        path, _, key = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), key).detach()
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.index_fill_(dim, torch.from_numpy(positions), 0)
    return model


@contextmanager
def bypassed(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Let the given layers return what they were given."""

    given: dict[nn.Module, torch.Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        source = next(
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        )
        # A copy: some layers add to their input in place.
        given[module] = source.clone()

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        del args, kwargs
        source = given.pop(module)
        if isinstance(output, tuple | list):
            return type(output)([source, *output[1:]])
        return source

    handles = []
    for name in layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _other_signs(model: nn.Module, seed: int) -> nn.Module:
    model = own_copy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = parameter.data * signs
    return model


def expected(
    run: Run, dense: nn.Module, silent: nn.Module, layers: Sequence[str], strict: bool = False
) -> tuple[list[torch.Tensor], bool]:
    """Return what the pruned model must compute, and whether the oracle lost its way.

    ``strict`` needs gradients enabled. Neither way agrees with a wrong model by accident.
    """
    dense, silent = own_copy(dense), own_copy(silent)
    with Double():
        # What code memoises is there before the first note is taken.
        run(own_copy(dense))
    reference = Reference(strict)
    with reference:
        run(dense)
    if strict:
        # A channel may be zero by chance, behind a ReLU; seldom with other weights as well.
        for seed in range(3):
            other = Reference()
            with other:
                run(_other_signs(dense, seed))
            reference.meet(other)
    with bypassed(silent, layers), reference.again():
        wanted = run(silent)
    reference.lost |= reference.place != len(reference.notes)
    return wanted, reference.lost


def computed(run: Run, model: nn.Module) -> list[torch.Tensor]:
    """Return what a model computes in float64."""
    with Double():
        return run(model)


def to_double(model: nn.Module) -> nn.Module:
    """Turn all tensors of a model to float64, those in plain attributes too."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            if value.is_floating_point():
                return value.double()
            return value.to(torch.complex128) if value.is_complex() else value
        if type(value) in (tuple, list):
            return type(value)(wide(item) for item in value)
        return value

    model.double()
    for module in model.modules():
        for space in (module._buffers, vars(module)):
            for key, value in list(space.items()):
                if not key.startswith("_") or isinstance(value, torch.Tensor):
                    space[key] = wide(value)
    return model


def difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest value; infinite if not finite."""
    worst, size = 0.0, 1e-30
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        # Code may rule tokens out by minus infinity.
        same = a.detach() == b.detach()
        apart = (a.detach() - b.detach()).abs().masked_fill(same, 0)
        worst = max(worst, float(apart.max()) if bool(apart.isfinite().all()) else float("inf"))
        finite = a.detach()[a.detach().isfinite()]
        size = max(size, float(finite.abs().max()) if finite.numel() else 0.0)
    return worst / size
