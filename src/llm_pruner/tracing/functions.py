"""Watches calls of torch functions, where the integers that size axes still know their origin.

Below this level PyTorch has turned them into plain numbers. ``sized`` states which axis of a
function's result an integer sizes. An integer of known origin that reaches any other function is
recorded as used as a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from llm_pruner.tracing.ops import UnplacedError, parameters
from llm_pruner.tracing.sizes import TracedInt, TracedShape, code_line, plain
from llm_pruner.tracing.stand_ins import REWRITES, TRANSFORMED_CODE
from llm_pruner.types import IntArray

if TYPE_CHECKING:
    from llm_pruner.tracing.tracer import Tracer

_SHAPE: Callable[..., torch.Size] = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_NBYTES: Callable[..., int] = torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]


def _is_transformed(value: Any) -> bool:
    """Whether a tensor is one of ``torch.func``, which hides some of its axes."""
    return isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value)


class SizeMode(TorchFunctionMode):
    """Tells the tracer which integers size which axes, and makes shapes of traced integers."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if any(map(_is_transformed, (*args, *kwargs.values()))):
            plainly = _plain_values(args), _plain_values(kwargs)
            return self._within(TRANSFORMED_CODE, func, *plainly[0], **plainly[1])
        if name == "__get__":
            return self._attribute(func, args)
        if name == "size":
            shape, dims = self._shape(args[0]), [*args[1:], *kwargs.values()]
            return shape[dims[0]] if dims and dims[0] is not None else shape
        if name in ("numel", "nelement"):
            return math.prod(self._shape(args[0]))
        if name == "__len__" and args[0].dim():
            # ``len`` gives a plain number, so the axis must keep its size.
            _numbers(self.tracer, self._shape(args[0])[:1])
        if name in _MEASURES:
            _numbers(self.tracer, self._shape(next(iter((*args, *kwargs.values())))))
        if name in _READS:
            self.tracer.values_read(args[0], name)
        if name in REWRITES:
            with self:
                rewritten = REWRITES[name](*args, **kwargs)
            if rewritten is not None:
                return rewritten
        out = self._within(name, func, *_plain_values(args), **_plain_values(kwargs))
        if name in _SIZED:
            takes, record = _SIZED[name]
            record(self.tracer, out, **_asked(record, takes, args, kwargs))
        elif name not in _DIMENSIONS_ONLY:
            _numbers(self.tracer, [*args, *kwargs.values()])
        return out

    def _within(self, name: str, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function under a name that the tracer knows meanwhile."""
        outer, self.tracer.function = self.tracer.function, name
        try:
            return func(*args, **kwargs)
        finally:
            self.tracer.function = outer

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Read an attribute of a tensor; an operation may make it (``.T``)."""
        if func == _SHAPE:
            return self._shape(args[0])
        if func == _NBYTES:
            _numbers(self.tracer, self._shape(args[0]))
        return self._within("__get__", func, *args)

    def _shape(self, tensor: torch.Tensor) -> Sequence[Any]:
        shape = _SHAPE(tensor)
        if self.tracer.axes(tensor) is None:
            return shape
        sizes = [self.tracer.length(tensor, dim) for dim in range(len(shape))]
        return TracedShape(sizes) if any(type(size) is TracedInt for size in sizes) else shape


def _numbers(tracer: Tracer, values: Sequence[Any]) -> None:
    """Record that traced integers among values were used as numbers."""
    for value in _flatten(values):
        if type(value) is TracedInt:
            tracer.used_as_number(value.expr)


def _flatten(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            flat.extend(_flatten(value))
        elif isinstance(value, slice):
            flat.extend((value.start, value.stop, value.step))
        else:
            flat.append(value)
    return flat


def _plain_values(value: Any) -> Any:
    """Return arguments with plain integers."""
    make = _PLAIN.get(type(value))
    return value if make is None else make(value)


_PLAIN: dict[type, Callable[[Any], Any]] = {
    TracedInt: lambda value: value.value,
    TracedShape: lambda value: torch.Size([plain(size) for size in value]),
    torch.Size: lambda value: torch.Size([plain(size) for size in value]),
    tuple: lambda value: tuple([_plain_values(item) for item in value]),
    list: lambda value: [_plain_values(item) for item in value],
    dict: lambda value: {key: _plain_values(item) for key, item in value.items()},
    slice: lambda value: slice(plain(value.start), plain(value.stop), plain(value.step)),
}


_SIZED: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {}
"""Name of a function -> the names of its arguments in order, and what records its sizes."""


def sized(*names: str, takes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register what records the axes that the arguments of these functions size.

    ``takes`` names their arguments in order, ``*name`` for any number of them. The record is called
    with (tracer, result) and those arguments that it has parameters for.
    """

    def add(record: Callable[..., None]) -> Callable[..., None]:
        _SIZED.update(dict.fromkeys(names, (tuple(takes.split()), record)))
        return record

    return add


def _asked(
    record: Callable[..., None], takes: tuple[str, ...], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    given: dict[str, Any] = dict(zip(takes, args, strict=False))
    if takes[-1].startswith("*") and given.pop(takes[-1], None) is not None:
        given[takes[-1][1:]] = args[len(takes) - 1 :]
    given |= kwargs
    return {name: given[name] for name in parameters(record) if name in given}


def _state(tracer: Tracer, tensor: Any, where: str, sizes: Mapping[int, Any]) -> None:
    """Record the integer that sized each axis; a negative one means what is left over."""
    axes = tracer.axes(tensor)
    if axes is not None:
        for dim, size in sizes.items():
            if isinstance(size, int | np.integer) and plain(size) >= 0:
                # A number of numpy counts as one written in the code.
                tracer.sized(size if isinstance(size, int) else int(size), axes[dim], where)


def _shaped(
    tracer: Tracer, out: Any, size: Any = (), shape: Any = (), *, where: str = "new tensor"
) -> None:
    sizes = [one for one in _flatten(size or shape) if isinstance(one, int | np.integer)]
    if len(sizes) == len(tracer.axes(out) or ()):
        _state(tracer, out, where, dict(enumerate(sizes)))


sized("view", "reshape", takes="input *size")(partial(_shaped, where="view"))
sized("expand", "broadcast_to", takes="input *size")(partial(_shaped, where="expand"))


@sized("zeros", "ones", "empty", "rand", "randn", takes="*size")
@sized("new_zeros", "new_ones", "new_empty", takes="input *size")
@sized("full", takes="size fill_value")
@sized("new_full", takes="input size fill_value")
def _create(tracer: Tracer, out: Any, size: Any = (), fill_value: Any = None) -> None:
    _shaped(tracer, out, size)
    _numbers(tracer, [fill_value])


@sized("eye", takes="n m")
def _eye(tracer: Tracer, out: Any, n: Any, m: Any = None) -> None:
    _shaped(tracer, out, [n, n if m is None else m])


@sized("repeat", takes="input *repeats")
@sized("tile", takes="input *dims")
def _repeat(tracer: Tracer, out: Any, input: Any, repeats: Any = (), dims: Any = ()) -> None:
    source, axes = tracer.axes(input), tracer.axes(out)
    times = _flatten(repeats or dims)
    if source is None or axes is None:
        return
    new = len(axes) - len(source)
    times = [1] * (len(axes) - len(times)) + times
    for dim, (count, rows) in enumerate(zip(times, axes, strict=True)):
        if dim < new or len(source[dim - new]) == 1:
            tracer.sized(count, rows, "repeat")
        elif plain(count) > 1:
            tracer.sized(count * tracer.length(input, dim - new), rows, "repeat")


@sized("expand_as", "view_as", "reshape_as", takes="input other")
def _as_other(tracer: Tracer, out: Any, other: Any) -> None:
    if tracer.axes(other) is not None:
        sizes = {dim: tracer.length(other, dim) for dim in range(other.dim())}
        _state(tracer, out, "expand_as", sizes)


@sized("broadcast_tensors", takes="*tensors")
def _broadcast(tracer: Tracer, out: Any) -> None:
    for first, other in pairwise(map(tracer.label, out)):
        for rows in zip(first, other, strict=True):
            tracer.unify(*rows)


@sized("arange", takes="*bounds")
def _arange(
    tracer: Tracer,
    out: Any,
    bounds: Sequence[Any] = (),
    start: Any = None,
    end: Any = None,
    step: Any = None,
) -> None:
    bounds = [*bounds, *(bound for bound in (start, end, step) if bound is not None)]
    if len(bounds) == 1 and type(bounds[0]) is TracedInt:
        _state(tracer, out, f"arange ({code_line()})", {0: bounds[0]})
    else:
        _numbers(tracer, bounds)


@sized("split", "split_with_sizes", takes="tensor split_size_or_sections dim")
def _split(
    tracer: Tracer,
    out: Any,
    tensor: Any,
    split_size_or_sections: Any = None,
    split_size: Any = None,
    split_sizes: Any = None,
    dim: Any = 0,
) -> None:
    named = (split_size_or_sections, split_size, split_sizes)
    sizes = next((given for given in named if given is not None), ())
    if isinstance(sizes, int):
        sizes = [sizes for _ in out]
    for size, piece in zip(sizes, out if tracer.axes(tensor) is not None else (), strict=False):
        # The last piece of an uneven split is shorter: its size follows from the others.
        if plain(size) == piece.size(dim):
            _state(tracer, piece, "split", {dim: size})


@sized("chunk", takes="input chunks dim")
def _chunk(tracer: Tracer, out: Any, input: Any, chunks: Any, dim: Any = 0) -> None:
    if tracer.axes(input) is not None and len(out) > 1:
        size = (tracer.length(input, dim) + chunks - 1) // chunks
        for piece in out:
            if plain(size) == piece.size(dim):
                _state(tracer, piece, "chunk", {dim: size})


@sized("narrow", takes="input dim start length")
def _narrow(tracer: Tracer, out: Any, input: Any, dim: Any, start: Any, length: Any) -> None:
    whole = tracer.axes(input)
    if whole is not None and isinstance(start, int):
        tracer.sized(start, whole[dim][: plain(start)], "narrow")
    _state(tracer, out, "narrow", {dim: length})


@sized("__getitem__", "__setitem__", takes="input index value")
def _getitem(tracer: Tracer, _: Any, input: Any, index: Any, value: Any = None) -> None:
    items = list(index) if isinstance(index, tuple) else [index]
    _numbers(tracer, [value, *(item for item in items if isinstance(item, list))])
    axes = tracer.axes(input)
    if axes is None:
        return
    if any(item is Ellipsis for item in items):
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        taken = sum(_takes(item) for item in items)
        items[place : place + 1] = [slice(None)] * (len(axes) - taken)
    dim = 0
    for item in items:
        if isinstance(item, slice):
            _record_slice(tracer, axes[dim], item)
        elif type(item) is TracedInt:
            tracer.used_as_number(item.expr)
        dim += _takes(item)


def _takes(item: Any) -> int:
    """Return how many axes of the indexed tensor an index item consumes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _record_slice(tracer: Tracer, rows: IntArray, item: slice) -> None:
    size = len(rows)
    if size == 1:
        return
    for bound in (item.start, item.stop):
        place = plain(bound)
        if place is None:
            continue
        if type(place) is not int:  # of numpy, or a tensor
            bound = place = operator.index(place)
        if type(bound) is TracedInt and not -size <= place <= size:
            tracer.used_as_number(bound.expr)
        elif place < 0:
            tracer.sized(-bound, rows[max(size + place, 0) :], "slice")
        elif type(bound) is TracedInt or place < size:
            tracer.sized(bound, rows[:place], "slice")
        if place in (1, -1) and type(bound) is int and plain(item.step) in (None, 1):
            tracer.freeze(rows[:1] if place > 0 else rows[-1:], "a slice leaves it out")
    if type(item.step) is TracedInt:
        tracer.used_as_number(item.step.expr)
    step, first = operator.index(plain(item.step) or 1), plain(item.start) or 0
    if step > 1:
        first += size if first < 0 else 0
        tracer.tie_windows(rows[first - first % step :], step, "strided slice")


@sized("layer_norm", "rms_norm", takes="input normalized_shape")
def _norm(tracer: Tracer, out: Any, normalized_shape: Sequence[Any]) -> None:
    _state(tracer, out, "norm", dict(enumerate(normalized_shape, -len(normalized_shape))))


@sized("unflatten", takes="input dim sizes")
def _unflatten(tracer: Tracer, out: Any, dim: Any, sizes: Sequence[Any]) -> None:
    first = dim % (out.dim() - len(sizes) + 1)
    _state(tracer, out, "unflatten", dict(enumerate(sizes, first)))


@sized(*(f"conv{n}d" for n in (1, 2, 3)), takes="input weight bias stride padding dilation groups")
@sized(
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    takes="input weight bias stride padding output_padding groups dilation",
)
def _convolution(
    tracer: Tracer,
    _: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    output_padding: Any = 0,
    groups: Any = 1,
) -> None:
    """The first axis of the weight is divided into ``groups``, transposed or not."""
    axes, count = tracer.axes(weight), plain(groups)
    if axes is not None and count > 1:
        outer, _ = tracer.split(axes[0], count, len(axes[0]) // count)
        tracer.sized(groups, outer, "groups of a convolution")
    _numbers(tracer, [stride, padding, dilation, output_padding])


@sized("pad", takes="input pad mode value")
def _pad(tracer: Tracer, out: Any, input: Any, pad: Any, value: Any = None) -> None:
    """Padding that repeats or reflects writes into slices of lengths given in the code."""
    for before, after in zip(tracer.axes(input) or (), tracer.axes(out) or (), strict=False):
        if len(before) != len(after):
            for rows in (before, after):
                tracer.sized(len(rows), rows, "pad")
    _numbers(tracer, [pad, value])


@sized("load_balancing_loss_func", takes="gate_logits num_experts")
def _router_losses(tracer: Tracer, _: Any, gate_logits: Any, num_experts: Any) -> None:
    for logits in gate_logits:
        _state(tracer, logits, "the load-balancing loss", {-1: num_experts})


@sized("topk", takes="input k dim")
def _topk(tracer: Tracer, out: Any, k: Any, dim: Any = -1) -> None:
    _state(tracer, out[0], "topk", {dim: k})


@sized("histc", takes="input bins min max")
def _histc(tracer: Tracer, out: Any, bins: Any = None, min: Any = None, max: Any = None) -> None:
    _state(tracer, out, "histc", {0: bins})
    _state(tracer, out, "histc", {0: max + 1 if isinstance(max, int) else None})
    _numbers(tracer, [min])


_READS = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"})
"""Functions that hand values to Python without an operation."""

_MEASURES = frozenset({"stride", "storage_offset", "untyped_storage", "dim_order", "cov"})
"""Functions that turn the sizes of a tensor into plain numbers."""

SHAPED_IN_SIGHT = frozenset(_SIZED) | frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "einsum", "tensordot", "bmm", "baddbmm"}
    | {"flatten", "unsqueeze", "squeeze", "select", "unbind", "normalize", "embedding"}
    | {"softmax", "outer", "mm", "addmm", "dropout", "zeros_like", "ones_like", "full_like"}
    | {"where", "masked_fill", "to", "type", "float", "contiguous", "__get__"}
    | {"ravel", "broadcast_tensors", "meshgrid", "t", "t_", "transpose_"}
)
"""Functions that may change sizes: these are recorded here, or follow from the inputs."""


def require_sight(tracer: Tracer, what: str = "resized") -> None:
    """Raise UnplacedError in a function that may compute sizes from plain numbers, as C++ does."""
    if tracer.function not in SHAPED_IN_SIGHT:
        raise UnplacedError(f"{what} inside {tracer.function or 'compiled code'}")


_DIMENSIONS_ONLY = frozenset(
    {"embedding", "unsqueeze", "squeeze", "transpose", "permute", "softmax", "cat", "stack"}
    | {"sum", "mean", "cumsum", "unbind", "flatten", "dropout", "__len__"}
)
