"""Weights that stay in the checkpoint's files and are read when their block runs.

``stream_`` puts one NaN in the shape of every weight inside the blocks, so that what is read at
another time does not pass unnoticed. While a block runs, or ``turn`` holds it, its weights are
there in the type of computation, cut as surgery said; afterwards their pages are given back. So are
those of the embedding and the head. ``docs/explanation/how-it-works.md`` says more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from llm_pruner.errors import NeedsMemory
from llm_pruner.models import mapped_weights as mapped
from llm_pruner.models.forward import input_embedding
from llm_pruner.models.layers import heaviest_list, names_in_float32, own_copy, with_initialisers
from llm_pruner.models.mapped_weights import Joined, StoredWeight
from llm_pruner.types import IntArray

_SOURCES: Any = WeakIdKeyDictionary()
_ROOMS: Any = WeakIdKeyDictionary()
_held: Any = WeakIdKeyDictionary()

before_turn: ContextVar[Any] = ContextVar("before_turn", default=None)
"""What a thread calls with a block and its number before the block's weights are read."""

new_weights_in: ContextVar[Any] = ContextVar("new_weights_in", default=None)
"""The type in which new weights are kept; by default that of the weights they replace."""


def is_streamed(tensor: torch.Tensor) -> bool:
    """Whether a parameter's values are there only in its block's turn."""
    return tensor in _SOURCES


def is_model_streamed(model: nn.Module) -> bool:
    """Whether a model has such parameters."""
    return any(is_streamed(parameter) for parameter in model.parameters())


def room_for(model: nn.Module) -> int:
    """Return the bytes that the weights of a streamed model may take; 0 if nobody said."""
    return int(_ROOMS.get(model, 0))


def forget_pages(model: nn.Module) -> None:
    """Give the pages of files back that were read without a turn."""
    for parameter in model.parameters():
        if parameter in _SOURCES:
            _SOURCES[parameter].forget()


def values_of(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a parameter's values, detached, in turn or not, by default as it computes."""
    source = _SOURCES.get(parameter)
    if source is None or parameter in _held:
        return parameter.detach()
    value = source.read(dtype)
    if not source.is_view(value):
        source.forget()
    return value


@contextmanager
def stored(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a parameter's values in the type in which they are stored, for a look at a few."""
    source = _SOURCES.get(parameter)
    yield parameter.detach() if source is None else source.stored
    if source is not None:
        source.forget()


def in_turns(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model in memory that shares its weights and casts them block by block."""
    memo: dict[int, Any] = {id(one): one.detach() for one in model.buffers()}
    for one in model.parameters():
        memo[id(one)] = nn.Parameter(one.detach(), one.requires_grad)
    device = next(model.parameters()).device
    copy = own_copy(model, memo)
    stream_(copy, dtype, device)
    return copy


def stream_(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    room: int = 0,
    *,
    folder: Path | None = None,
) -> None:
    """Have weights read whenever their block, embedding or head runs; cast others to ``dtype``.

    What transformers has in float32 where a model is of that type stays in it.

    Args:
        model: loaded on the CPU in the type of its files, so that its weights are mapped.
        dtype: of computation.
        device: where it is computed.
        room: bytes that the weights may take; see ``room_for``.
        folder: that holds its files; None for a model in memory.

    Raises:
        NeedsMemory: the model has no list of blocks, or holds computed numbers that the stored type
            has rounded.
    """
    device = torch.device(device)
    blocks = heaviest_list(model)
    if blocks is None:
        raise NeedsMemory(
            f"{type(model).__name__} has no list of blocks, so its weights cannot be read block by "
            "block"
        )
    ranges = mapped.mapped_files(folder) if folder is not None else []
    there = next(one.dtype for one in model.parameters() if one.is_floating_point())
    exact = {}
    if folder is not None and torch.promote_types(dtype, there) != there:
        exact = mapped.wider_values(model, folder, there)
    _compute_anew_(model, dtype)
    values, wide = exact | _set_apart_(model), _wide(model, dtype)
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))

    def source_of(tensor: torch.Tensor) -> StoredWeight:
        stored = values.get(id(tensor), tensor).detach()
        kind = torch.float32 if id(tensor) in wide else dtype
        return StoredWeight(stored, kind, device, mapped.are_mapped(stored, ranges))

    for number, block in enumerate(blocks):
        inside = [one for _, one in block.named_parameters(remove_duplicate=False)]
        within = Counter(map(id, inside))
        for parameter in {id(one): one for one in inside}.values():
            if within[id(parameter)] == uses[id(parameter)] and parameter.is_floating_point():
                _adopt(parameter, source_of(parameter))
        run = partial(_in_turn, block, number, block.forward)
        block.forward = update_wrapper(run, block.forward)
    for end in _ends(model, uses, dtype if device.type == "cpu" else None):
        for parameter in end.parameters():
            if not is_streamed(parameter):
                _adopt(parameter, replace(source_of(parameter), tied=uses[id(parameter)] > 1))
        run = partial(_end_in_turn, end, len(blocks), end.forward)
        end.forward = update_wrapper(run, end.forward)
    for tensor in (*model.parameters(), *model.buffers()):
        if is_streamed(tensor):
            _SOURCES[tensor].forget()
        elif tensor.is_floating_point():
            source = source_of(tensor)
            tensor.data = source.read()
            if not source.is_view(tensor):
                source.forget()
        else:
            tensor.data = tensor.data.to(device)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.dtype = dtype
    _ROOMS[model] = room


def _ends(model: Any, uses: Mapping[int, int], widened: torch.dtype | None) -> list[nn.Module]:
    """Return the embedding and the head, where nothing else uses their weights.

    ``uses`` counts the modules that hold a parameter, by id. The embedding stays in memory unless
    its rows can be read from the mapped file and ``widened`` to the type of computation.
    """
    table, head = input_embedding(model), getattr(model, "get_output_embeddings", lambda: None)()
    found: list[nn.Module] = [head] if isinstance(head, nn.Linear) else []
    if type(table) is nn.Embedding and table.max_norm is None and widened is not None:
        found += [table] if torch.promote_types(table.weight.dtype, widened) == widened else []
    held = Counter(id(one) for end in found for one in end.parameters())
    lone = [end for end in found if all(uses[id(one)] == held[id(one)] for one in end.parameters())]
    # Ends that share a weight are both read for each call, or neither is.
    tied = len(held) < sum(held.values())
    return lone if not tied or len(lone) == len(found) else []


def _set_apart_(model: nn.Module) -> dict[int, torch.Tensor]:
    """Put plain tensors in place of ``Joined`` ones; return id of the new -> the joined one."""
    new: dict[int, nn.Parameter] = {}
    noted: dict[int, torch.Tensor] = {}
    for module in model.modules():
        parameters: dict[str, Any] = module._parameters
        for key, old in parameters.items():
            if isinstance(old, Joined):
                shape = torch.full((), torch.nan, dtype=old.dtype, device="cpu").expand(old.shape)
                one = new.setdefault(id(old), nn.Parameter(shape, old.requires_grad))
                parameters[key] = one
                noted[id(one)] = old
        buffers: dict[str, Any] = module._buffers
        buffers |= {
            key: mapped.whole(one) for key, one in buffers.items() if isinstance(one, Joined)
        }
    return noted


def _wide(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """Return the ids of the tensors that stay in float32 where a model is of ``dtype``."""
    saved, named = model.state_dict(keep_vars=True), names_in_float32(model, dtype)
    found = {id(saved[name]) for name in named}
    if torch.promote_types(dtype, torch.float32) == torch.float32:
        sizes: Counter[torch.dtype] = Counter()
        for one in model.parameters():
            sizes[one.dtype] += one.numel()
        kept = [buffer for name, buffer in model.named_buffers() if name not in saved]
        if sizes.most_common(1)[0][0] != torch.float32:
            kept += model.parameters()
        found |= {id(one) for one in kept if one.dtype == torch.float32}
    return found


def ends_of(model: nn.Module) -> list[nn.Module]:
    """Return the embedding and head that are read for each call, heads first.

    A gradient passes them while their ``turn`` is held.
    """
    found = (one for one in model.modules() if getattr(one.forward, "func", None) is _end_in_turn)
    return sorted(found, key=lambda one: isinstance(one, nn.Embedding))


def _compute_anew_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give buffers that no file holds the values of type ``dtype``; NeedsMemory if unknown."""
    for path, module, initialise in with_initialisers(model):
        buffers: dict[str, Any] = module._buffers
        narrow = [
            name
            for name in module._non_persistent_buffers_set
            if (one := buffers.get(name)) is not None
            and one.is_floating_point()
            and torch.promote_types(one.dtype, dtype) != one.dtype
        ]
        if not narrow:
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = True
        for name in narrow:
            buffers[name] = torch.full_like(buffers[name], torch.nan, dtype=dtype)
        if initialise is not None:
            with torch.no_grad():
                initialise(module)
        for name in narrow:
            if buffers[name].isnan().any():
                where = f"{path}.{name}".removeprefix(".")
                raise NeedsMemory(
                    f"{where} of {type(model).__name__} is computed in the type of the weights, "
                    "so they cannot be read block by block"
                )


def _in_turn(block: nn.Module, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    waits = before_turn.get()
    if waits is not None:
        waits(block, number)
    token = before_turn.set(None)  # for a block in a block
    try:
        with turn(block):
            return forward(*args, **kwargs)
    finally:
        before_turn.reset(token)


def _end_in_turn(end: nn.Module, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a head as the block behind all others, or an embedding, which waits for none."""
    source: StoredWeight | None = _SOURCES.get(end.weight)
    if not isinstance(end, nn.Embedding):
        if source is not None and args and args[0].dtype == torch.float64 != source.dtype:
            args = (args[0].to(source.dtype), *args[1:])
        return _in_turn(end, number, forward, *args, **kwargs)
    if source is None:
        return forward(*args, **kwargs)
    # Rows are looked up where they lie, unless a trace has to see the cut table.
    columns = all(dim == 1 for dim, _, _ in source.changes) and _reads_rows(end, source)
    if columns and end.weight not in _held and _get_current_dispatch_mode() is None:
        found = source.rows(*args, **kwargs)
        source.forget()
    else:
        with turn(end):
            found = forward(*args, **kwargs)
    return found.to(source.dtype)


def _adopt(parameter: nn.Parameter, source: StoredWeight) -> None:
    _SOURCES[parameter] = source
    parameter.data = source.stand_in()


@contextmanager
def turn(*blocks: nn.Module) -> Iterator[None]:
    """Inside, the weights of these blocks are there, for a backward pass too."""
    places = [
        (module, key, parameter)
        for block in blocks
        for module in block.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter in _SOURCES and parameter not in _held
    ]
    stand_ins = []
    types = [_type_in_turn(module, _SOURCES[parameter]) for module, _, parameter in places]
    try:
        with _undisturbed_by_modes():
            for (_, _, parameter), kind in zip(places, types, strict=True):
                if parameter not in _held:
                    values = values_of(parameter, kind)  # of which the memory may be too full
                    stand_ins.append((parameter, parameter.data))
                    parameter.data = values
                    _held[parameter] = True
        yield
    finally:
        if stand_ins:
            torch.clear_autocast_cache()  # of the weights in bfloat16
        with _undisturbed_by_modes():
            for parameter, stand_in in stand_ins:
                _held.pop(parameter, None)
                parameter.data = stand_in
                _SOURCES[parameter].forget()
            for module, key, before in places:
                now = module._parameters.get(key)
                if now is not None and now is not before and now not in _SOURCES:
                    source = _SOURCES[before]
                    kind = new_weights_in.get() or source.stored.dtype
                    stored, in_file = mapped.filed(now.data.to("cpu", kind))
                    _adopt(now, replace(source, stored=stored, mapped=in_file, changes=()))


def _type_in_turn(module: nn.Module, source: StoredWeight) -> torch.dtype:
    """Return the stored type if autocast would cast to it, or a few rows are read and widened."""
    on = source.device.type
    narrowed = (
        type(module) is nn.Linear
        and not (source.tied and _wants_gradient(module))
        and torch.is_autocast_enabled(on)
        and torch.get_autocast_dtype(on) == source.stored.dtype
    )
    return source.stored.dtype if narrowed or _reads_rows(module, source) else source.dtype


def _reads_rows(module: nn.Module, source: StoredWeight) -> bool:
    narrow = torch.promote_types(source.stored.dtype, source.dtype) == source.dtype
    return type(module) is nn.Embedding and narrow and not _wants_gradient(module)


def _wants_gradient(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in module.parameters())


@contextmanager
def _undisturbed_by_modes() -> Iterator[None]:
    """Reading weights is nothing that a trace is to see, nor a gradient to pass."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def cut_parameter(parameter: torch.Tensor, kept: Mapping[int, IntArray]) -> nn.Parameter:
    """Return a streamed parameter with only the ``kept`` positions of its axes."""
    source = _SOURCES[parameter]
    changes = tuple((dim, torch.from_numpy(positions), True) for dim, positions in kept.items())
    new = nn.Parameter(
        torch.empty(0, dtype=source.dtype, device="cpu"), requires_grad=parameter.requires_grad
    )
    _adopt(new, replace(source, changes=source.changes + changes))
    return new


@contextmanager
def zeroed(parameter: torch.Tensor, dim: int, positions: torch.Tensor) -> Iterator[None]:
    """Inside, positions of a streamed parameter are read as zero."""
    source = _SOURCES[parameter]
    _SOURCES[parameter] = replace(source, changes=(*source.changes, (dim, positions, False)))
    try:
        yield
    finally:
        _SOURCES[parameter] = source


def keep_dtype_(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Have a streamed parameter computed in ``dtype``; return whether it is streamed."""
    source = _SOURCES.get(parameter)
    if source is None:
        return False
    _SOURCES[parameter] = replace(source, dtype=dtype)
    parameter.data = _SOURCES[parameter].stand_in()
    return True


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a streamed model and copies that share its tensors compute in another type."""
    with as_before(model):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not keep_dtype_(tensor, dtype):
                tensor.data = tensor.data.to(dtype)
        yield


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Give a model, streamed or not, the values and types that it has back afterwards."""
    tensors = (*model.parameters(), *model.buffers())
    before = [(one, _SOURCES.get(one), one.data) for one in tensors]
    try:
        yield
    finally:
        for tensor, source, data in before:
            if source is not None:
                _SOURCES[tensor] = source
            tensor.data = data


@contextmanager
def saved_by_shard(model: Any) -> Iterator[dict[str, torch.Tensor] | None]:
    """Yield a state dict from which ``save_pretrained`` reads one shard's weights at a time.

    None if the model is not streamed. For it the model looks like one that a device map has put on
    the disk.
    """
    state = model.state_dict(keep_vars=True)
    if not any(is_streamed(tensor) for tensor in state.values()):
        yield None
        return
    before = vars(model).get("hf_device_map"), vars(model).get("_hf_hook")
    model.hf_device_map, model._hf_hook = {"": "disk"}, _Reader(state)
    try:
        yield {
            name: torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
            if is_streamed(tensor)
            else tensor.detach()
            for name, tensor in state.items()
        }
    finally:
        for name, value in zip(("hf_device_map", "_hf_hook"), before, strict=True):
            if value is None:
                delattr(model, name)
            else:
                setattr(model, name, value)


class _Reader:
    """What ``save_pretrained`` takes for the hook of an offloaded model."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state
        self.weights_map = self

    def __getitem__(self, name: str) -> torch.Tensor:
        source = _SOURCES[self._state[name]]
        value = source.read() if source.changes else source.copied(source.dtype)
        return value.cpu().contiguous()
