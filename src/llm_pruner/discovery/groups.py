"""From a trace to groups: which units a model has, of what kind, and what binds them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from llm_pruner.discovery.tracing.calls import different
from llm_pruner.discovery.tracing.lengths import Graph, SizeSystem, reduce_constraints
from llm_pruner.discovery.tracing.run import (
    Run,
    forward_with_cache,
    forward_without_cache,
    named_tensors,
    run_trace,
    vocabulary_size,
)
from llm_pruner.discovery.tracing.scenes import Forward, given_scene, is_of_transformers, scenes_of
from llm_pruner.discovery.tracing.sizes import COMPARISONS, PLACE, Expr, leaves
from llm_pruner.discovery.tracing.trace import Role, Trace
from llm_pruner.errors import DiscoveryError, InfeasibleError
from llm_pruner.models.layers import numbering, without_layers
from llm_pruner.types import (
    Companion,
    Discovery,
    FrozenAxis,
    Group,
    IntArray,
    Kind,
    Member,
)


def discover(
    model: nn.Module, *, forward: Forward = forward_with_cache, tokens: torch.Tensor | None = None
) -> Discovery:
    """Find what can be removed from a model, by running it once on a few tokens.

    Args:
        model: any language model that maps token ids to logits; it is not changed.
        forward: how to run it; the default uses the cache of ``transformers`` models.
        tokens: token ids (batch, sequence); random ones by default.

    Raises:
        DiscoveryError: the model could not be run or has no token embedding.
    """
    plain = forward is forward_with_cache
    vocabulary = vocabulary_size(model, None if plain else forward)
    scenes = scenes_of(model, forward, vocabulary) if tokens is None else given_scene(forward)
    try:
        run = run_trace(model, scenes, tokens)
    except DiscoveryError:
        if forward is not forward_with_cache or not is_of_transformers(model):
            raise
        # Some models cannot be run with their cache by hand, others have none.
        scenes = (replace(scenes[0], run=forward_without_cache), *scenes[1:])
        run = run_trace(model, scenes, tokens)
    trace, aliases = run.trace, run.aliases
    tensors = {
        name: (tuple(tensor.shape), buffer)
        for name, tensor, buffer in named_tensors(model)
        if name not in aliases and name in trace.tensors
    }
    for name, (shape, _) in tensors.items():
        rows_of_axes = trace.tensors[name]
        for dim, rows in enumerate(rows_of_axes):
            if len(rows_of_axes) != len(shape) or len(rows) != shape[dim]:
                trace.atoms.freeze(rows, "its length changed during the run")
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    builder = _Builder(trace, tensors, lists)
    groups, unit_atoms = builder.groups()
    groups = _kept_for_unreached(groups, trace, tensors, aliases)
    system = SizeSystem(trace)
    groups = _bind(groups, unit_atoms, trace, system)
    layer_groups, own_numbers = _layer_groups(model, run, lists)
    graph = Graph(trace, system, unit_atoms, run.scenes, run.left_out, own_numbers)
    return Discovery(
        groups=(*groups, *layer_groups),
        frozen=tuple(builder.frozen_axes()),
        shapes={name: shape for name, (shape, buffer) in tensors.items() if not buffer},
        buffers={name: shape for name, (shape, buffer) in tensors.items() if buffer},
        aliases=aliases,
        graph=graph,
    )


# Elements of 16 bytes in bfloat16 and float16, and twice that in float32.
_ALIGNMENT = 8

# What is true of a group if it is of any of its units.
_OF_ANY: tuple[Role, ...] = ("aligned", "even", "read")

# Code that collects states until there are enough does not use them in a short run.
_UNUSED = "the traced run did not use what it computes"


class _Builder:
    """Collects the atoms of all tensors and sorts them into groups."""

    def __init__(
        self, trace: Trace, tensors: Mapping[str, tuple[tuple[int, ...], bool]], lists: list[str]
    ) -> None:
        self.trace = trace
        self.tensors = tensors
        self.names = list(tensors)
        self.outer_lists = [
            name for name in lists if not any(name.startswith(f"{other}.") for other in lists)
        ]
        pairs = [ragged.pairs.ravel() for ragged in trace.ragged]
        self.replicas = np.unique(trace.atoms.find(np.concatenate([np.zeros(1, int), *pairs])))
        self.roles = {role: self._flags(role) for role in trace.roles}
        self.choices = list(self._choices())
        self.chosen_from = np.zeros(len(trace.atoms), dtype=bool)
        for atoms, _, _ in self.choices:
            self.chosen_from[atoms] = True

    def _flags(self, role: Role) -> np.ndarray[Any, np.dtype[np.bool_]]:
        flags = np.zeros(len(self.trace.atoms), dtype=bool)
        for rows in self.trace.roles.get(role, []):
            flags[self.trace.atoms.resolve(rows)] = True
        flags[0] = False
        return flags

    def _choices(self) -> Iterator[tuple[IntArray, int, int]]:
        """Yield (atoms of the axis, how many are chosen, how many could be) once each."""
        found: dict[tuple[bytes, int], tuple[IntArray, int]] = {}
        for choice in self.trace.choices:
            atoms = np.unique(self.trace.atoms.resolve(choice.rows))
            atoms = atoms[atoms > 0]
            key = (atoms.tobytes(), choice.count)
            available = min(choice.available, found.get(key, (atoms, choice.available))[1])
            found[key] = (atoms, available)
        for (_, count), (atoms, available) in found.items():
            if atoms.size:
                yield atoms, count, available

    def groups(self) -> tuple[list[Group], dict[str, IntArray]]:
        """Return the groups in the order of the forward pass, and the atom of each unit."""
        atoms, axes, positions = self._incidence()
        if not atoms.size:
            return [], {}
        # Within an atom, axes and positions are in order already.
        order = np.argsort(atoms, kind="stable")
        atoms, axes, positions = atoms[order], axes[order], positions[order]
        starts = np.flatnonzero(np.r_[True, (atoms[1:] != atoms[:-1]) | (axes[1:] != axes[:-1])])
        run_atoms = atoms[starts]
        heads = np.flatnonzero(np.r_[True, run_atoms[1:] != run_atoms[:-1]])
        counts = np.diff(np.r_[starts, len(atoms)])
        runs = _Runs(axes[starts], counts, starts, heads, positions)
        # Atoms with equal counts on equal axes are units of one group.
        signature = np.add.reduceat(_mix(runs.axes, counts), heads)
        unit_of = run_atoms[heads]
        for bit, role in enumerate(sorted(self.roles)):
            signature = signature + _mix(
                np.full(len(unit_of), -1 - bit), self.roles[role][unit_of].astype(np.int64)
            )
        result: list[tuple[int, Group, IntArray]] = []
        by_signature: dict[int, list[int]] = defaultdict(list)
        for place, value in enumerate(signature.tolist()):
            by_signature[value].append(place)
        apart = [
            part for places in by_signature.values() for part in _factors(np.array(places), runs)
        ]
        for places in apart:
            built = self._members(places, runs)
            if built is not None:
                members, order_of_units = built
                units = unit_of[places][order_of_units]
                kind = self._kind(units, members)
                first = min(member.order for member in members if not member.buffer)
                layer = self._layer(members)
                aligned, even, read = (
                    role in self.roles and bool(self.roles[role][units].any()) for role in _OF_ANY
                )
                multiple = _ALIGNMENT if aligned else 2 if even else 1
                frozen = None if read and not _alone(members) else _UNUSED
                least = self._least(units)
                if least >= len(units):
                    frozen = frozen or "all of its units are chosen for every token"
                group = Group(
                    *("", kind, layer, len(units), members),
                    multiple=multiple,
                    least=least,
                    frozen=frozen,
                )
                result.append((first, group, units))
        result = self._one_factor(result)
        # Of two groups of one place, the one that can shrink is named first.
        result.sort(
            key=lambda item: (item[0], item[1].members[0].tensor, item[1].frozen is not None)
        )
        return self._named(result)

    def _one_factor(
        self, found: list[tuple[int, Group, IntArray]]
    ) -> list[tuple[int, Group, IntArray]]:
        """Let only one factor shrink of an axis from which a fixed number is chosen.

        Of experts in groups either whole groups could go, or some of each group. Each alone leaves
        enough to choose from; both together may not.
        """
        owner = np.full(len(self.trace.atoms), -1, dtype=np.int64)
        for place, (_, _, units) in enumerate(found):
            owner[units] = place
        fixed: set[int] = set()
        for atoms, _, _ in self.choices:
            places = {*owner[atoms].tolist()} - {-1}
            free = [place for place in places if found[place][1].frozen is None]
            if len(free) > 1:
                fixed |= {*free} - {max(free, key=lambda place: found[place][1].size)}
        reason = "it stays whole so that others can shrink, and enough are left to choose from"
        return [
            (first, replace(group, frozen=reason), units) if place in fixed else item
            for place, item in enumerate(found)
            for first, group, units in [item]
        ]

    def _incidence(self) -> tuple[IntArray, IntArray, IntArray]:
        atoms, axes, positions = [], [], []
        for number, name in enumerate(self.names):
            for dim, rows in enumerate(self.trace.tensors[name]):
                resolved = self.trace.atoms.resolve(rows)
                place, column = np.nonzero(resolved)
                atoms.append(resolved[place, column])
                axes.append(np.full(len(place), number * 16 + dim, dtype=np.int64))
                positions.append(place)
        return np.concatenate(atoms), np.concatenate(axes), np.concatenate(positions)

    def _members(self, places: IntArray, runs: _Runs) -> tuple[tuple[Member, ...], IntArray] | None:
        """Return the members of a group and the order of its units; None if it has no weights."""
        first, last = np.r_[runs.heads, len(runs.axes)][places[0] : places[0] + 2]
        members = []
        order: IntArray | None = None
        for offset, axis in enumerate(runs.axes[first:last].tolist()):
            index = runs.positions_of(places, offset)
            name = self.names[axis // 16]
            if order is None:
                order = np.argsort(index[:, 0], kind="stable")
            members.append(
                Member(
                    tensor=name,
                    dim=axis % 16,
                    index=index[order],
                    order=self.trace.order.get(name, 0),
                    buffer=self.tensors[name][1],
                )
            )
        members.sort(key=lambda member: (member.buffer, member.order, member.dim))
        if order is None or members[0].buffer:
            return None
        return tuple(members), order

    def _kind(self, units: IntArray, members: tuple[Member, ...]) -> Kind:
        def has(role: Role) -> bool:
            return role in self.roles and bool(self.roles[role][units].all())

        atoms = self.trace.atoms
        if (
            self.trace.residual is not None
            and np.isin(units, atoms.resolve(self.trace.residual)).all()
        ):
            return "hidden"
        if has("head"):
            if np.isin(units, self.replicas).all():
                return "query_heads"
            return "heads"
        matrices = [m for m in members if not m.buffer and len(self.tensors[m.tensor][0]) > 1]
        stacked = [m for m in matrices if m.dim == 0 and len(self.tensors[m.tensor][0]) > 2]
        routed = bool(self.chosen_from[units].all()) or any(
            has(role) for role in ("normalised", "query_key", "activation")
        )
        several = len({m.tensor for m in stacked}) > 1
        if has("routing") or (stacked and not has("filter") and (routed or several)):
            return "experts"
        if has("query_key"):
            return "head_dim"
        if has("value"):
            return "value_dim"
        if has("activation") and has("weighed") and len(matrices) > 1 and not self._spread(members):
            return "ffn"
        return "other"

    def _spread(self, members: tuple[Member, ...]) -> bool:
        """Whether a unit lies in several layers, as a stream of hidden states does."""
        layers = defaultdict(set)
        for member in members:
            place = self._layer_of(member.tensor)
            if place is not None:
                layers[place[0]].add(place[1])
        return any(len(numbers) > 1 for numbers in layers.values())

    def _least(self, units: IntArray) -> int:
        """Return how many units must stay so that as many can be chosen as the code chooses.

        An axis with n units, of whose positions ``available`` can be chosen, offers
        kept / n * available of them (a unit of grouped experts is one expert of each group).
        """
        least = 1
        if not self.chosen_from[units].any():
            return least
        for rows, count, available in self.choices:
            present = int(np.isin(units, rows).sum())
            if present:
                elsewhere = len(units) - present
                least = max(least, elsewhere + -(-count * present // available))
        return least

    def _layer(self, members: tuple[Member, ...]) -> int | None:
        found = {self._layer_of(member.tensor) for member in members}
        if len(found) != 1:
            return None
        place = found.pop()
        return None if place is None else place[1]

    def _layer_of(self, tensor: str) -> tuple[str, int] | None:
        for path in self.outer_lists:
            match = re.match(re.escape(path) + r"\.(\d+)\.", tensor)
            if match:
                return path, int(match.group(1))
        return None

    def _named(
        self, found: list[tuple[int, Group, IntArray]]
    ) -> tuple[list[Group], dict[str, IntArray]]:
        groups: list[Group] = []
        unit_atoms: dict[str, IntArray] = {}
        for _, group, units in found:
            stem = group.kind if group.layer is None else f"layers.{group.layer}.{group.kind}"
            name, number = stem, 1
            while name in unit_atoms:
                number += 1
                name = f"{stem}_{number}"
            unit_atoms[name] = units
            groups.append(replace(group, name=name))
        return self._in_blocks(groups, unit_atoms), unit_atoms

    def _in_blocks(self, groups: list[Group], unit_atoms: dict[str, IntArray]) -> list[Group]:
        """Give query heads as blocks the units of their key-value heads."""
        atoms = self.trace.atoms
        block_of = np.full(len(atoms), -1, dtype=np.int64)
        outer_of = np.full(len(atoms), 0, dtype=np.int64)
        for ragged in self.trace.ragged:
            pairs = atoms.find(ragged.pairs)
            outer = atoms.resolve(ragged.outer)
            block_of[pairs] = np.arange(len(pairs))[:, None]
            if outer.shape[1] == 1:
                outer_of[pairs] = outer
        unit_number = np.full(len(atoms), -1, dtype=np.int64)
        group_number = np.full(len(atoms), -1, dtype=np.int64)
        for number, group in enumerate(groups):
            if group.kind == "heads":
                unit_number[unit_atoms[group.name]] = np.arange(group.size)
                group_number[unit_atoms[group.name]] = number
        result = []
        for group in groups:
            if group.kind == "query_heads":
                outer = outer_of[unit_atoms[group.name]]
                owners = np.unique(group_number[outer])
                known = bool((owners >= 0).all())
                group = replace(
                    group,
                    blocks=unit_number[outer] if known else block_of[unit_atoms[group.name]],
                    owner=groups[int(owners[0])].name if known and len(owners) == 1 else None,
                )
            result.append(group)
        return result

    def frozen_axes(self) -> list[FrozenAxis]:
        """Return the axes of parameters, or parts of them, that no removal can reach."""
        atoms = self.trace.atoms
        result = []
        for name in self.names:
            if self.tensors[name][1]:
                continue
            for dim, rows in enumerate(self.trace.tensors[name]):
                if len(rows) == 1:
                    continue
                resolved = atoms.resolve(rows)
                stuck = ~resolved.any(axis=1) if resolved.shape[1] else np.ones(len(rows), bool)
                if not stuck.any():
                    continue
                reason = atoms.reason(rows[stuck]) or "not reached by the forward pass"
                result.append(FrozenAxis(name, dim, int(stuck.sum()), len(rows), reason))
        return result


class _Runs(NamedTuple):
    """Where atoms lie: one run for each atom and each axis that it is on, by atom and then by axis.

    Attributes:
        axes: number of the axis, by run.
        counts: at how many positions of it, by run.
        starts: where these are in ``positions``, by run.
        heads: number of an atom -> its first run.
        positions: along the axes.
    """

    axes: IntArray
    counts: IntArray
    starts: IntArray
    heads: IntArray
    positions: IntArray

    def positions_of(self, places: IntArray, offset: int = 0) -> IntArray:
        """Return where some atoms, which are alike, lie on one of their axes; (atoms, count)."""
        runs = self.heads[places] + offset
        return self.positions[self.starts[runs][:, None] + np.arange(self.counts[runs[0]])]


def _factors(places: IntArray, runs: _Runs) -> list[IntArray]:
    """Divide atoms with equal counts on equal axes where they share positions.

    A product of two axes of equal length (two groups of two experts) gives the atoms of both the
    same counts. Atoms of one factor never meet at a position, and meet all those of the other.
    """
    index = runs.positions_of(places)
    if len(np.unique(index)) == index.size:
        return [places]
    there = np.zeros((len(places), int(index.max()) + 1), dtype=bool)
    np.put_along_axis(there, index, values=True, axis=1)
    meets = (there.astype(np.int64) @ there.T.astype(np.int64)) > 0
    parts: list[IntArray] = []
    left = np.arange(len(places))
    while left.size:
        part = left[:1]
        while True:
            grown = left[~meets[np.ix_(left, part)].all(axis=1) | np.isin(left, part)]
            if len(grown) == len(part):
                break
            part = grown
        parts.append(places[part])
        left = np.setdiff1d(left, part)
    return parts


def _alone(members: tuple[Member, ...]) -> bool:
    """Whether a single position of a single weight is all that a unit has: no weight reads it."""
    weights = [member for member in members if not member.buffer]
    return len(weights) == 1 and weights[0].index.shape[1] == 1


def _mix(axes: IntArray, counts: IntArray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hash (axis, count) pairs to 64 bits (splitmix64), to be summed over the pairs of an atom."""
    with np.errstate(over="ignore"):
        x = axes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _kept_for_unreached(
    groups: list[Group],
    trace: Trace,
    tensors: Mapping[str, tuple[tuple[int, ...], bool]],
    aliases: Mapping[str, str],
) -> list[Group]:
    """Freeze groups that a parameter may read which the run did not reach.

    That is one of a module used in training alone, or for images: it may, if it has an axis of that
    length, and lies where activations of the group are at hand.
    """
    reached = {*trace.order, *(name for name, first in aliases.items() if first in trace.order)}
    used = {path for name in reached for path in _paths(name)}
    missed: dict[int, dict[str, str]] = defaultdict(dict)
    for name, (shape, buffer) in tensors.items():
        if name not in reached and not buffer:
            caller = next(path for path in reversed(_paths(name)) if path in used or not path)
            for size in shape:
                missed[size].setdefault(caller, name)
    result = []
    for group in groups:
        places = [_paths(member.tensor) for member in group.members if not member.buffer]
        common = [path for path in places[0] if all(path in other for other in places)][-1]
        sizes = {tensors[member.tensor][0][member.dim] for member in group.members}
        missing = next(
            (
                name
                for size in sorted(sizes - {1})
                for caller, name in missed[size].items()
                if common in _paths(f"{caller}.")
            ),
            None,
        )
        if missing is not None and group.frozen is None:
            reason = f"{missing} was not reached by the forward pass and may have to follow"
            group = replace(group, frozen=reason)
        result.append(group)
    return result


def _paths(name: str) -> list[str]:
    """Return the modules around a tensor, the whole model first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _bind(
    groups: list[Group], unit_atoms: dict[str, IntArray], trace: Trace, system: SizeSystem
) -> list[Group]:
    """Add companions, and freeze groups that no size of the model's code can express."""
    # Query-key channels lead: value channels follow them where one attribute sizes both.
    ranking = sorted(range(len(groups)), key=lambda i: (groups[i].kind != "head_dim", i))
    group_of = np.full(len(trace.atoms), -1, dtype=np.int64)
    sizes = {}
    for number, place in enumerate(ranking):
        group_of[unit_atoms[groups[place].name]] = number
        sizes[number] = groups[place].size
    follows, stuck = reduce_constraints(system.constraints(group_of, sizes))
    companions: dict[int, list[Companion]] = defaultdict(list)
    for follower, (leader, ratio) in follows.items():
        names = groups[ranking[leader]].name, groups[ranking[follower]].name
        companions[leader].append(Companion(names[1], ratio))
        companions[follower].append(Companion(names[0], 1 / ratio))
    result = list(groups)
    for number, place in enumerate(ranking):
        group = replace(groups[place], companions=tuple(companions[number]))
        result[place] = replace(group, frozen=group.frozen or stuck.get(number))
    by_name = {group.name: group for group in result}
    for place, group in enumerate(result):
        if group.frozen is None:
            result[place] = replace(group, frozen=_trial(group, by_name, unit_atoms, trace, system))
    return result


def _trial(
    group: Group,
    by_name: dict[str, Group],
    unit_atoms: dict[str, IntArray],
    trace: Trace,
    system: SizeSystem,
) -> str | None:
    """Remove the fewest units that go together; return why the sizes cannot follow, or None.

    The first ones and the last ones: code that cuts an axis in half needs as many of both halves.
    """
    ratios = {group.name: Fraction(1)}
    pending = [group.name]
    while pending:
        name = pending.pop()
        for companion in by_name[name].companions:
            if companion.group not in ratios:
                ratios[companion.group] = ratios[name] * companion.ratio
                pending.append(companion.group)
    unit = int(np.lcm.reduce([ratio.denominator for ratio in ratios.values()]))
    chosen = []
    for name, ratio in ratios.items():
        bound, count = by_name[name], int(unit * ratio)
        if bound.frozen is not None:
            return f"{name} must shrink with it: {bound.frozen}"
        if bound.size <= count:
            return f"{name} has only {bound.size} unit{'s' * (bound.size > 1)}"
        if bound.size - count < bound.least:
            return f"{name} must keep {bound.least} of its {bound.size} units"
        chosen.append((unit_atoms[name], count))
    if group.blocks is not None:
        _, first = np.unique(group.blocks, return_index=True)
        if group.size <= len(first):
            return "every key-value group has only one query head"
        chosen[0] = (unit_atoms[group.name][first], len(first))
    for last in (False, True):
        atoms = np.concatenate(
            [units[-count:] if last else units[:count] for units, count in chosen]
        )
        deleted = np.zeros(len(trace.atoms), dtype=bool)
        deleted[atoms] = True
        try:
            system.attributes(deleted, system.equations_of(atoms))
        except InfeasibleError as error:
            return str(error)
    return None


def _layer_groups(
    model: nn.Module, run: Run, lists: list[str]
) -> tuple[list[Group], frozenset[tuple[str, str, str]]]:
    """Find module lists whose children map the residual stream onto itself.

    Returns the groups and ``Graph.own_numbers``.
    """
    own: set[tuple[str, str, str]] = set()
    trace, calls, by_place = run.trace, run.layers.axes, run.layers.by_place()
    groups: list[Group] = []
    nested = [name for name in lists if any(name.startswith(f"{o}.") for o in lists)]
    by_list: dict[str, list[str]] = defaultdict(list)
    for child in calls:
        parent = child.rsplit(".", 1)[0]
        if parent not in nested:
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
        name = "layers" if not groups else f"layers_{len(groups) + 1}"
        numbers, clash = _own_numbers(model, trace, parent)
        own |= numbers
        reason = reason or clash
        if reason is None and parent in by_place:
            reason = _depends_on_place(model, run, parent, children)
        if len(children) < 2:
            reason = "the model needs its first layer, and has one other"
        modules = tuple(children)
        groups.append(Group(name, "layers", None, len(modules), (), frozen=reason, modules=modules))
    return groups, frozenset(own)


def _own_numbers(
    model: nn.Module, trace: Trace, parent: str
) -> tuple[set[tuple[str, str, str]], str | None]:
    """Return the numbers of layers that are calculated with, and why layers must stay, or None.

    A number that a layer finds its cache by must follow when layers before it go, one that it
    calculates with must not; one that does both can do neither.
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
    """Return what layers are given by their place in the list, or None.

    Layers may be given different things by name: by what they say of themselves, or by a list in
    the settings that is cut with them. So some are taken out, and those that stay must be given
    what they were given before.
    """
    numbers = [int(child.rpartition(".")[2]) for child in children]
    dense = run.layers.given[parent]
    for gone in (numbers[: (len(numbers) + 1) // 2], [numbers[(len(numbers) - 1) // 2]]):
        kept = [number for number in dense if number not in gone]
        if not kept:
            continue
        again = run_trace(without_layers(model, parent, gone), run.scenes).layers
        for number in kept:
            place = number - sum(other < number for other in gone)
            for name in different(dense[number], again.given[parent][place]):
                where = run.layers.where[parent]
                return f"{name} of a layer depends on its place in the list ({where})"
    return None


def _why_fixed(model: nn.Module, trace: Trace) -> str | None:
    """Return why the number of layers cannot change, or None."""
    held = [rows.ravel() for axes in trace.tensors.values() for rows in axes]
    atoms = trace.atoms.find(np.concatenate([np.zeros(0, np.int64), *held]))
    for equation in trace.equations:
        # A state that is made anew in each run has as many entries as there are layers by then.
        rows = trace.atoms.find(equation.rows)
        if equation.where == "new tensor" and not np.isin(rows, atoms[atoms > 0]).any():
            continue
        for leaf in leaves(equation.expr):
            name = str(leaf[2]) if leaf[0] == "attr" else ""
            if name.endswith(("num_hidden_layers", "n_layer", "n_layers", "num_layers")):
                return f"{name} sizes an axis as well ({equation.where})"
    config = getattr(model, "config", None)
    for settings in (config, getattr(config, "text_config", None)):
        for name in ("layer_types", "layers_block_type"):
            # A property, without a value of its own, follows from the number of each layer.
            if settings is None:
                continue
            kinds = getattr(settings, name, None)
            stored = {name, *getattr(settings, "attribute_map", {}).values()} & set(vars(settings))
            if (
                isinstance(kinds, list | tuple)
                and len(set(kinds)) > 1
                and not any(vars(settings)[key] == kinds for key in stored)
            ):
                return f"the kind of each layer follows from its number ({name})"
    return None


def _opens(model: nn.Module, children: list[str]) -> bool:
    """Whether the first layer holds a part that no other has (a norm of the embeddings).

    Its code runs that part by the number of the layer, so whatever comes first must have it.
    """
    parts = [{name for name, _ in model.get_submodule(c).named_children()} for c in children]
    return parts[0] > set().union(*parts[1:])


def _passes_through(trace: Trace, calls: list[tuple[Any, Any]], *, whole: bool = False) -> bool:
    """Whether the last axis of a layer's output is that of its input; with ``whole``, all axes.

    Behind a layer that numbers another axis anew, such as parallel streams, other units would be
    removed than before it; without the layer the two would meet.
    """
    for source, result in calls:
        if source is None or result is None:
            return False
        for before, after in list(zip(source, result, strict=True))[: None if whole else 1]:
            a, b = trace.atoms.resolve(before), trace.atoms.resolve(after)
            if a.shape != b.shape or not bool((a == b).all()):
                return False
    return True
