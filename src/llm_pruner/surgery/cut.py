"""From a removal to a smaller model: slices every tensor, and sets every size that code reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from llm_pruner.discovery.run import changed_since, named_tensors
from llm_pruner.errors import InfeasibleError
from llm_pruner.models.layers import (
    Renaming,
    apply_layers,
    kept_layers,
    layer_numbers,
    set_attributes_,
    sharing_copy,
)
from llm_pruner.models.streaming import cut_parameter, is_model_streamed, is_streamed
from llm_pruner.surgery.removal import (
    checked_removal,
    kept_shapes,
    removed_modules,
    removed_positions,
    unit_problems,
)
from llm_pruner.tracing.provenance import WEIGHTS, descriptions, spaces_of
from llm_pruner.types import Discovery, Edits, IntArray, Removal

Places: TypeAlias = list[tuple[nn.Module, str]]
"""Modules, and the attributes of theirs that hold a tensor."""

Taken: TypeAlias = tuple[int, IntArray, torch.Tensor]
"""(axis, positions, values) that a cut takes from a tensor."""

_NUMBER_OF_EXPERTS = re.compile("(num_|n_)(local_|routed_)?experts")


def plan_edits(model: nn.Module, discovery: Discovery, removal: Removal) -> Edits:
    """Work out everything that a removal changes, without touching the model."""
    for name, units in checked_removal(discovery, removal).items():
        if problems := unit_problems(discovery.group(name), units):
            raise InfeasibleError(f"{name}: {'; '.join(problems)}")
    if changed := changed_since(model, discovery):
        raise InfeasibleError(f"{changed}: run discover again on the model as it is now")
    _require_buffers(model, discovery, removal)
    graph = discovery.graph
    layers = kept_layers(model, removed_modules(discovery, removal))
    rename = Renaming(layers)
    # A removed layer's own sizes need no solution: nothing reads them any more.
    standing = graph.system.reading_only(lambda module: rename(module) is not None)
    try:
        attributes = graph.system.attributes(graph.deleted(removal), standing)
    except InfeasibleError as error:
        names = ", ".join(name for name, units in removal.items() if len(units))
        raise InfeasibleError(f"removing units of {names}: {error}") from error
    _require_choices(discovery, removal)
    shapes = {
        new: shape
        for name, shape in kept_shapes(discovery, removal).items()
        if shape != discovery.shapes[name] and (new := rename(name)) is not None
    }
    buffers: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for (name, dim), positions in removed_positions(discovery, removal).items():
        if name in discovery.buffers and (new := rename(name)) is not None:
            kept = _others(discovery.buffers[name][dim], positions)
            buffers[new][dim] = tuple(kept.tolist())
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for (module, attribute), value in sorted(attributes.items()):
        if (new := rename(module)) is not None:
            values[new][attribute] = value
    for module, attribute, value in layer_numbers(model, layers, graph.own_numbers):
        values[module][attribute] = value
    numbers = _expert_numbers(model, discovery, removal, rename)
    described = _descriptions(model, shapes, rename, values, discovery.aliases)
    for module, attribute, value in [*described, *numbers]:
        values[module].setdefault(attribute, value)
    return Edits(
        shapes=shapes,
        buffers={name: dict(dims) for name, dims in sorted(buffers.items())},
        attributes={name: dict(found) for name, found in sorted(values.items()) if found},
        layers=layers,
    )


def _require_choices(discovery: Discovery, removal: Removal) -> None:
    trace = discovery.graph.trace
    deleted = discovery.graph.deleted(removal)
    for choice in trace.choices:
        left = int((~deleted[trace.atoms.resolve(choice.rows)].any(axis=1)).sum())
        # What is masked is masked in the same share of what is left.
        if left * choice.available < choice.count * len(choice.rows):
            raise InfeasibleError(
                f"removing units of {', '.join(name for name in removal if len(removal[name]))}: "
                f"{choice.count} are chosen for every token, of {left} that are left; keep more"
            )


def _require_buffers(model: nn.Module, discovery: Discovery, removal: Removal) -> None:
    buffers = {name: tensor for name, tensor, buffer in named_tensors(model) if buffer}
    for name, dim in removed_positions(discovery, removal):
        traced, tensor = discovery.buffers.get(name), buffers.get(name)
        if traced is None:
            continue
        if tensor is None or tensor.dim() != len(traced) or tensor.shape[dim] != traced[dim]:
            raise InfeasibleError(
                f"{name} has another shape now: run discover again on the model as it is now"
            )


def cut_(
    model: nn.Module, discovery: Discovery, removal: Removal, undo: Undo | None = None
) -> Edits:
    """Remove units as ``verify.prune_`` does, which is the public one, but compare nothing."""
    edits = plan_edits(model, discovery, removal)
    for name, dims in _cuts(discovery, removal).items():
        places = _places(model, discovery, name)
        old = getattr(*places[0])
        if is_streamed(old):
            kept = {dim: _others(old.shape[dim], gone) for dim, gone in dims.items()}
            new: torch.Tensor = cut_parameter(old, kept)
        else:
            data, taken = old.detach(), []
            for dim, positions in dims.items():
                if undo is not None:
                    taken.append((dim, positions, _take(data, dim, positions)))
                data = _take(data, dim, _others(data.shape[dim], positions))
            new = data.contiguous()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                if undo is not None:
                    undo.keep(places, taken)
        vars(new).update(vars(old))  # such as that it is not to decay
        for owner, key in places:
            setattr(owner, key, new)
    apply_layers(model, edits.layers)
    set_attributes_(model, edits)
    return edits


def cut_copy(model: nn.Module, discovery: Discovery, removal: Removal) -> nn.Module:
    """Return a pruned copy that shares all tensors that lose nothing; the model stays as it is."""
    copy = sharing_copy(model)
    cut_(copy, discovery, removal)
    return copy


def _cuts(discovery: Discovery, removal: Removal) -> dict[str, dict[int, IntArray]]:
    gone = tuple(f"{module}." for module in removed_modules(discovery, removal))
    deleted: dict[str, dict[int, IntArray]] = defaultdict(dict)
    for (name, dim), positions in removed_positions(discovery, removal).items():
        if not name.startswith(gone):
            deleted[name][dim] = positions
    return deleted


def _places(model: nn.Module, discovery: Discovery, name: str) -> Places:
    names = [name, *(alias for alias, first in discovery.aliases.items() if first == name)]
    paths = [one.rpartition(".") for one in names]
    return [(model.get_submodule(path), key) for path, _, key in paths]


def _expert_numbers(
    model: nn.Module, discovery: Discovery, removal: Removal, rename: Renaming
) -> Iterator[tuple[str, str, int]]:
    """Yield the numbers of experts that modules state of themselves, even if the trace reads none.

    Other implementations of experts read them, and losses read that of the whole model, which
    follows where all mixtures keep equally many; one that is no group keeps all of its own.
    """
    kept = kept_shapes(discovery, removal)
    sizes_of = [
        (name.rpartition(".")[0], (discovery.shapes[name][dim], kept[name][dim]))
        for group in discovery.groups
        if group.kind == "experts"
        for name, dim in ((one.tensor, one.dim) for one in group.members if not one.buffer)
        if name in kept
    ]
    changed, mixtures = dict(sizes_of), {sizes for _, sizes in sizes_of}
    said = [
        (path, attribute, value)
        for path, module in model.named_modules()
        for attribute, value in vars(module).items()
        if _NUMBER_OF_EXPERTS.fullmatch(attribute)
    ]
    for path, _, value in said:
        own = model.get_submodule(path)._parameters if path not in changed else ()
        if any(kept.get(f"{path}.{key}", ())[:1] == (value,) for key in own):
            mixtures.add((value, value))
    whole = next(iter(mixtures)) if len(mixtures) == 1 else None
    for path, attribute, value in said:
        sizes, new_path = changed.get(path, whole), rename(path)
        if sizes is not None and value == sizes[0] != sizes[1] and new_path is not None:
            yield new_path, attribute, sizes[1]


def _descriptions(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    rename: Renaming,
    values: Mapping[str, Mapping[str, Any]],
    aliases: Mapping[str, str],
) -> Iterator[tuple[str, str, int]]:
    for path, module in model.named_modules():
        names = [f"{path}.{weight}" for weight in WEIGHTS]
        found = [rename(aliases.get(name, name)) for name in names]
        shape = next((shapes[name] for name in found if name and name in shapes), None)
        new_path = rename(path)
        if new_path is None or shape is None:
            continue
        stated: list[tuple[str, int]] = []
        if isinstance(module, _ConvNd):
            groups = values.get(new_path, {}).get("groups", module.groups)
            inputs, outputs = (shape[0], shape[1] * groups)[:: 1 if module.transposed else -1]
            stated += [("in_channels", inputs), ("out_channels", outputs)]
        stated += [(attribute, shape[dim]) for attribute, dim in descriptions(module)]
        for attribute, size in stated:
            if getattr(module, attribute, size) != size:
                yield new_path, attribute, size


_BY_PARTS = 2_000_000_000
"""Parameters from which on a dense model is put together again rather than kept."""


class Undo:
    """Puts a model back as it was before a cut.

    Of large models only what the cut takes away is kept, and their tensors are put together again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {id(space): (space, dict(space)) for space in spaces_of(model)}
        large = sum(parameter.numel() for parameter in model.parameters()) > _BY_PARTS
        # What was there of a streamed model is in its files.
        self._by_parts = large and not is_model_streamed(model)
        self._parts: list[tuple[Places, list[Taken]]] = []

    def keep(self, places: Places, taken: list[Taken]) -> None:
        """Keep what a cut takes from a parameter, of a large model in place of the parameter."""
        if self._by_parts:
            self._parts.append((places, taken))
            for owner, key in places:
                self._held[id(owner._parameters)][1][key] = None

    def __call__(self) -> None:
        kept = [getattr(*places[0]) for places, _ in self._parts]
        for space, before in self._held.values():
            space.clear()
            space.update(before)
        for (places, taken), left in zip(self._parts, kept, strict=True):
            data = left.detach()
            for dim, positions, part in reversed(taken):
                size = data.shape[dim] + len(positions)
                whole = data.new_empty((*data.shape[:dim], size, *data.shape[dim + 1 :]))
                for index, values in ((_others(size, positions), data), (positions, part)):
                    whole.index_copy_(dim, torch.from_numpy(index).to(data.device), values)
                data = whole
            new = nn.Parameter(data, requires_grad=left.requires_grad)
            vars(new).update(vars(left))
            for owner, key in places:
                setattr(owner, key, new)


def _others(size: int, positions: IntArray) -> IntArray:
    return np.delete(np.arange(size), positions)


def _take(tensor: torch.Tensor, dim: int, positions: IntArray) -> torch.Tensor:
    return tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
