"""From a trace to groups: the prunable units of a model, their kinds, and what ties them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from llm_pruner.discovery.atom_runs import Runs
from llm_pruner.discovery.layers import layer_groups, outer_lists
from llm_pruner.discovery.lengths import Graph, SizeSystem, reduce_constraints
from llm_pruner.discovery.run import (
    Run,
    forward_with_cache,
    forward_without_cache,
    named_tensors,
    run_trace,
    vocabulary_size,
)
from llm_pruner.errors import DiscoveryError, InfeasibleError
from llm_pruner.models.forward import module_of, token_ids
from llm_pruner.tracing.scenes import Forward, is_of_transformers, scenes_of
from llm_pruner.tracing.trace import Role
from llm_pruner.types import (
    Companion,
    Discovery,
    FrozenAxis,
    Group,
    IntArray,
    Kind,
    Member,
    Place,
    bound_to,
)


def discover(
    model: nn.Module, *, forward: Forward = forward_with_cache, tokens: torch.Tensor | None = None
) -> Discovery:
    """Find what can be removed from a model by tracing it on a few tokens.

    Args:
        model: any language model that maps token ids to logits; it is not changed.
        forward: how to run it; the default uses the cache of ``transformers`` models.
        tokens: token ids (batch, sequence) to use for the first run instead of random ones.

    Raises:
        DiscoveryError: the model cannot be run or has no token embedding.
        UserError: the model is no module, or the tokens do not fit it.
    """
    model = module_of(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise DiscoveryError("a module of the model is in TorchScript, which cannot be traced")
    if tokens is not None:
        tokens = token_ids(tokens, model)
    plain = forward is forward_with_cache
    vocabulary = vocabulary_size(model, None if plain else forward)
    scenes = scenes_of(model, forward, vocabulary, tokens)
    try:
        run = run_trace(model, scenes)
    except DiscoveryError:
        if forward is not forward_with_cache or not is_of_transformers(model):
            raise
        # Some models have no cache, or none that can be passed by hand.
        scenes = (replace(scenes[0], run=forward_without_cache), *scenes[1:])
        run = run_trace(model, scenes)
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
    builder = _Builder(run, tensors, outer_lists(model))
    groups = builder.groups()
    layers, own_numbers = layer_groups(model, run)
    graph = Graph(trace, builder.system, builder.unit_atoms, run.scenes, run.left_out, own_numbers)
    return Discovery(
        groups=(*groups, *layers),
        frozen=tuple(builder.frozen_axes()),
        shapes={name: shape for name, (shape, buffer) in tensors.items() if not buffer},
        buffers={name: shape for name, (shape, buffer) in tensors.items() if buffer},
        aliases=aliases,
        graph=graph,
    )


_PIECES = 8  # evenly spaced units of a group whose removal is tried alone
_ALIGNMENT = 8  # elements in the 16 bytes that grouped products need, in bfloat16 and float16
_ROUTED: tuple[Role, ...] = ("normalised", "query_key", "activation")


class _Builder:
    """Sorts the atoms of all tensors into groups."""

    def __init__(
        self, run: Run, tensors: Mapping[str, tuple[tuple[int, ...], bool]], lists: list[str]
    ) -> None:
        self.trace = trace = run.trace
        self.atoms = trace.atoms
        self.system = SizeSystem(trace)
        self.unit_atoms: dict[str, IntArray] = {}
        self.aliases = run.aliases
        self.tensors = tensors
        self.names = list(tensors)
        self.outer_lists = lists
        self.replicas = self._flags(trace.atoms.find(ragged.pairs) for ragged in trace.ragged)
        self.roles = {
            role: self._flags(trace.atoms.resolve(rows) for rows in trace.roles.get(role, []))
            for role in sorted(get_args(Role))
        }
        self.read = {id(rows) for rows in trace.roles.get("weighed", [])}
        self.choices = list(self._choices())
        self.chosen_from = self._flags(atoms for atoms, _, _ in self.choices)

    def _flags(self, parts: Iterable[IntArray]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for every atom whether it is in any of these arrays."""
        flags = np.zeros(len(self.atoms), dtype=bool)
        for part in parts:
            flags[part] = True
        flags[0] = False
        return flags

    def _all(self, role: Role, units: IntArray) -> bool:
        return bool(self.roles[role][units].all())

    def _any(self, role: Role, units: IntArray) -> bool:
        return bool(self.roles[role][units].any())

    def _choices(self) -> Iterator[tuple[IntArray, int, int]]:
        """Yield each distinct choice: (atoms of the axis, number chosen, number available)."""
        found: dict[tuple[bytes, int], tuple[IntArray, int]] = {}
        for choice in self.trace.choices:
            atoms = np.unique(self.atoms.resolve(choice.rows))
            atoms = atoms[atoms > 0]
            key = (atoms.tobytes(), choice.count)
            available = min(choice.available, found.get(key, (atoms, choice.available))[1])
            found[key] = (atoms, available)
        for (_, count), (atoms, available) in found.items():
            if atoms.size:
                yield atoms, count, available

    def groups(self) -> list[Group]:
        """Return the groups in the order of the forward pass."""
        return self._bind(self._kept_for_unreached(self._in_blocks(self._named(self._found()))))

    def _found(self) -> list[tuple[Group, IntArray]]:
        """Return the groups without names, and the atoms of their units."""
        runs = Runs.of(self.atoms, [self.trace.tensors[name] for name in self.names])
        found = [
            group
            for places in runs.alike(list(self.roles.values()))
            for part in runs.factors(places)
            if (group := self._group(part, runs)) is not None
        ]
        # By first weight; of two groups with the same, the one that can shrink is named first.
        ranked = [(one.members[0], one, units) for one, units in self._one_factor(found)]
        ranked.sort(key=lambda one: (one[0].order, one[0].tensor, bool(one[1].frozen)))
        return [(group, units) for _, group, units in ranked]

    def _group(self, places: IntArray, runs: Runs) -> tuple[Group, IntArray] | None:
        """Return a group without a name, and the atoms of its units; None if it has no weights."""
        if (built := self._members(places, runs)) is None:
            return None
        members, units = built
        aligned, even = self._any("aligned", units), self._any("even", units)
        path, layer = self._place(members)
        frozen, least = None, self._least(units)
        if not self._any("read", units) or _is_one_position(members):
            frozen = "the traced run did not use what it computes"
        elif least >= len(units):
            frozen = "all of its units are chosen for every token"
        group = Group(
            *("", self._kind(units, members), layer, len(units), members),
            multiple=_ALIGNMENT if aligned else 2 if even else 1,
            least=least,
            frozen=frozen,
            path=path,
        )
        return group, units

    def _one_factor(self, found: list[tuple[Group, IntArray]]) -> list[tuple[Group, IntArray]]:
        """Let one factor only shrink of an axis from which a fixed number is chosen.

        Of grouped experts, whole groups could go, or experts of each group. Each alone leaves
        enough to choose from; both together may not.
        """
        owner = np.full(len(self.atoms), -1, dtype=np.int64)
        for place, (_, units) in enumerate(found):
            owner[units] = place
        fixed: set[int] = set()
        for atoms, _, _ in self.choices:
            places = {*owner[atoms].tolist()} - {-1}
            free = [place for place in places if found[place][0].frozen is None]
            if len(free) > 1:
                fixed |= {*free} - {max(free, key=lambda place: found[place][0].size)}
        reason = "it stays whole so that others can shrink, and enough are left to choose from"
        return [
            (replace(group, frozen=reason) if place in fixed else group, units)
            for place, (group, units) in enumerate(found)
        ]

    def _members(self, places: IntArray, runs: Runs) -> tuple[tuple[Member, ...], IntArray] | None:
        """Return the members of a group and the atoms of its units; None if it has no weights."""
        first, last = np.r_[runs.heads, len(runs.axes)][places[0] : places[0] + 2]
        places = places[np.argsort(runs.positions_of(places)[:, 0], kind="stable")]
        members = []
        for offset, axis in enumerate(runs.axes[first:last].tolist()):
            name, index = self.names[axis // 16], runs.positions_of(places, offset)
            order, buffer = self.trace.order.get(name, 0), self.tensors[name][1]
            reads = id(self.trace.tensors[name][axis % 16]) in self.read
            members.append(Member(name, axis % 16, index, order, buffer, reads))
        members.sort(key=lambda member: (member.buffer, member.order, member.dim))
        return None if members[0].buffer else (tuple(members), runs.atoms[places])

    def _kind(self, units: IntArray, members: tuple[Member, ...]) -> Kind:
        residual = self.trace.residual
        if residual is not None and np.isin(units, self.atoms.resolve(residual)).all():
            return "hidden"
        if self._all("head", units):
            return "query_heads" if self.replicas[units].all() else "heads"
        matrices = [m for m in members if not m.buffer and len(self.tensors[m.tensor][0]) > 1]
        stacked = [m for m in matrices if m.dim == 0 and len(self.tensors[m.tensor][0]) > 2]
        routed = bool(self.chosen_from[units].all()) or any(
            self._all(role, units) for role in _ROUTED
        )
        several = len({m.tensor for m in stacked}) > 1
        in_stacks = stacked and not self._all("filter", units) and (routed or several)
        if self._all("routing", units) or in_stacks:
            return "experts"
        if self._all("query_key", units):
            return "head_dim"
        if self._all("value", units):
            return "value_dim"
        bent = self._all("activation", units) and self._all("weighed", units)
        return "ffn" if bent and len(matrices) > 1 and not self._spread(members) else "other"

    def _spread(self, members: tuple[Member, ...]) -> bool:
        """Whether a unit lies in several layers, as a stream of hidden states does."""
        places = {self._layer_of(member.tensor) for member in members} - {None}
        return len(places) > len({place[0] for place in places if place is not None})

    def _least(self, units: IntArray) -> int:
        """Return how many units must stay for the router to choose as many as it does.

        Of an axis with n units and ``available`` choices, kept / n * available choices are left (a
        unit of grouped experts is one expert of each group).
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

    def _place(self, members: tuple[Member, ...]) -> Place:
        place, *others = {self._layer_of(member.tensor) for member in members}
        return ("", None) if place is None or others else place

    def _layer_of(self, tensor: str) -> tuple[str, int] | None:
        for path in self.outer_lists:
            match = re.match(re.escape(path) + r"\.(\d+)\.", tensor)
            if match:
                return path, int(match.group(1))
        return None

    def _named(self, found: list[tuple[Group, IntArray]]) -> list[Group]:
        groups: list[Group] = []
        for group, units in found:
            stem = group.kind if group.layer is None else f"layers.{group.layer}.{group.kind}"
            name, number = stem, 1
            while name in self.unit_atoms:
                number += 1
                name = f"{stem}_{number}"
            self.unit_atoms[name] = units
            groups.append(replace(group, name=name))
        return groups

    def _in_blocks(self, groups: list[Group]) -> list[Group]:
        """Set the blocks of query heads: the key-value head that each one reads."""
        block_of, unit_of, group_of = np.full((3, len(self.atoms)), -1, dtype=np.int64)
        outer_of = np.zeros(len(self.atoms), dtype=np.int64)
        for ragged in self.trace.ragged:
            pairs, outer = self.atoms.find(ragged.pairs), self.atoms.resolve(ragged.outer)
            block_of[pairs] = np.arange(len(pairs))[:, None]
            if outer.shape[1] == 1:
                outer_of[pairs] = outer
        for number, group in enumerate(groups):
            if group.kind == "heads":
                unit_of[self.unit_atoms[group.name]] = np.arange(group.size)
                group_of[self.unit_atoms[group.name]] = number
        result = []
        for group in groups:
            if group.kind == "query_heads":
                units = self.unit_atoms[group.name]
                owners = np.unique(group_of[outer_of[units]])
                known = bool((owners >= 0).all())
                group = replace(
                    group,
                    blocks=unit_of[outer_of[units]] if known else block_of[units],
                    owner=groups[int(owners[0])].name if known and len(owners) == 1 else None,
                )
            result.append(group)
        return result

    def _kept_for_unreached(self, groups: list[Group]) -> list[Group]:
        """Freeze groups that may have to shrink a parameter which the run did not reach.

        That is a parameter used in training only, or for images, with an axis of the group's
        length, in a module that has the group's activations. Hidden states reach everywhere, and
        experts of images stand beside those of text.
        """
        order = self.trace.order
        reached = {*order, *(name for name, first in self.aliases.items() if first in order)}
        used = {path for name in reached for path in _paths(name)}
        missed: dict[int, dict[str, str]] = defaultdict(dict)
        for name, (shape, buffer) in self.tensors.items():
            if name not in reached and not buffer:
                caller = next(path for path in reversed(_paths(name)) if path in used or not path)
                for size in shape:
                    missed[size].setdefault(caller, name)
        result = []
        for group in groups:
            places = [_paths(member.tensor) for member in group.members if not member.buffer]
            common = [path for path in places[0] if all(path in other for other in places)][-1]
            wider = {"hidden": "", "experts": common.rpartition(".")[0]}
            around = wider.get(group.kind, common)
            sizes = {group.size, *(member.index.shape[1] for member in group.members)}
            sizes |= {self.tensors[member.tensor][0][member.dim] for member in group.members}
            near = [
                f"{name} was not reached by the forward pass and may have to follow"
                for size in sorted(sizes - {1})
                for caller, name in missed[size].items()
                if around in _paths(f"{caller}.")
            ]
            result.append(replace(group, frozen=group.frozen or next(iter(near), None)))
        return result

    def _bind(self, groups: list[Group]) -> list[Group]:
        """Add companions, and freeze groups that the sizes in the model's code cannot follow."""
        # Query-key channels first: value channels follow where one attribute sizes both.
        ranked = sorted(groups, key=lambda group: group.kind != "head_dim")
        group_of = np.full(len(self.atoms), -1, dtype=np.int64)
        for number, group in enumerate(ranked):
            group_of[self.unit_atoms[group.name]] = number
        sizes = [group.size for group in ranked]
        follows, stuck = reduce_constraints(self.system.constraints(group_of, sizes))
        companions: dict[str, list[Companion]] = defaultdict(list)
        for follower, (leader, ratio) in follows.items():
            one, other = ranked[leader].name, ranked[follower].name
            companions[one].append(Companion(other, ratio))
            companions[other].append(Companion(one, 1 / ratio))
        why = {ranked[number].name: reason for number, reason in stuck.items()}
        bound = {
            group.name: replace(
                group,
                companions=tuple(companions[group.name]),
                frozen=group.frozen or why.get(group.name),
            )
            for group in groups
        }
        return [
            replace(group, frozen=group.frozen or self._trial(group, bound))
            for group in bound.values()
        ]

    def _trial(self, group: Group, by_name: dict[str, Group]) -> str | None:
        """Try to remove the fewest units; return why the sizes cannot follow, or None.

        The first ones, the last ones (code may cut an axis in half), and some between them (code
        may split an axis into pieces of sizes of their own).
        """
        ratios = bound_to(group.name, by_name)
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
            chosen.append((self.unit_atoms[name], count))
        if group.blocks is not None:
            _, first = np.unique(group.blocks, return_index=True)
            if group.size <= len(first):
                return "every key-value group has only one query head"
            chosen[0] = (self.unit_atoms[group.name][first], len(first))
        (units, count), *rest = chosen
        first = np.concatenate([units[:count], *(others[:n] for others, n in rest)])
        trials = [first, np.concatenate([units[-n:] for units, n in chosen])]
        seen: set[frozenset[int]] = set()
        for start in np.linspace(0, len(units) - count, _PIECES, dtype=int):
            part = units[start : start + count]
            touched = frozenset(self.system.equations_of(part))
            if group.blocks is None and touched not in seen:
                seen.add(touched)
                trials.append(np.concatenate([part, first[count:]]))
        for atoms in trials:
            deleted = np.zeros(len(self.atoms), dtype=bool)
            deleted[atoms] = True
            try:
                self.system.attributes(deleted, self.system.equations_of(atoms))
            except InfeasibleError as error:
                return str(error)
        return None

    def frozen_axes(self) -> list[FrozenAxis]:
        """Return the parameter axes, or parts of them, that cannot be pruned."""
        result = []
        # Heads may be frozen while the channels in them are not.
        heads = np.concatenate(
            [self.atoms.frozen_in(np.unique(rows)) for rows in self.trace.roles.get("head", [])]
            or [np.zeros(0, dtype=np.int64)]
        )
        for name, (_, buffer) in self.tensors.items():
            for dim, rows in enumerate(() if buffer else self.trace.tensors[name]):
                live = self.atoms.resolve(rows)
                stuck = ~live.any(axis=1)
                if len(rows) > 1 and stuck.any():
                    reason = self.atoms.reason(rows[stuck]) or "not reached by the forward pass"
                    result.append(FrozenAxis(name, dim, int(stuck.sum()), len(rows), reason))
                elif heads.size and not self._any("head", live):
                    inside = self.atoms.frozen_in(rows)
                    why = self.atoms.first_reason(inside[np.isin(inside, heads)])
                    if why is not None:
                        reason = f"its heads: {why}"
                        result.append(FrozenAxis(name, dim, len(rows), len(rows), reason))
        return result


def _is_one_position(members: tuple[Member, ...]) -> bool:
    """Whether a unit is one position of one weight, which no other weight reads."""
    weights = [member for member in members if not member.buffer]
    return len(weights) == 1 and weights[0].index.shape[1] == 1


def _paths(name: str) -> list[str]:
    parts = name.split(".")[:-1]  # the modules around a tensor, the whole model first
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
