"""From a removal to a smaller model: slices every tensor, and sets every size that code reads."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.conv import _ConvNd

from llm_pruner.errors import InfeasibleError
from llm_pruner.removal import kept_shapes, removed_modules, removed_positions
from llm_pruner.tracing.run import named_tensors
from llm_pruner.tracing.sizes import leaves
from llm_pruner.types import Discovery, Edits, IntArray, Removal

# Sizes that standard modules keep only to describe themselves: (weight axis -> attribute).
_DESCRIPTIVE: dict[str, tuple[tuple[str, int], ...]] = {
    "Linear": (("in_features", 1), ("out_features", 0)),
    "Conv1D": (("nx", 0), ("nf", 1)),
    "Embedding": (("num_embeddings", 0), ("embedding_dim", 1)),
}

_WEIGHTS = ("weight", "parametrizations.weight.original1", "weight_v")
"""Names of a module's weight, as it is or as the direction that a weight norm keeps."""

_NUMBER_OF_EXPERTS = re.compile("(num_|n_)(local_|routed_)?experts")
_NUMBER_NAME = re.compile("idx|index|layer")


def plan_edits(model: nn.Module, discovery: Discovery, removal: Removal) -> Edits:
    """Work out everything that a removal changes, without touching the model.

    Raises:
        InfeasibleError: the model's code cannot express the sizes, a group is frozen or has no such
            units, or the model is not the one that was traced; names the groups.
    """
    _require_units(discovery, removal)
    _require_shapes(model, discovery)
    _require_buffers(model, discovery, removal)
    graph = discovery.graph
    gone = removed_modules(discovery, removal)
    rename = _Renaming(graph.layer_lists, gone)
    # A removed layer's own sizes need no solution: nothing reads them any more.
    standing = {
        number
        for number, (expr, _, _) in enumerate(graph.system.equations)
        if not any(leaf[0] == "attr" and rename.is_gone(f"{leaf[1]}.") for leaf in leaves(expr))
    }
    try:
        attributes = graph.system.attributes(graph.deleted(removal), standing)
    except InfeasibleError as error:
        names = ", ".join(name for name, units in removal.items() if len(units))
        raise InfeasibleError(f"removing units of {names}: {error}") from error
    _require_choices(discovery, removal)
    shapes = {
        rename(name): shape
        for name, shape in kept_shapes(discovery, removal).items()
        if shape != discovery.shapes[name]
    }
    buffers: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for (name, dim), positions in removed_positions(discovery, removal).items():
        if name in discovery.buffers and not rename.is_gone(name):
            kept = np.delete(np.arange(discovery.buffers[name][dim]), positions)
            buffers[rename(name)][dim] = tuple(kept.tolist())
    values: dict[str, dict[str, int]] = defaultdict(dict)
    for (module, attribute), value in sorted(attributes.items()):
        if not rename.is_gone(f"{module}."):
            values[rename(f"{module}.")[:-1]][attribute] = value
    for module, attribute, value in _layer_numbers(model, graph.layer_lists, gone):
        if not rename.is_gone(f"{module}."):
            values[rename(f"{module}.")[:-1]][attribute] = value
    numbers = _expert_numbers(model, discovery, removal, rename)
    described = _descriptions(model, shapes, rename, values)
    for module, attribute, value in [*described, *numbers]:
        values[module].setdefault(attribute, value)
    return Edits(
        shapes=shapes,
        buffers={name: dict(dims) for name, dims in sorted(buffers.items())},
        attributes={name: dict(found) for name, found in sorted(values.items()) if found},
        layers=rename.kept,
    )


def _require_units(discovery: Discovery, removal: Removal) -> None:
    for name, units in removal.items():
        if not len(units):
            continue
        group = discovery.group(name)
        if group.frozen is not None:
            raise InfeasibleError(f"{name} cannot lose units: {group.frozen}")
        if len(np.unique(units)) != len(units) or min(units) < 0 or max(units) >= group.size:
            raise InfeasibleError(
                f"{name} has units 0 to {group.size - 1}, each of which can go once; "
                f"given were {np.asarray(units).tolist()}"
            )
        kept = group.size - len(units)
        if kept == 0:
            raise InfeasibleError(f"{name} would lose all of its {group.size} units; keep one")
        if kept < group.least:
            raise InfeasibleError(
                f"{name} would keep {kept} of {group.size} units; each token is given "
                f"{group.least} of them, so keep at least as many"
            )
        if kept % group.multiple:
            raise InfeasibleError(
                f"{name} would keep {kept} of {group.size} units; an operation that reads them "
                f"needs a multiple of {group.multiple}"
            )


def _require_choices(discovery: Discovery, removal: Removal) -> None:
    """Raise InfeasibleError if fewer positions of an axis are left than the code chooses."""
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


def _require_shapes(model: nn.Module, discovery: Discovery) -> None:
    for name, parameter in model.named_parameters():
        if discovery.shapes.get(name) != tuple(parameter.shape):
            raise InfeasibleError(
                f"{name} has shape {tuple(parameter.shape)}, the traced model "
                f"{discovery.shapes.get(name)}: trace the model that is to be pruned"
            )


def _require_buffers(model: nn.Module, discovery: Discovery, removal: Removal) -> None:
    """Refuse where a buffer that loses positions is not what it was; it may grow along others."""
    buffers = {name: tensor for name, tensor, buffer in named_tensors(model) if buffer}
    for name, dim in removed_positions(discovery, removal):
        traced, tensor = discovery.buffers.get(name), buffers.get(name)
        if traced is None:
            continue
        if tensor is None or tensor.dim() != len(traced) or tensor.shape[dim] != traced[dim]:
            found = None if tensor is None else tuple(tensor.shape)
            raise InfeasibleError(
                f"{name} has shape {found}, when the model was traced {traced}: run discover again "
                "on the model as it is now"
            )


def prune_(model: nn.Module, discovery: Discovery, removal: Removal) -> Edits:
    """Remove units from a model in place and return what was changed.

    Tied weights stay tied, ``requires_grad`` stays as it was, and removed layers are gone with all
    they hold. The new tensors hold exactly the values of the positions that were kept.

    Raises:
        InfeasibleError: before anything is touched.
    """
    edits = plan_edits(model, discovery, removal)
    _slice_tensors(model, discovery, removal)
    apply_layers(model, edits.layers)
    for module, values in edits.attributes.items():
        for attribute, value in values.items():
            set_attribute(model.get_submodule(module), attribute, value)
    return edits


def apply_layers(model: nn.Module, layers: Mapping[str, Sequence[int]]) -> None:
    """Keep only the given children of module lists, and state the new number in the settings.

    A list-valued setting with one entry per layer keeps the entries of the layers that stay; lists
    of token ids may have that length by chance and are left alone.
    """
    for path, kept in layers.items():
        children = model.get_submodule(path)
        if not isinstance(children, nn.ModuleList):
            raise TypeError(f"{path} is no module list")
        count = len(children)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList([children[i] for i in kept]))
        for config in _configs(model):
            _filter_config(config, count, kept)


def set_attribute(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer that a module's code reads.

    ``name.3`` is an item of a tuple or list; ``config.num_heads`` is set on the module's own copy
    of its configuration, since modules share one.
    """
    key, _, inner = attribute.partition(".")
    if not inner:
        setattr(module, key, value)
        return
    holder = getattr(module, key)
    if isinstance(holder, tuple | list):
        items = list(holder)
        items[int(inner)] = value
        setattr(module, key, type(holder)(items))
        return
    own = copy.copy(holder)
    vars(own)[inner] = value
    vars(module)[key] = own


def _slice_tensors(model: nn.Module, discovery: Discovery, removal: Removal) -> None:
    gone = tuple(f"{module}." for module in removed_modules(discovery, removal))
    deleted: dict[str, dict[int, IntArray]] = defaultdict(dict)
    for (name, dim), positions in removed_positions(discovery, removal).items():
        if not (gone and name.startswith(gone)):
            deleted[name][dim] = positions
    names: dict[str, list[str]] = defaultdict(list)
    for alias, first in discovery.aliases.items():
        names[first].append(alias)
    for name, dims in deleted.items():
        owner, key = _owner(model, name)
        old = getattr(owner, key)
        data = old.detach()
        for dim, positions in dims.items():
            kept = np.delete(np.arange(data.shape[dim]), positions)
            data = data.index_select(dim, torch.from_numpy(kept).to(data.device))
        new: torch.Tensor = data.contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for one in (name, *names[name]):
            target, place = _owner(model, one)
            setattr(target, place, new)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


class _Renaming:
    """Names of tensors and modules after layers were removed and the rest renumbered."""

    def __init__(self, lists: Mapping[str, int], gone: tuple[str, ...]) -> None:
        self._gone = tuple(f"{module}." for module in gone)
        self.kept: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, dict[int, int]] = {}
        for path, count in lists.items():
            kept = tuple(i for i in range(count) if f"{path}.{i}" not in gone)
            if len(kept) < count:
                self.kept[path] = kept
                self._places[path] = {old: new for new, old in enumerate(kept)}

    def is_gone(self, name: str) -> bool:
        return bool(self._gone) and name.startswith(self._gone)

    def __call__(self, name: str) -> str:
        for path, places in self._places.items():
            match = re.match(re.escape(path) + r"\.(\d+)(\.|$)", name)
            if match:
                return f"{path}.{places[int(match.group(1))]}{name[match.end(1) :]}"
        return name


def _layer_numbers(
    model: nn.Module, lists: Mapping[str, int], gone: tuple[str, ...]
) -> Iterator[tuple[str, str, int]]:
    """Yield (module, attribute, new value) for attributes that hold the number of their layer."""
    for path, count in lists.items():
        kept = [i for i in range(count) if f"{path}.{i}" not in gone]
        if len(kept) == count:
            continue
        present: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        for i in range(count):
            for inner, module in model.get_submodule(f"{path}.{i}").named_modules():
                for key, value in vars(module).items():
                    if type(value) is int:
                        present[inner, key][i] = value
        for (inner, key), values in present.items():
            step = _step(key, values, count)
            if step is None:
                continue
            for new, old in enumerate(kept):
                if old in values and new != old:
                    module = f"{path}.{old}.{inner}" if inner else f"{path}.{old}"
                    yield module, key, values[old] - step * (old - new)


def _step(key: str, values: Mapping[int, int], count: int) -> int | None:
    """Return by how much an attribute grows from layer to layer, if it numbers them."""
    if all(value == i for i, value in values.items()):
        # An attribute that only one layer has may equal the layer's number by chance.
        return 1 if len(values) > 1 or _NUMBER_NAME.search(key) else None
    if len(values) != count or not _NUMBER_NAME.search(key):
        return None
    # Layers of two attentions each number the attentions.
    step = values[1] - values[0]
    even = all(value == values[0] + step * i for i, value in values.items())
    return step if 0 <= values[0] < step and even else None


def _expert_numbers(
    model: nn.Module, discovery: Discovery, removal: Removal, rename: _Renaming
) -> Iterator[tuple[str, str, int]]:
    """Yield the numbers of experts that modules state of themselves, whoever reads them.

    One implementation of experts reads a number that another does not, and losses read that of the
    whole model; it follows where all mixtures keep equally many.
    """
    kept = kept_shapes(discovery, removal)
    changed: dict[str, tuple[int, int]] = {}
    mixtures: set[tuple[int, int]] = set()
    for group in discovery.groups:
        if group.kind != "experts":
            continue
        for member in group.members:
            if not member.buffer and member.tensor in kept:
                old = discovery.shapes[member.tensor][member.dim]
                new = kept[member.tensor][member.dim]
                changed[member.tensor.rpartition(".")[0]] = (old, new)
                mixtures.add((old, new))
    whole = next(iter(mixtures)) if len(mixtures) == 1 else None
    for path, module in model.named_modules():
        sizes = changed.get(path, whole)
        if sizes is None or sizes[0] == sizes[1] or rename.is_gone(f"{path}."):
            continue
        for attribute, value in vars(module).items():
            if _NUMBER_OF_EXPERTS.fullmatch(attribute) and value == sizes[0]:
                yield rename(path), attribute, sizes[1]


def _descriptions(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    rename: _Renaming,
    values: Mapping[str, Mapping[str, int]],
) -> Iterator[tuple[str, str, int]]:
    """Yield the sizes that standard modules state of themselves (``in_features`` and the like).

    Args:
        values: what is known already of attributes that follow, by the new name of the module.
    """
    for path, module in model.named_modules():
        if rename.is_gone(f"{path}."):
            continue
        new_path = rename(path)
        shape = next(
            (shapes[f"{new_path}.{w}"] for w in _WEIGHTS if f"{new_path}.{w}" in shapes), None
        )
        if shape is None:
            continue
        if isinstance(module, _ConvNd):
            groups = values.get(new_path, {}).get("groups", module.groups)
            channels = (shape[0], shape[1] * groups)
            names = ("in_channels", "out_channels")
            for attribute, size in zip(
                names, channels[:: 1 if module.transposed else -1], strict=True
            ):
                if getattr(module, attribute) != size:
                    yield new_path, attribute, size
        for kind, pairs in _DESCRIPTIVE.items():
            if any(cls.__name__ == kind for cls in type(module).__mro__):
                for attribute, dim in pairs:
                    if getattr(module, attribute, shape[dim]) != shape[dim]:
                        yield new_path, attribute, shape[dim]


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            found[id(config)] = config
            inner = getattr(config, "text_config", None)
            if inner is not None:
                found[id(inner)] = inner
    return list(found.values())


def _filter_config(config: Any, count: int, kept: Sequence[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != count:
        return
    try:
        config.num_hidden_layers = len(kept)
    except NotImplementedError:
        # Models with an encoder as well count their layers apart.
        for key, value in list(vars(config).items()):
            if key.endswith("decoder_layers") and value == count:
                setattr(config, key, len(kept))
    for key, value in list(vars(config).items()):
        if "token" in key:
            continue
        if isinstance(value, list | tuple) and len(value) == count:
            # Numbers of all layers are no entries of layers.
            numbers = count > 2 and sorted(value, key=str) == sorted(range(count), key=str)
            left = range(len(kept)) if numbers else (value[i] for i in kept)
            # Of such a length by chance, if the config refuses a shorter one.
            with suppress(StrictDataclassError):
                setattr(config, key, type(value)(left))
