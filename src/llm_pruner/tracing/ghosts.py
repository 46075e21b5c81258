"""Traces models without weights (on the meta device), and large ones without computing products.

Most models do not run on meta tensors, as their code reads masks and positions. So a *ghost* takes
the place of every parameter: a tensor on the CPU whose positions share one element. Products with
ghosts are not computed: their results get the right shape and random values (a router's scores must
differ). Integers and masks are computed as usual.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from llm_pruner.models.layers import with_initialisers
from llm_pruner.tracing.ops import Operation, tensors_in
from llm_pruner.tracing.provenance import put_back, spaces_of

LARGEST = 1 << 22
"""Elements of the largest result that is held in memory; larger ones are ghosts too."""

COMPUTED = 1 << 16
"""Elements of the largest factor of a product that is computed, as the angles of positions are."""

_STEP = 7919  # by which results begin at other values; a prime


def is_ghost(tensor: torch.Tensor) -> bool:
    """Whether all positions of a tensor share one element."""
    strides = tensor.stride()
    return (
        0 in strides
        and tensor.numel() > 1
        and all(stride == 0 for size, stride in zip(tensor.shape, strides, strict=True) if size > 1)
    )


@contextmanager
def ghosts_of(model: nn.Module, *, weights: bool = False) -> Iterator[None]:
    """Replace all tensors on meta, or with ``weights`` all parameters, by ghosts in the context.

    Buffers get the values of the model's own initialisation, as its code follows positions and
    masks. Tied parameters stay tied.
    """
    stand_ins: dict[int, torch.Tensor] = {}

    def replace(
        space: dict[str, Any], make: Callable[[torch.Tensor], torch.Tensor], every: bool = False
    ) -> bool:
        found = {
            k: v for k, v in space.items() if isinstance(v, torch.Tensor) and (v.is_meta or every)
        }
        for key, tensor in found.items():
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = make(tensor)
            space[key] = stand_ins[id(tensor)]
        return bool(found)

    with put_back(spaces_of(model)):
        for _, module, initialise in with_initialisers(model):
            has_buffers = replace(module._buffers, _zeros)
            if (replace(vars(module), _zeros) or has_buffers) and initialise is not None:
                _initialise_(module, initialise)
        for module in model.modules():
            replace(
                module._parameters,
                lambda one: nn.Parameter(_ghost(one.shape, one.dtype), False),
                weights,
            )
        yield


def _initialise_(module: nn.Module, initialise: Callable[[nn.Module], object]) -> None:
    """Fill the buffers of a module as ``from_pretrained`` does for those not in a checkpoint."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It may fail on parameters on meta; the buffers then stay zeros.
        with suppress(Exception):
            initialise(module)


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _ghost(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), dtype=dtype, device="cpu").expand(shape)


class GhostRunner:
    """Runs operations; those with ghosts are only shaped."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._values = torch.rand(2 * COMPUTED, generator=generator, device="cpu").mul_(2).sub_(1)
        self._place = 0

    def run(self, known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation, or one of its shape."""
        inputs = tensors_in([*args, *kwargs.values()])
        ghosts = any(is_ghost(tensor) for tensor in inputs)
        most = max((tensor.numel() for tensor in inputs), default=0)
        large = most > LARGEST
        if known.view or not (ghosts or large or (known.op.product and most > COMPUTED)):
            return known.func(*args, **kwargs)
        if known.mutates:
            target = kwargs.get("out", args[0] if args else None)
            # A ghost holds no values that could change.
            if isinstance(target, torch.Tensor) and (
                is_ghost(target) or (large and target.is_floating_point())
            ):
                return target
        elif large or known.op.product:
            shaped = self._shaped(known, args, kwargs)
            if shaped is not None:
                return shaped
        return known.func(*args, **kwargs)

    def _shaped(self, known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return random results of the right shapes; None where values are asked for."""
        if known.name == "_grouped_mm":
            # On meta it asks for strides that only the weights themselves have.
            left, right = args[0], args[1]
            out = torch.empty(left.shape[0], right.shape[-1], dtype=left.dtype, device="meta")
        else:
            named = {key: _mapped(_to_meta, value) for key, value in kwargs.items()}
            if kwargs.get("device") is not None:
                named["device"] = torch.device("meta")
            try:
                out = known.func(*(_mapped(_to_meta, value) for value in args), **named)
            except (RuntimeError, NotImplementedError):
                return None
        results = tensors_in([out])
        if not results or not all(tensor.is_floating_point() for tensor in results):
            return None
        return _mapped(self._filled, out)

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > LARGEST:
            return _ghost(tensor.shape, tensor.dtype)
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        values = self._drawn(1 + sum((size - 1) * stride for size, stride in sizes))
        return values.to(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def _drawn(self, count: int) -> torch.Tensor:
        """Return values of [-1, 1), others at each call."""
        self._place = (self._place + _STEP) % COMPUTED
        row = self._values[self._place : self._place + COMPUTED]
        return (
            row.repeat(-(-count // COMPUTED))[:count] if count > COMPUTED else row[:count].clone()
        )


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a value with the tensors in it replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return tree_map_only(torch.Tensor, function, value)
    return value


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    if is_ghost(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
