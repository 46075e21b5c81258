"""Parameters and bytes of a model, and peak memory of prefill and of decoding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_pruner.discovery.tracing.run import example_tokens
from llm_pruner.discovery.tracing.scenes import staged
from llm_pruner.models.forward import Decoder
from llm_pruner.models.layers import heaviest
from llm_pruner.types import Size


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of the weights and, on top, of all tensors that are alive at once.

    Attributes:
        prefill: while the prompt is read.
        decode: while tokens are added one by one.
        batch_size, prompt_tokens, new_tokens: the settings.
    """

    prefill: int
    decode: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int


def measure_memory(
    model: Any, *, batch_size: int = 1, prompt_tokens: int = 64, new_tokens: int = 4
) -> PeakMemory:
    """Run a prefill and decode some tokens, and return the largest sums of living tensors.

    On a GPU the allocator is asked. Elsewhere every tensor is followed from the operation that
    makes it to its end: unlike the memory of the process, the sum does not depend on what ran
    before, and leaves out what an operation uses inside.
    """
    weights = sum(
        tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]
    )
    tokens = example_tokens(model, (batch_size, prompt_tokens + new_tokens))
    follow = _on_cuda(tokens.device) if tokens.device.type == "cuda" else _by_operation()
    with staged(model), follow as peak:
        decoder = Decoder(model)
        decoder.step(tokens[:, :prompt_tokens])
        prefill = peak()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            decoder.step(tokens[:, position : position + 1])
        decode = peak()
    return PeakMemory(weights + prefill, weights + decode, batch_size, prompt_tokens, new_tokens)


Peak = Callable[[], int]
"""Returns the most bytes that were alive at once since it was last called."""


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[Peak]:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)

    def peak() -> int:
        found = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return int(found)

    yield peak


@contextmanager
def _by_operation() -> Iterator[Peak]:
    follower = _Follower()
    with follower:
        yield follower.peak


class _Follower(TorchDispatchMode):
    """Adds up the memory of the results of all operations while they live."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = 0
        self._most = 0

    def peak(self) -> int:
        found, self._most = self._most, self._now
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            # A view, or a result written in place, has the memory of what went in.
            if _has_memory(leaf) and _key(leaf) not in given:
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self._most = max(self._most, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


def _has_memory(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def model_size(model: Any) -> Size:
    """Count the parameters of a causal language model.

    The decoder layers are the module list that holds the most parameters.
    """
    layers = heaviest(one for one in model.modules() if isinstance(one, nn.ModuleList))
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return Size(
        total=_count(model),
        embedding=_count(*(head for head in heads if head is not None)),
        blocks=0 if layers is None else _count(layers),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def folder_bytes(path: str | Path) -> int:
    """Return the bytes of all files under a folder, or of one file."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _count(*modules: nn.Module) -> int:
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())
