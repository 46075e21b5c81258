"""Layers that are taken out of module lists, and what numbers or lists those that stay."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from llm_pruner.models.modeling_pruned import set_own_
from llm_pruner.types import Edits

_NUMBER_NAME = re.compile("idx|index|layer")

NUMBERS_LAYERS = re.compile("layer|idx|index|indices|block")

_COUNT_NAME = re.compile("(n|num)_(hidden_)?(layers?|blocks?)")


def sharing_copy(model: nn.Module, *, buffers: bool = True) -> nn.Module:
    """Return a copy of a model that shares its tensors; without ``buffers``, parameters alone."""
    weights = {id(one): one for one in model.parameters()}
    others = [one for one in tensors_of(model) if id(one) not in weights]
    memo = {id(one): one if buffers else one.detach().clone() for one in others}
    return own_copy(model, memo | weights)


def own_copy(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy whose modules hold functions of their own; ``memo`` as in ``deepcopy``.

    ``copy.deepcopy`` keeps functions as they are, so ``lambda x: x @ self.embedding.weight.T`` in a
    copy would read the weights of the original.
    """
    memo = {} if memo is None else memo
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in [*vars(module).items()]:
            if isinstance(value, FunctionType) and value.__closure__:
                vars(module)[name] = _bound_anew(value, memo)
    return copied


def _bound_anew(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    """Return a function that reads copies in place of the modules that were copied."""
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            if isinstance(cell.cell_contents, nn.Module):
                cell = CellType(memo.get(id(cell.cell_contents), cell.cell_contents))
        cells.append(cell)
    bound = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    vars(bound).update(vars(function))
    return bound


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers and the tensors that modules hold otherwise, in lists and such."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            yield from held_in(value, torch.Tensor)


def held_in(value: Any, kind: type, depth: int = 3) -> Iterator[Any]:
    """Yield what is of a type in a value, in lists, dictionaries and such; no truth values."""
    if isinstance(value, kind) and not isinstance(value, bool):
        yield value
    elif depth and isinstance(value, Mapping | tuple | list | set | frozenset):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from held_in(one, kind, depth - 1)


def with_initialisers(
    model: nn.Module,
) -> Iterator[tuple[str, Any, Callable[[nn.Module], object] | None]]:
    """Yield the path of each module, the module, and the ``_init_weights`` that holds for it."""
    ways: dict[str, Callable[[nn.Module], object] | None] = {}
    for path, module in model.named_modules():
        above = ways.get(path.rpartition(".")[0])
        ways[path] = getattr(module, "_init_weights", above)
        yield path, module, ways[path]


def names_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the tensors, such as those of routers, that stay in float32 in a model of a type."""
    plan = model._get_dtype_plan(dtype) if isinstance(model, PreTrainedModel) else {}
    if not plan:
        return set()
    pattern, *_ = build_glob_alternation([*plan])
    return {name for name in model.state_dict(keep_vars=True) if pattern.search(name)}


def without_layers(model: nn.Module, path: str, gone: Sequence[int]) -> nn.Module:
    """Return a copy without some children of a module list; it shares the tensors."""
    smaller = sharing_copy(model)
    kept = kept_layers(model, [f"{path}.{index}" for index in gone])
    numbers = [*layer_numbers(model, kept)]
    apply_layers(smaller, kept)
    for module, attribute, value in numbers:
        set_own_(smaller.get_submodule(module), attribute, value)
    return smaller


def kept_layers(model: nn.Module, gone: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return module list -> indices of the children that stay, for each list that loses some."""
    lost: dict[str, set[int]] = defaultdict(set)
    for name in gone:
        path, _, index = name.rpartition(".")
        lost[path].add(int(index))
    return {
        path: tuple(i for i in range(len(model.get_submodule(path)._modules)) if i not in indices)
        for path, indices in lost.items()
    }


def apply_layers(model: nn.Module, layers: Mapping[str, Sequence[int]]) -> None:
    """Keep only the given children of module lists, and adapt the settings.

    The settings are the model's own copies from then on. A list with one entry per layer keeps the
    entries of the layers that stay, unless it is one of token ids.
    """
    settings = {id(config) for config in configs_of(model)}
    memo: dict[int, Any] = {}  # what modules share stays shared
    for module in model.modules() if layers else ():
        held = {key: value for key, value in vars(module).items() if id(value) in settings}
        vars(module).update(copy.deepcopy(held, memo))
    for path, kept in layers.items():
        count = keep_children(model, path, kept)
        for config in configs_of(model):
            _filter_config(config, count, kept)


def is_layer_list(module: nn.Module) -> TypeGuard[nn.ModuleList]:
    """Whether a module may hold layers: a module list, or a sequence of blocks of one class."""
    if type(module) is not nn.Sequential:
        return isinstance(module, nn.ModuleList)
    children = [*module]
    return len({*map(type, children)}) == 1 < len(children) and all(
        any(True for _ in child.children()) for child in children
    )


def heaviest_list(model: nn.Module) -> nn.ModuleList | None:
    """Return the list of layers with the most parameters: the decoder layers; None if none."""
    return heaviest(filter(is_layer_list, model.modules()))


def keep_children(model: nn.Module, path: str, kept: Sequence[int]) -> int:
    """Keep only the given children of a module list; return how many it had."""
    children: Any = model.get_submodule(path)
    shorter = copy.copy(children)
    shorter._modules = {str(new): children._modules[str(old)] for new, old in enumerate(kept)}
    for module in [*model.modules()]:  # which may hold the list under several names
        for name, child in [*module._modules.items()]:
            if child is children:
                module._modules[name] = shorter
    return len(children)


def heaviest(lists: Iterable[nn.ModuleList]) -> nn.ModuleList | None:
    """Return the list with the most parameters, None if there is none."""
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)


def set_attributes_(model: nn.Module, edits: Edits) -> None:
    """Set module attributes; a dotted one is set on the module's own copy of that object."""
    for name, values in edits.attributes.items():
        module = model.get_submodule(name)
        for path, value in values.items():
            set_own_(module, path, value)


class Renaming:
    """Names of tensors and modules after layers were removed and the rest renumbered."""

    def __init__(self, kept: Mapping[str, Sequence[int]]) -> None:
        self._places = [
            (
                path,
                re.compile(re.escape(path) + r"\.(\d+)(?=\.|$)"),
                {old: new for new, old in enumerate(indices)},
            )
            for path, indices in kept.items()
        ]

    def __call__(self, name: str) -> str | None:
        """Return the new name; None if what it names is gone with its layer."""
        for path, pattern, places in self._places:
            match = pattern.match(name)
            if match:
                new = places.get(int(match[1]))
                return None if new is None else f"{path}.{new}{name[match.end() :]}"
        return name


def numbering(
    model: nn.Module, path: str, count: int
) -> dict[tuple[str, str], tuple[int, dict[int, int]]]:
    """Return (module inside a layer, attribute) -> (step, layer -> number), if it numbers them."""
    present: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    children: Mapping[str, nn.Module | None] = model.get_submodule(path)._modules
    for i, child in ((int(name), child) for name, child in children.items() if child is not None):
        for inner, module in child.named_modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    present[inner, key][i] = value
    steps = {name: _step(name[1], values, count) for name, values in present.items()}
    return {name: (step, present[name]) for name, step in steps.items() if step is not None}


def layer_numbers(
    model: nn.Module,
    layers: Mapping[str, Sequence[int]],
    keep: Collection[tuple[str, str, str]] = (),
) -> Iterator[tuple[str, str, int | tuple[int, ...]]]:
    """Yield (module, attribute, new value) for attributes that number or count the layers.

    Args:
        model: before the removal; modules are named as they will be after it.
        keep: (list, module inside a layer, attribute) of numbers that stay what they are.
    """
    for path, kept in layers.items():
        count, holder = len(model.get_submodule(path)._modules), path.rpartition(".")[0]
        for above in _above(path):
            for key in _counts(model.get_submodule(above), count):
                if above == holder or not _counts_another(model, above, count, layers):
                    yield above, key, len(kept)
        for key, value in vars(model.get_submodule(holder)).items():
            numbers = numbers_of_layers(key, value, count, kept)
            if numbers is not None:
                yield holder, key, tuple(numbers)
        for (inner, key), (step, values) in numbering(model, path, count).items():
            if (path, inner, key) in keep:
                continue
            for new, old in enumerate(kept):
                if old in values and new != old:
                    module = f"{path}.{new}.{inner}" if inner else f"{path}.{new}"
                    yield module, key, values[old] - step * (old - new)


def _above(path: str) -> Iterator[str]:
    """Yield the names of the modules around one, from within."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _counts(module: nn.Module, count: int) -> Iterator[str]:
    """Yield the attributes of a module that say a number of layers, and of settings it holds."""
    for name, value in vars(module).items():
        numbers = {name: value}
        if is_settings(name, value) and getattr(value, "num_hidden_layers", None) != count:
            numbers = {f"{name}.{key}": one for key, one in vars(value).items()}
        for key, one in numbers.items():
            if type(one) is int and one == count and _COUNT_NAME.fullmatch(key.rpartition(".")[2]):
                yield key


def _counts_another(model: nn.Module, above: str, count: int, layers: Collection[str]) -> bool:
    """Whether a number of layers may be that of a list that loses none, of as many."""
    inside = tuple(f"{path}." for path in layers)
    return any(
        is_layer_list(module) and len(module) == count
        for name, module in model.get_submodule(above).named_modules(prefix=above)
        if name not in layers and not name.startswith(inside)
    )


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


def is_settings(key: str, value: object) -> bool:
    """Whether a module attribute is a bag of settings: what surgery sets numbers of."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | torch.Tensor | type | ModuleType)
        and not callable(value)
        and key != "generation_config"
        and (
            isinstance(value, PreTrainedConfig)
            or key.lower().strip("_").endswith(("config", "cfg", "args", "hparams"))
        )
    )


def has_recipe(config: Any) -> bool:
    """Whether a config holds the recipe of a pruned model whose layers differ."""
    return isinstance(getattr(config, "pruned", None), dict)


def configs_of(model: nn.Module) -> list[Any]:
    """Return the settings that modules hold under ``config``, with those of a text model."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        for one in (config, getattr(config, "text_config", None)):
            if hasattr(one, "__dict__"):
                found[id(one)] = one
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
    except AttributeError:  # a property without a setter, of another number
        for key, value in list(vars(config).items()):
            if value == count and type(value) is int:
                setattr(config, key, len(kept))
                if config.num_hidden_layers == len(kept):
                    break
                setattr(config, key, value)
    for key, value in list(vars(config).items()):
        if "token" in key:
            continue
        left: Iterable[Any] | None = numbers_of_layers(key, value, count, kept)
        if left is None and isinstance(value, list | tuple) and len(value) == count:
            left = (value[i] for i in kept)
        if left is not None:
            # Of such a form by chance, if the config refuses a shorter one.
            with suppress(StrictDataclassError):
                setattr(config, key, type(value)(left))


def numbers_of_layers(key: str, value: object, count: int, kept: Sequence[int]) -> list[int] | None:
    """Return the new numbers of a setting that names layers by number; None if it does not."""
    if (
        not isinstance(value, list | tuple)
        or not value
        or any(type(one) is not int for one in value)
    ):
        return None
    every = len(value) == count > 2  # two numbers may be flags as well
    named = every or (len(value) < count and NUMBERS_LAYERS.search(key) is not None)
    if not named or len({*value}) < len(value) or min(value) < 0 or max(value) >= count:
        return None
    place = {old: new for new, old in enumerate(kept)}
    return [place[one] for one in value if one in place]
