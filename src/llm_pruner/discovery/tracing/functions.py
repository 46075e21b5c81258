"""Watches calls of torch functions, where the integers that size axes still know their origin.

Below this level PyTorch has turned them into plain numbers. Each known function states which axis
of its result an integer sized; an integer of known origin that reaches any other function was used
as a number, which is recorded as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    handle_torch_function,
)
from torch.utils._python_dispatch import _disable_current_modes

from llm_pruner.discovery.tracing.code import code_line
from llm_pruner.discovery.tracing.sizes import Expr, TracedInt, TracedShape, expr_of, plain
from llm_pruner.types import IntArray

Axes = list[IntArray]

COMPILED_CODE = "compiled code"
"""Name of the function under which code runs of which nothing is known."""


class Recorder(Protocol):
    """What the function mode tells the tracer; ``function`` is the one that runs."""

    function: str | None

    def axes(self, tensor: torch.Tensor) -> Axes | None: ...
    def length(self, tensor: torch.Tensor, dim: int) -> Any: ...
    def split(self, rows: IntArray, outer: int, inner: int) -> tuple[IntArray, IntArray]: ...
    def sized(self, expr: Expr, rows: IntArray, where: str) -> None: ...
    def tie_windows(self, rows: IntArray, step: int, where: str) -> None: ...
    def used_as_number(self, expr: Expr) -> None: ...
    def values_read(self, tensor: torch.Tensor, where: str) -> None: ...


_SHAPE: Callable[..., torch.Size] = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_NBYTES: Callable[..., int] = torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]


class SizeMode(TorchFunctionMode):
    """Records which integers size which axes, and gives tensor shapes a memory."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if name == "size":
            return self._size(args, kwargs)
        if name in ("numel", "nelement"):
            return math.prod(self._shape(args[0]))
        if name == "__len__":
            self._count(args[0])
        if name in _MEASURES:
            for size in self._shape(args[0]):
                self._number(size)
        if name in _READS:
            self.recorder.values_read(args[0], name)
        if name in _REWRITES:
            with self:
                rewritten = _REWRITES[name](*args, **kwargs)
            if rewritten is not None:
                return rewritten
        outer, self.recorder.function = self.recorder.function, name
        try:
            out = func(*_plain_values(args), **_plain_values(kwargs))
        finally:
            self.recorder.function = outer
        if name in _SIZED:
            _SIZED[name](self.recorder, args, kwargs, out)
        elif name not in _DIMENSIONS_ONLY:
            for value in _flatten([*args, *kwargs.values()]):
                self._number(value)
        return out

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Read an attribute of a tensor, which may be made by an operation (``.T``)."""
        if func == _SHAPE:
            return self._shape(args[0])
        if func == _NBYTES:
            for size in self._shape(args[0]):
                self._number(size)
        outer, self.recorder.function = self.recorder.function, "__get__"
        try:
            return func(*args)
        finally:
            self.recorder.function = outer

    def _number(self, value: Any) -> None:
        if type(value) is TracedInt:
            self.recorder.used_as_number(value.expr)

    def _shape(self, tensor: torch.Tensor) -> Sequence[Any]:
        shape = _SHAPE(tensor)
        if self.recorder.axes(tensor) is None:
            return shape
        sizes = [self.recorder.length(tensor, dim) for dim in range(len(shape))]
        return TracedShape(sizes) if any(type(size) is TracedInt for size in sizes) else shape

    def _count(self, tensor: torch.Tensor) -> None:
        """``len`` gives a plain number, whatever becomes of it: the axis keeps its size."""
        if tensor.dim():
            self._number(self._shape(tensor)[0])

    def _size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shape = self._shape(args[0])
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return shape if dim is None else shape[dim]


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
    """Return arguments with plain integers, as PyTorch's own code takes them."""
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


def _sizes_of(args: tuple[Any, ...], kwargs: dict[str, Any], key: str = "size") -> list[Any]:
    given: Any = args[1:] if len(args) > 1 else kwargs.get(key, kwargs.get("shape", ()))
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = given[0]
    return list(given)


def _record_sizes(recorder: Recorder, sizes: Sequence[Any], out: Any, where: str) -> None:
    axes = recorder.axes(out)
    if axes is None or len(sizes) != len(axes):
        return
    for size, rows in zip(sizes, axes, strict=True):
        if isinstance(size, int) and plain(size) >= 0:
            recorder.sized(expr_of(size), rows, where)


def _view(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    sizes = _sizes_of(args, kwargs)
    if all(isinstance(size, int) for size in sizes):
        _record_sizes(recorder, sizes, out, "view")


def _expand(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    _record_sizes(recorder, _sizes_of(args, kwargs), out, "expand")


def _fill(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    _create(recorder, args[:1], kwargs, out)
    _filled(recorder, args[1:], kwargs)


def _fill_like(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    _create_like(recorder, args[:2], kwargs, out)
    _filled(recorder, args[2:], kwargs)


def _filled(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value = args[0] if args else kwargs.get("fill_value")
    if type(value) is TracedInt:
        recorder.used_as_number(value.expr)


def _repeat(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, axes = recorder.axes(args[0]), recorder.axes(out)
    times = _sizes_of(args, kwargs, "repeats" if "repeats" in kwargs else "dims")
    if source is None or axes is None:
        return
    old = [1] * (len(axes) - len(source)) + [len(rows) for rows in source]
    times = [1] * (len(axes) - len(times)) + times
    for dim, (size, count, rows) in enumerate(zip(old, times, axes, strict=True)):
        if size == 1:
            recorder.sized(expr_of(count), rows, "repeat")
        elif plain(count) > 1:
            one = recorder.length(args[0], dim - len(axes) + len(source))
            recorder.sized(("*", expr_of(count), expr_of(one)), rows, "repeat")


def _as_other(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    other = args[1] if len(args) > 1 else kwargs["other"]
    axes = recorder.axes(out)
    if axes is None or recorder.axes(other) is None:
        return
    for dim, rows in enumerate(axes):
        if len(rows) != 1:
            recorder.sized(expr_of(recorder.length(other, dim)), rows, "expand_as")


def _create(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    given: Any = args or kwargs.get("size", ())
    if len(given) >= 1 and isinstance(given[0], list | tuple):
        given = given[0]
    _record_sizes(recorder, [s for s in given if isinstance(s, int)], out, "new tensor")


def _create_like(
    recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    sizes = _sizes_of(args, kwargs)
    if len(sizes) > 1 and isinstance(sizes[0], list | tuple):
        sizes = list(sizes[0])
    _record_sizes(recorder, [s for s in sizes if isinstance(s, int)], out, "new tensor")


def _arange(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = recorder.axes(out)
    bounds = [*args, *(kwargs[key] for key in ("start", "end", "step") if key in kwargs)]
    for bound in bounds:
        if type(bound) is TracedInt and axes is not None:
            if len(bounds) == 1:
                recorder.sized(bound.expr, axes[0], f"arange ({code_line()})")
            else:
                recorder.used_as_number(bound.expr)


def _split(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    sizes = (
        args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    )
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if recorder.axes(tensor) is None or sizes is None:
        return
    if isinstance(sizes, int):
        sizes = [sizes for _ in out]
    for size, piece in zip(sizes, out, strict=True):
        axes = recorder.axes(piece)
        # The last piece of an uneven split is shorter: its size follows from the others.
        if axes is not None and plain(size) == piece.size(dim):
            recorder.sized(expr_of(size), axes[dim], "split")


def _chunk(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    chunks = args[1] if len(args) > 1 else kwargs["chunks"]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if recorder.axes(tensor) is None or len(out) < 2:
        return
    whole = expr_of(recorder.length(tensor, dim))
    for piece in out:
        axes = recorder.axes(piece)
        if axes is not None:
            recorder.sized(("//", whole, expr_of(chunks)), axes[dim], "chunk")


def _narrow(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    names = ("input", "dim", "start", "length")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    axes, whole = recorder.axes(out), recorder.axes(given["input"])
    if axes is None or whole is None:
        return
    dim, start = given["dim"], given["start"]
    if isinstance(start, int):
        recorder.sized(expr_of(start), whole[dim][: plain(start)], "narrow")
    recorder.sized(expr_of(given["length"]), axes[dim], "narrow")


def _getitem(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    tensor, index = args[0], args[1]
    axes = recorder.axes(tensor)
    if axes is None:
        return
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is Ellipsis for item in items):
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        taken = sum(_takes(item) for item in items)
        items[place : place + 1] = [slice(None)] * (len(axes) - taken)
    dim = 0
    for item in items:
        if isinstance(item, slice):
            _record_slice(recorder, axes[dim], item)
        elif type(item) is TracedInt:
            recorder.used_as_number(item.expr)
        dim += _takes(item)


def _takes(item: Any) -> int:
    """Return how many axes of the indexed tensor an index item consumes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _record_slice(recorder: Recorder, rows: IntArray, item: slice) -> None:
    size = len(rows)
    if size == 1:
        return
    start, stop, step = item.start, item.stop, item.step
    for bound in (start, stop):
        place = plain(bound)
        if type(place) is not int:
            continue
        if type(bound) is TracedInt:
            if place < 0 and size + place >= 0:
                expr: Expr = ("-", ("const", 0), bound.expr)
                recorder.sized(expr, rows[size + place :], "slice")
            elif 0 <= place <= size:
                recorder.sized(bound.expr, rows[:place], "slice")
            else:
                recorder.used_as_number(bound.expr)
        elif place < 0:
            recorder.sized(("const", min(-place, size)), rows[max(size + place, 0) :], "slice")
        elif 0 < place < size:
            recorder.sized(("const", place), rows[:place], "slice")
    step, start = plain(step), plain(start)
    if isinstance(step, int) and step > 1:
        first = start or 0
        if first < 0:
            first += size
        recorder.tie_windows(rows[first - first % step :], step, "strided slice")


def _norm(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    axes = recorder.axes(out)
    if axes is not None:
        for size, rows in zip(shape, axes[-len(shape) :], strict=True):
            recorder.sized(expr_of(size), rows, "norm")


def _unflatten(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    axes = recorder.axes(out)
    if axes is None:
        return
    dim = dim % (len(axes) - len(sizes) + 1)
    for size, rows in zip(sizes, axes[dim : dim + len(sizes)], strict=True):
        if plain(size) >= 0:
            recorder.sized(expr_of(size), rows, "unflatten")


def _convolution(
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,  # noqa: ARG001
) -> None:
    """``groups`` is the number of groups in the first axis of the weight, transposed or not."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    axes = recorder.axes(weight)
    count = plain(groups)
    if axes is not None and count > 1:
        outer, _ = recorder.split(axes[0], count, len(axes[0]) // count)
        recorder.sized(expr_of(groups), outer, "groups of a convolution")
    others = [*args[2:6], *args[7:], *(kwargs[key] for key in kwargs if key != "groups")]
    for value in _flatten(others):
        if isinstance(value, TracedInt):
            recorder.used_as_number(value.expr)


def _pad(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Padding that repeats or reflects writes into slices: the code says how many positions."""
    source = args[0] if args else kwargs["input"]
    for before, after in zip(recorder.axes(source) or (), recorder.axes(out) or (), strict=False):
        if len(before) != len(after):
            for rows in (before, after):
                recorder.sized(("const", len(rows)), rows, "pad")
    for value in _flatten([*args[1:], *kwargs.values()]):
        if isinstance(value, TracedInt):
            recorder.used_as_number(value.expr)


def _router_losses(
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],  # noqa: ARG001
    out: Any,  # noqa: ARG001
) -> None:
    for logits in args[0]:
        axes = recorder.axes(logits)
        if axes is not None and isinstance(args[1], int):
            recorder.sized(expr_of(args[1]), axes[-1], "the load-balancing loss")


def _one_hot(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    axes = recorder.axes(out)
    if axes is not None and plain(classes) >= 0:
        recorder.sized(expr_of(classes), axes[-1], "one_hot")


def _topk(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    count = args[1] if len(args) > 1 else kwargs["k"]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    axes = recorder.axes(out[0])
    if axes is not None:
        recorder.sized(expr_of(count), axes[dim], "topk")


def _histc(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    names = ("input", "bins", "min", "max")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    axes = recorder.axes(out)
    if axes is None:
        return
    if isinstance(given.get("bins"), int):
        recorder.sized(expr_of(given["bins"]), axes[0], "histc")
    if isinstance(given.get("max"), int):
        recorder.sized(("+", expr_of(given["max"]), ("const", 1)), axes[0], "histc")
    if type(given.get("min")) is TracedInt:
        recorder.used_as_number(given["min"].expr)


def _bincount(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
    axes = recorder.axes(out)
    if axes is not None and plain(least) > 0:
        recorder.sized(expr_of(least), axes[0], "bincount")


def _eye(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    sizes = [*args[:2], *(kwargs[key] for key in ("n", "m") if key in kwargs)]
    _record_sizes(recorder, [sizes[0], sizes[-1]], out, "new tensor")


_SIZED: dict[str, Callable[[Recorder, tuple[Any, ...], dict[str, Any], Any], None]] = {
    "view": _view,
    "reshape": _view,
    "expand": _expand,
    "broadcast_to": _expand,
    "zeros": _create,
    "ones": _create,
    "empty": _create,
    "full": _fill,
    "rand": _create,
    "randn": _create,
    "new_zeros": _create_like,
    "new_ones": _create_like,
    "new_empty": _create_like,
    "new_full": _fill_like,
    "repeat": _repeat,
    "tile": _repeat,
    "expand_as": _as_other,
    "view_as": _as_other,
    "reshape_as": _as_other,
    "arange": _arange,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "narrow": _narrow,
    "__getitem__": _getitem,
    "__setitem__": _getitem,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "unflatten": _unflatten,
    "one_hot": _one_hot,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "pad": _pad,
    "eye": _eye,
    "load_balancing_loss_func": _router_losses,
    "topk": _topk,
    "histc": _histc,
    "bincount": _bincount,
}

_READS = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"})
"""Functions that hand values to Python without an operation that the tracer would see."""

_MEASURES = frozenset({"stride", "storage_offset", "untyped_storage", "dim_order"})
"""Functions that give plain numbers which follow from the sizes of a tensor."""

SHAPED_IN_SIGHT = frozenset(_SIZED) | frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "einsum", "tensordot", "bmm", "baddbmm"}
    | {"flatten", "unsqueeze", "squeeze", "select", "unbind", "normalize", "embedding"}
    | {"softmax", "outer", "mm", "addmm", "dropout", "zeros_like", "ones_like", "full_like"}
    | {"where", "masked_fill", "to", "type", "float", "contiguous", "__get__"}
)
"""Functions inside which sizes may change: they are recorded here, or follow the inputs."""

_DIMENSIONS_ONLY = frozenset(
    {"embedding", "unsqueeze", "squeeze", "transpose", "permute", "softmax", "cat", "stack"}
    | {"sum", "mean", "cumsum", "select", "unbind", "flatten", "dropout", "__len__"}
)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention written out, so that every axis and number in it is seen.

    Without ``scale`` the function divides by the square root of the head size; the division below
    reads that size from the shape, which records the use.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if enable_gqa and plain(query.shape[-3]) != plain(key.shape[-3]):
        groups = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_interleave(x, groups, dim=-3) for x in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        rows, columns = int(query.shape[-2]), int(key.shape[-2])
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    weights = torch.softmax(scores, dim=-1)
    # A row that may look nowhere gives zeros, as the fused kernels do.
    return torch.nan_to_num(weights) @ value


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,  # noqa: ARG001
    *,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention`` written out.

    What ``score_mod`` and the mask do with the number of a head freezes the heads, as numbers of
    positions are fixed.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_interleave(x, groups, dim=-3) for x in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    with torch._C.DisableTorchFunction():
        shape = tuple(scores.shape)
    places = [torch.arange(size, device=query.device) for size in shape]
    if score_mod is not None:
        scores = _by_position(score_mod, places, scores).to(scores.dtype)
    if block_mask is not None:
        mask = _by_position(block_mask.mask_mod, places)
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    out = (weights @ value).to(query.dtype)
    if return_aux is not None:
        return out, type("Aux", (), {"lse": scores.logsumexp(-1), "max_scores": scores.amax(-1)})()
    return (out, scores.logsumexp(-1)) if return_lse else out


def _by_position(
    function: Callable[..., torch.Tensor], places: list[torch.Tensor], *scores: torch.Tensor
) -> torch.Tensor:
    """Call a function of (scores,) batch, head, query and key of single positions on all at once.

    It is made for ``vmap``. Most such functions do the same by broadcasting, where axes can be
    followed; any other runs as code of which nothing is known.
    """
    columns = [
        place.view([-1 if i == dim else 1 for i in range(4)]) for dim, place in enumerate(places)
    ]

    def single(*given: torch.Tensor) -> torch.Tensor:
        mapped = function
        for dim in (3, 2, 1, 0):
            dims = [0 if dim == place else None for place in range(4)]
            mapped = torch.vmap(mapped, in_dims=(*[0] * len(scores), *dims))
        return mapped(*given)

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        expected = single(*scores, *places)
    try:
        found = function(*scores, *columns)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            same = torch.equal(found.expand(expected.shape), expected)
    except (RuntimeError, IndexError, TypeError):
        same = False
    if same:
        return found
    single.__name__ = COMPILED_CODE
    return handle_torch_function(single, (), *scores, *places)


def is_watched() -> bool:
    """Whether a trace is going on."""
    return any(isinstance(mode, SizeMode) for mode in _get_current_function_mode_stack())


def _repeat_interleave(
    tensor: torch.Tensor, repeats: int | torch.Tensor, dim: int | None = None, **_: Any
) -> Any:
    """``repeat_interleave`` by a number, as ``expand`` and ``flatten``; None if not applicable."""
    if isinstance(repeats, torch.Tensor) or dim is None:
        return None
    dim = dim % tensor.dim()
    sizes = [-1] * (tensor.dim() + 1)
    sizes[dim + 1] = repeats
    return tensor.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


_REWRITES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "repeat_interleave": _repeat_interleave,
}
