"""Sums, norms and softmax, and how the masked twin computes them on the positions that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llm_pruner.tracing.atoms import empty_rows
from llm_pruner.tracing.ops import Alive, Call, Run, UnplacedError, rule
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Tracer

Dims = int | Sequence[int] | None
"""Axes that are reduced over; None or none for all."""


def _places(dim: Dims, dims: int) -> list[int]:
    """Return the axes that are reduced over, counted from the left."""
    if not dims or dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(dims))
    given = dim if isinstance(dim, Sequence) else [dim]
    return [int(one) % dims for one in given]


def _over_living(
    alive: Alive, run: Run, self: Tensor, dim: Dims = None
) -> tuple[Any, Tensor | None]:
    """Return a reduction over the living positions, and these (None if all live)."""
    source, last = self, None
    for place in _places(dim, self.dim()):
        living = alive(self, place)
        if living is not None:
            source, last = source.index_select(place, living), living
    return run(self=source), last


def reduce_living(alive: Alive, run: Run, self: Tensor, dim: Dims = None) -> Any:
    """Reduce over the living positions alone."""
    return _over_living(alive, run, self, dim)[0]


@rule("sum", "mean", "amax", "amin", "var", "std", "prod", "logsumexp", alive=reduce_living)
@rule("linalg_vector_norm", "norm", "var_mean", "std_mean", "any", "all", alive=reduce_living)
def reduce(tracer: Tracer, call: Call, self: Tensor, dim: Dims = None) -> None:
    """Drop the reduced axes, or keep them with one position."""
    axes = tracer.label(self)
    gone = _places(dim, len(axes))
    if axes and len(gone) == len(axes) and tracer.is_weight(self):
        reason = "one number is made of the whole weight (as a scale of its values)"
        for rows in tracer.weights[self]:
            tracer.freeze(rows, reason)
        raise UnplacedError(reason)
    for place in gone:
        tracer.require_whole(axes[place])
        if call.name not in ("any", "all"):
            tracer.note("read", axes[place])
    for result in call.results:
        if result.dim() == len(axes):
            kept: Axes = [empty_rows(1) if i in gone else rows for i, rows in enumerate(axes)]
        else:
            kept = [rows for i, rows in enumerate(axes) if i not in gone]
        tracer.set_label(result, kept)
    _stay_weights(tracer, self, call.results)


def _stay_weights(tracer: Tracer, self: Tensor, results: Sequence[Tensor]) -> None:
    """Mark what is reduced from a weight as a weight; remember the weight's axes."""
    for result in results if tracer.is_weight(self) else ():
        tracer.weights[result] = (*tracer.weights[self], *tracer.label(self))


def _extreme_living(alive: Alive, run: Run, self: Tensor, dim: Dims = None) -> Any:
    """Reduce over the living positions; returned positions count along the whole axis."""
    out, living = _over_living(alive, run, self, dim)
    if living is None or isinstance(out, Tensor):
        return out
    return type(out)((out[0], living[out[1]]))


def _place_living(alive: Alive, run: Run, self: Tensor, dim: Dims = None) -> Any:
    out, living = _over_living(alive, run, self, dim)
    return out if living is None else living[out]


@rule("max", "min", alive=_extreme_living)
@rule("argmax", "argmin", alive=_place_living)
def extreme(tracer: Tracer, call: Call, self: Tensor, dim: Dims = None) -> None:
    """The results are values, positions, or both."""
    reduce(tracer, call, self, dim)
    if self.dim() and (call.name.startswith("arg") or len(call.results) > 1):
        tracer.domains[call.results[-1]] = tracer.label(self)[_places(dim, self.dim())[0]]


def _along_living(alive: Alive, run: Run, self: Tensor, dim: int) -> Any:
    living = alive(self, dim) if self.dim() else None
    if living is None:
        return run()
    part = run(self=self.index_select(dim, living))
    return part.new_zeros(self.shape).index_copy(dim % self.dim(), living, part)


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax", alive=_along_living)
def along(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    """Softmax and the like: every axis stays."""
    axes = tracer.label(self)
    if axes:
        tracer.require_whole(axes[dim])
        tracer.note("normalised", axes[dim])
    tracer.set_label(call.out, axes)


@rule("cumsum", "cumprod", "cummax", "logcumsumexp")
def running(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    """A running sum depends on all before it; but counts of removed positions are zero."""
    axes = tracer.label(self)
    counted = self in tracer.counts and call.name == "cumsum"
    if not counted:
        tracer.freeze(axes[dim], "summed position after position")
    for result in call.results:
        tracer.set_label(result, axes)
        if counted:
            tracer.counts[result] = True


def _norm_living(
    alive: Alive,
    run: Run,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> Any:
    places = range(-len(normalized_shape), 0)
    living = {place: found for place in places if (found := alive(input, place)) is not None}
    if not living:
        return run()
    source, given = input, {"weight": weight, "bias": bias}
    cut = {name: one for name, one in given.items() if one is not None}
    for place, found in living.items():
        source = source.index_select(place, found)
        cut = {name: one.index_select(place, found) for name, one in cut.items()}
    whole, *rest = run(
        input=source, normalized_shape=[source.shape[place] for place in places], **cut
    )
    for place, found in living.items():
        shape = [*whole.shape]
        shape[place] = input.shape[place]
        whole = whole.new_zeros(shape).index_copy(input.dim() + place, found, whole)
    return (whole, *rest)


@rule("native_layer_norm", "_fused_rms_norm", alive=_norm_living)
def layer_norm(
    tracer: Tracer,
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """Weight and bias follow the last axes."""
    axes = tracer.label(input)
    count = len(normalized_shape)
    for rows in axes[-count:]:
        tracer.require_whole(rows)
    for given in (weight, bias):
        if given is not None:
            for place, rows in enumerate(tracer.label(given)):
                axes[place - count] = tracer.unify(axes[place - count], rows)
    whole, *statistics = call.results
    tracer.set_label(whole, axes)
    for statistic in statistics:
        tracer.set_label(statistic, axes[:-count] + [empty_rows(1)] * count)


@rule("_weight_norm_interface", makes_weights=True)
def weight_norm(tracer: Tracer, call: Call, v: Tensor, g: Tensor, dim: int) -> None:
    """v * g / |v|, the norm taken over all axes of v but one."""
    axes, scale = tracer.label(v), tracer.label(g)
    dim = dim % len(axes)
    for place, rows in enumerate(axes):
        if place != dim:
            tracer.require_whole(rows)
    axes[dim] = tracer.unify(axes[dim], scale[dim])
    tracer.set_label(call.out[0], axes)
    tracer.set_label(call.out[1], scale)


@rule("topk", alive=_extreme_living)
def topk(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    source = _by_value(tracer, call, self, dim)
    tracer.note("read", source)
    _stay_weights(tracer, self, call.results[:1])
    tracer.choose(self, dim % self.dim(), call.results[0].shape[dim])


@rule("sort", domain="tied")
@rule("argsort")
def sort(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    tracer.freeze(_by_value(tracer, call, self, dim), f"ordered by {call.name}")
    if call.name == "sort" and self in tracer.domains:
        # Positions in order are in order as well once some are deleted and the rest renumbered.
        tracer.domains[call.results[0]] = tracer.domains[self]


def _by_value(tracer: Tracer, call: Call, self: Tensor, dim: int) -> Any:
    """Label the values chosen along an axis, and their positions; return that axis."""
    axes = tracer.label(self)
    source = axes[dim]
    tracer.require_whole(source)
    for result in call.results:
        axes[dim] = tracer.frozen_rows(result.shape[dim], f"chosen by {call.name}")
        tracer.set_label(result, axes)
    # The last result holds positions.
    tracer.domains[call.results[-1]] = source
    return source
