"""Config values that give a pruned model's sizes, where there are any.

No key is known by name. Lists with one entry a layer, lists of layer numbers and numbers that
divide the layers follow the layers that were kept. Then each integer is changed on a model without
weights, which shows the sizes that it governs and so the value that it needs. The config found must
build exactly the pruned model: shapes, numbers that code reads, and computed buffers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.checkpoints import meta
from llm_pruner.models.forward import caching, embedding_rows, evaluating
from llm_pruner.models.layers import keep_children, numbers_of_layers, sharing_copy
from llm_pruner.types import Edits

_OPTIONAL_TRIALS = (64, 128)
_CONVENTIONAL_KEYS = ("head_dim",)
"""Keys that models read from any config that has them, though their config class names none."""


def stock_config(
    dense_config: PreTrainedConfig, pruned_model: PreTrainedModel, edits: Edits
) -> PreTrainedConfig | None:
    """Return a plain config that builds the pruned model, or None if there is none.

    Args:
        dense_config: config of the model before pruning.
        pruned_model: the model as surgery left it.
        edits: what surgery did.
    """
    # Which positions of tables such as the rotary one were kept follows from no config.
    if edits.buffers.keys() - pruned_model.state_dict().keys():
        return None
    trials, target = meta.Trials(type(pruned_model), dense_config), meta.sizes(pruned_model)
    depth = layer_values(trials, edits.layers, target)
    if depth is None or not depth.exact:
        return None
    trials = meta.Trials(type(pruned_model), meta.with_values(dense_config, depth.values))
    solver = _Solver(trials)
    values = solver.solve(target)
    if values is None:
        return None
    found = accepted(meta.with_values(trials.config, values), pruned_model, target, edits)
    # Keys that the dense config leaves open stay open where the result is the same.
    for path in solver.opened:
        fewer = {other: value for other, value in values.items() if other != path}
        if config := accepted(meta.with_values(trials.config, fewer), pruned_model, target, edits):
            values, found = fewer, config
    return found


class Depth(NamedTuple):
    """Config values by dotted path, and whether they build just the kept layers."""

    values: Mapping[str, Any]
    exact: bool


def layer_values(
    trials: meta.Trials, layers: Mapping[str, tuple[int, ...]], target: meta.Sizes
) -> Depth | None:
    """Return the values of the dense config that change with removed layers.

    None if no integer of the config sets the length of one of the lists.
    """
    if not layers:
        return Depth({}, exact=True)
    skeleton = meta.build_meta(trials.model_class, trials.config)
    dense = meta.sizes(skeleton)
    values: dict[str, Any] = {}
    for name, kept in layers.items():
        shorter = _shorter(trials, values, name, kept, dense["list", name, "len"])
        if shorter is None:
            return None
        values = shorter
        keep_children(skeleton, name, kept)
    wanted = meta.sizes(skeleton)
    counts = {(dense["list", name, "len"], len(kept)) for name, kept in layers.items()}

    def agrees(key: tuple[str, str, Any], found: meta.Sizes) -> bool:
        one, other = found.get(key), wanted.get(key)
        # A layer may number itself as the pruned model does; modules may hold how many there are.
        return one == other or (
            key[0] == "attribute"
            and one is not None
            and (one == target.get(key) or (other, one) in counts)
        )

    def count_wrong(values: Mapping[str, Any]) -> float:
        found = trials.sizes(values)
        if found is None:
            return inf
        return sum(not agrees(key, found) for key in found.keys() | wanted.keys())

    wrong = count_wrong(values)
    taken = []
    for name, kept in layers.items():
        count = dense["list", name, "len"]
        for path, value, silent in _renumbered(trials.config, values, count, kept):
            if wrong == 0 and not silent:
                continue
            trial = values | {path: value}
            found = count_wrong(trial)
            # Which layers attend to a window, say, shows in no size of the model.
            if found < wrong or (silent and found == wrong):
                values, wrong = trial, found
                taken += [] if silent else [path]
    for path in taken:
        # What helped as long as another value was wrong may be wrong now.
        trial = {other: value for other, value in values.items() if other != path}
        found = count_wrong(trial)
        if found <= wrong:
            values, wrong = trial, found
    return Depth(values, exact=wrong == 0)


def _shorter(
    trials: meta.Trials, values: Mapping[str, Any], name: str, kept: Sequence[int], count: int
) -> dict[str, Any] | None:
    """Return ``values`` with the length of one module list and the lists of that length."""
    lists = {
        path: [value[index] for index in kept]
        for path, value in meta.entries(trials.config)
        if isinstance(value, list)
        and len(value) == count
        and not _names_all(value)
        and "token"
        not in path.rpartition(".")[2]  # eos_token_id may name as many as there are layers
    }
    for path, value in meta.entries(trials.config):
        if meta.is_integer(value) and value == count >= 2:
            shorter = {**values, path: len(kept), **lists}
            if (trials.sizes(shorter) or {}).get(("list", name, "len")) == len(kept):
                return shorter
    return None


def _names_all(values: Sequence[Any]) -> bool:
    """Whether a list holds the number of every layer; two numbers may be flags as well."""
    numbers = len(values) > 2 and all(map(meta.is_integer, values))
    return numbers and {*values} == {*range(len(values))}


def _renumbered(
    config: PreTrainedConfig, values: Mapping[str, Any], count: int, kept: Sequence[int]
) -> Iterator[tuple[str, Any, bool]]:
    """Yield (path, value, whether it may change nothing that is countable) to try."""
    for path, value in meta.entries(config):
        if path in values:
            continue
        numbers = numbers_of_layers(path.rpartition(".")[2], value, count, kept)
        if numbers is not None:
            yield path, numbers, True
        elif meta.is_integer(value) and 0 < value <= count:
            before = sum(index < value for index in kept)
            through = sum(index <= value for index in kept) - 1
            for new in dict.fromkeys((before, through)):
                if new != value and new >= 0:
                    yield path, new, False


class _Solver:
    """Finds the value that every integer key needs for given sizes."""

    def __init__(self, trials: meta.Trials) -> None:
        self._config, self._sizes = trials.config, trials.sizes
        self.opened: list[str] = []  # keys that the dense config leaves unset, and that got a value

    def solve(self, target: meta.Sizes) -> dict[str, int] | None:
        """Return key -> value for all keys that govern a size that must change, or None.

        A size may depend on several keys (heads times head size), so keys are settled one after
        another, each from sizes in which no other unsettled key takes part.
        """
        values = self._settle_open()
        base = self._sizes(values)
        if base is None:
            return None
        found = meta.entries(meta.with_values(self._config, values))
        keys = [path for path, value in found if meta.is_integer(value) and value >= 2]
        trials = {path: next(self._trials(path, values), None) for path in keys}
        effects = {path: _moved(base, trial[2]) for path, trial in trials.items() if trial}
        changed = _moved(base, target)
        origin = dict(values)
        unsettled = [path for path in effects if effects[path] & changed]
        while unsettled:
            alone = {path: _alone(path, unsettled, effects) for path in unsettled}
            path = next((path for path in unsettled if alone[path]), unsettled[-1])
            unsettled.remove(path)
            value = self._value(path, values, alone[path], target)
            if value is None:
                # Values on the way may be refused (heads that no longer divide the hidden size);
                # the dense ones are not, and do for sizes that no other key takes part in.
                value = self._value(path, origin, _alone(path, effects, effects), target)
            if value is not None:
                values[path] = value
        return values

    def _settle_open(self) -> dict[str, int]:
        """Return values of keys that the config leaves open, such that nothing changes.

        An open key follows from another one, such as an FFN of four times the hidden size.
        """
        values: dict[str, int] = {}
        base = self._sizes({})
        if base is None:
            return values
        candidates = [path for path, value in meta.entries(self._config) if value is None]
        candidates += [
            prefix + name
            for prefix, config in meta.levels(self._config)
            for name in _CONVENTIONAL_KEYS
            if meta.has(config, name) is False
        ]
        for path in candidates:
            if path.endswith("_id"):
                continue
            first, second = (self._sizes({path: trial}) for trial in _OPTIONAL_TRIALS)
            if first is None or second is None:
                continue
            votes = _votes(_moved(first, second), first, second, base, _OPTIONAL_TRIALS)
            value = next((value for value in votes if self._sizes({path: value}) == base), None)
            if value is not None:
                values[path] = value
                self.opened.append(path)
        return values

    def _trials(self, path: str, values: dict[str, int]) -> Iterator[tuple[int, int, meta.Sizes]]:
        """Yield (value, another that can be built, the sizes that it gives) of one key."""
        current = values.get(path) or meta.get_path(self._config, path)
        # Doubling keeps divisibility, the others avoid other limits.
        for trial in (2 * current, current + 1, current // 2):
            found = self._sizes(values | {path: trial}) if trial >= 1 else None
            if found is not None:
                yield current, trial, found

    def _value(
        self, path: str, values: dict[str, int], deciding: set[Any], target: meta.Sizes
    ) -> int | None:
        """Return the value of one key that brings the deciding sizes to the target."""
        base = self._sizes(values)
        if base is None:
            return None

        def hits(value: int) -> int:
            found = self._sizes(values | {path: value}) or {}
            return sum(found.get(key) == target.get(key) for key in deciding)

        for current, trial, other in self._trials(path, values):
            votes = _votes(deciding, base, other, target, (current, trial))
            if votes:
                return max(votes, key=hits)
        return None


def _moved(one: meta.Sizes, other: meta.Sizes) -> set[Any]:
    """Return the sizes that both have, and that differ."""
    return {key for key in one if key in other and one[key] != other[key]}


def _alone(path: str, paths: Iterable[str], effects: Mapping[str, set[Any]]) -> set[Any]:
    """Return the sizes that only this one of the keys governs."""
    return effects[path].difference(*(effects[other] for other in paths if other != path))


def _votes(
    keys: Iterable[Any],
    first: meta.Sizes,
    second: meta.Sizes,
    target: meta.Sizes,
    at: tuple[int, int],
) -> list[int]:
    """Return the three integers that most sizes, linear in a key and known at two values, need."""
    votes: Counter[int] = Counter()
    for key in keys:
        a, b, t = first.get(key), second.get(key), target.get(key)
        if not (meta.is_integer(a) and meta.is_integer(b) and meta.is_integer(t)) or a == b:
            continue
        steps = (t - a) * (at[1] - at[0])
        value, rest = divmod(steps, b - a)
        if rest == 0 and at[0] + value >= 1:
            # Sizes of parameters are worth more: attributes may be quotients.
            votes[at[0] + value] += 3 if key[0] == "parameter" else 1
    return [value for value, _ in votes.most_common(3)]


def accepted(
    config: PreTrainedConfig, pruned: PreTrainedModel, target: meta.Sizes, edits: Edits
) -> PreTrainedConfig | None:
    """Return the config as loading will read it if it builds exactly the pruned model."""
    try:
        with meta.quiet_trial():
            # Unlike the trials, this validates the config, as loading does.
            found = type(config).from_dict(config.to_dict())
        config = copy.deepcopy(found)
        config._attn_implementation = pruned.config._attn_implementation
        model = meta.build_meta(type(pruned), config)
        built = meta.sizes(model)
        differing = {key for key in built | target if built.get(key) != target.get(key)}
        if any(key[0] != "attribute" for key in differing):
            return None
        for name, values in edits.attributes.items():
            module = model.get_submodule(name)
            there = ((meta.get_path(module, path), value) for path, value in values.items())
            if any(_plain(one) != _plain(value) for one, value in there):
                return None
        computed = meta.computed_buffers(model)
        # A cast model has cast its buffers too, so the comparison is in the model's precision.
        present = dict(pruned.named_buffers())
        for name, buffer in computed.items():
            if not torch.equal(present[name].cpu(), buffer.to(present[name].dtype)):
                return None
        # Modules may keep sizes that no code reads, which surgery leaves as they were. Whether
        # the numbers that differ are of that kind, running the model tells.
        if differing and not _same_function(model, pruned, differing):
            return None
    except Exception:  # any failure of code that is not ours means: not this config
        return None
    return found


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same_function(
    built: PreTrainedModel, pruned: PreTrainedModel, differing: Iterable[tuple[str, str, Any]]
) -> bool:
    """Say whether a model without weights gives the pruned model's logits with its weights.

    ``differing`` are the numbers in which both differ. The logits must be equal to the last bit.
    """
    model: Any = sharing_copy(pruned)  # whose weights may be in files
    for path, module in built.named_modules():
        names = {attribute for _, of, attribute in differing if of == path}
        own = vars(model.get_submodule(path))
        for name in names - vars(module).keys():
            del own[name]
        for name, value in vars(module).items():
            if name in names or isinstance(value, PreTrainedConfig):
                own[name] = value
    tokens = (torch.arange(16, device=pruned.device) * 7919 % embedding_rows(pruned)).view(2, 8)
    with evaluating(pruned), evaluating(model), torch.no_grad(), meta.quiet_trial():
        ours, theirs = (m(input_ids=tokens, **caching(m, False)).logits for m in (pruned, model))
    return torch.equal(ours, theirs)
