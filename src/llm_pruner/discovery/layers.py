"""Which layers can be removed whole: those that map the hidden state onto itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from llm_pruner.discovery.run import Run, run_trace
from llm_pruner.errors import DiscoveryError
from llm_pruner.models.layers import is_layer_list, numbering, without_layers
from llm_pruner.tracing.calls import different
from llm_pruner.tracing.sizes import COMPARISONS, PLACE, Expr, leaves
from llm_pruner.tracing.trace import Trace
from llm_pruner.types import Group


def outer_lists(model: nn.Module) -> list[str]:
    """Return the names of the lists of layers that are in no other and share no layer with one."""
    lists: dict[str, Any] = {
        name: module for name, module in model.named_modules() if is_layer_list(module)
    }
    kept: set[int] = set()
    found = []
    # If a module list and a sequence share modules, take the module list.
    for name, module in sorted(lists.items(), key=lambda one: type(one[1]) is nn.Sequential):
        inside = any(name.startswith(f"{other}.") for other in lists)
        if not inside and kept.isdisjoint(own := {*map(id, module)}):
            kept |= own
            found.append(name)
    return found


def layer_groups(model: nn.Module, run: Run) -> tuple[list[Group], frozenset[tuple[str, str, str]]]:
    """Return the groups of layers, and ``Graph.own_numbers``."""
    own: set[tuple[str, str, str]] = set()
    trace, calls, by_place = run.trace, run.layers.axes, run.layers.by_place()
    groups: list[Group] = []
    outer = outer_lists(model)
    by_list: dict[str, list[str]] = defaultdict(list)
    for child in calls:
        parent = child.rsplit(".", 1)[0]
        if parent in outer:
            by_list[parent].append(child)
    for parent in sorted(by_list, key=lambda name: -len(by_list[name])):
        children = sorted(by_list[parent], key=lambda name: int(name.rsplit(".", 1)[1]))
        passes = all(_passes_through(trace, calls[child]) for child in children)
        if len(children) < 2 or not passes:
            continue
        reason = _why_fixed(model, trace)
        if not all(_passes_through(trace, calls[child], whole=True) for child in children):
            reason = "each layer numbers the streams of the hidden state anew"
        if _opens(model, children):
            children = children[1:]
        children = [child for child in children if not _lends(model, child)]
        if not children:
            continue
        numbers, clash = _own_numbers(model, trace, parent)
        own |= numbers
        reason = reason or clash or _held_elsewhere(model, parent)
        skips = len(by_list[parent]) < len(model.get_submodule(parent)._modules)
        if reason is None and (skips or parent in by_place):
            reason = _depends_on_place(model, run, parent, children)
            rest = children[1:]
            # Others may depend on the first, such as on its length in the cache.
            if reason and len(rest) > 1 and not _depends_on_place(model, run, parent, rest):
                reason, children = None, rest
        if len(children) < 2:
            reason = "the model needs all layers but one"
        name = "layers" if not groups else f"layers_{len(groups) + 1}"
        size, modules = len(children), tuple(children)
        group = Group(name, "layers", None, size, (), frozen=reason, modules=modules, path=parent)
        groups.append(group)
    return groups, frozenset(own)


def _own_numbers(
    model: nn.Module, trace: Trace, parent: str
) -> tuple[set[tuple[str, str, str]], str | None]:
    """Return the numbers of layers that code calculates with, and why layers must stay, or None.

    A number that finds the layer's cache must change when layers before it go; one that is
    calculated with must not. A number used in both ways keeps all layers.
    """
    looked_up: set[Expr] = set()
    calculated: dict[Expr, str] = {}
    for expr, where in trace.numbers.items():
        # A cache compares the number of a layer with how many it holds.
        if expr[0] == PLACE or (expr[0] in COMPARISONS and where.startswith("cache")):
            looked_up |= {*leaves(expr)}
        else:
            calculated |= dict.fromkeys(leaves(expr), where)
    own: set[tuple[str, str, str]] = set()
    children: Any = model.get_submodule(parent)
    for inner, key in numbering(model, parent, len(children)):
        suffix = f".{inner}" if inner else ""
        held = [("attr", f"{parent}.{i}{suffix}", key) for i in range(len(children))]
        lines = [calculated[leaf] for leaf in held if leaf in calculated]
        if not lines:
            continue
        if any(leaf in looked_up for leaf in held):
            reason = f"layers are told apart by {key} ({lines[0]}), which must follow their places"
            return own, reason
        own.add((parent, inner, key))
    return own, None


def _depends_on_place(
    model: nn.Module, run: Run, parent: str, children: Sequence[str]
) -> str | None:
    """Return which input of a layer depends on its place in the list, or None.

    Removes some layers; the others must then get the same inputs as before.
    """
    numbers = [int(child.rpartition(".")[2]) for child in children]
    dense = run.layers.given[parent]
    for gone in (numbers[: (len(numbers) + 1) // 2], [numbers[(len(numbers) - 1) // 2]]):
        kept = [number for number in dense if number not in gone]
        if not kept:
            continue
        try:
            again = run_trace(without_layers(model, parent, gone), run.scenes).layers
        except DiscoveryError as error:
            return f"the model does not run without some of them ({error.__cause__ or error})"
        for number in kept:
            now = again.given[parent][number - sum(other < number for other in gone)]
            where = run.layers.where[parent]
            if not now and len(kept) > 1:  # nothing is recorded for a single layer
                return f"whether a layer runs depends on its place in the list ({where})"
            for name in different(dense[number], now):
                return f"{name} of a layer depends on its place in the list ({where})"
    return None


def _why_fixed(model: nn.Module, trace: Trace) -> str | None:
    """Return why the number of layers cannot change, or None."""
    held = [rows.ravel() for axes in trace.tensors.values() for rows in axes]
    atoms = trace.atoms.find(np.concatenate([np.zeros(0, np.int64), *held]))
    for equation in trace.equations:
        # A state that each run makes anew has as many entries as there are layers then.
        rows = trace.atoms.find(equation.rows)
        if equation.where == "new tensor" and not np.isin(rows, atoms[atoms > 0]).any():
            continue
        for leaf in leaves(equation.expr):
            name = str(leaf[2]) if leaf[0] == "attr" else ""
            if name.endswith(("num_hidden_layers", "n_layer", "n_layers", "num_layers")):
                return f"{name} sizes an axis as well ({equation.where})"
    config = getattr(model, "config", None)
    for settings in filter(None, (config, getattr(config, "text_config", None))):
        for name in ("layer_types", "layers_block_type"):
            kinds = getattr(settings, name, None)
            keys = {name, *(getattr(settings, "attribute_map", None) or {}).values()}
            # A property without a stored value follows from the number of each layer.
            values = getattr(settings, "__dict__", {})
            stored = any(value == kinds for key, value in values.items() if key in keys)
            if isinstance(kinds, list | tuple) and len(set(kinds)) > 1 and not stored:
                return f"the kind of each layer follows from its number ({name})"
    return None


def _opens(model: nn.Module, children: list[str]) -> bool:
    """Whether the first layer has a part that no other has, as a norm of the embeddings."""
    parts = [{name for name, _ in model.get_submodule(c).named_children()} for c in children]
    return parts[0] > set().union(*parts[1:])


def _lends(model: nn.Module, child: str) -> bool:
    """Whether a layer's weights are used outside of it under another name."""
    layer = model.get_submodule(child)
    own = {id(weight) for weight in layer.parameters()}
    places = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in places if module is layer)
    first: dict[int, bool] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in own:
            named = first.setdefault(id(weight), name.startswith(inside))
            if named and not name.startswith(inside):
                return True
    return False


def _held_elsewhere(model: nn.Module, parent: str) -> str | None:
    """Return what holds layers of a list as well, which keeps them, or None."""
    layers: Any = model.get_submodule(parent)
    own = {id(layer) for layer in layers}
    for name, module in model.named_modules():
        if module is not layers and any(id(child) in own for child in module.children()):
            return f"{name or 'the model'} holds layers of {parent} as well"
    return None


def _passes_through(trace: Trace, calls: list[Any], *, whole: bool = False) -> bool:
    """Whether the last axis of a layer's output is that of its input; with ``whole``, all axes."""
    return all(
        pairs is not None and all(trace.atoms.same(*pair) for pair in pairs[: None if whole else 1])
        for pairs in calls
    )
