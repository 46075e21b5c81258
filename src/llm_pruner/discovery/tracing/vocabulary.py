"""How many token ids a model takes: what the ids index is watched, whatever its type or name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_pruner.discovery.tracing.ghosts import GhostRunner, ghosts_of
from llm_pruner.discovery.tracing.ops import operation, tensors_in
from llm_pruner.discovery.tracing.scenes import staged
from llm_pruner.discovery.tracing.stand_ins import in_sight
from llm_pruner.discovery.tracing.tracer import Marks
from llm_pruner.errors import DiscoveryError
from llm_pruner.models.forward import is_on_meta

_known: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class _Watch(TorchDispatchMode):
    """Notes the sizes of the axes that token ids index; products need no true values for that."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._count = tokens.numel()
        self._ids = Marks()
        self._ids[tokens] = True
        self._ghosts = GhostRunner() if tokens.device.type == "cpu" else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = operation(func)
        for size, index in _lookups(known.name, known.given(args, kwargs)):
            if index in self._ids:
                # The ids are 0 and 1, so a larger index tells of an offset.
                self.sizes.append(size - int(index.max()) + 1)
        if self._ghosts is None:
            out = func(*args, **kwargs)
        else:
            out = self._ghosts.run(func, args, kwargs, lambda f, a, k: f(*a, **k))
        followed = known.op.moves or known.op.keeps_ids
        if followed and any(tensor in self._ids for tensor in tensors_in(args)):
            for result in tensors_in([out]):
                alike = known.op.moves or result.numel() == self._count
                if result.dtype in (torch.int64, torch.int32) and alike:
                    self._ids[result] = True
        return out


def _lookups(name: str, given: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (size of the axis that is indexed, index)."""
    table: Any = given.get("self")
    if "weight" in given and "indices" in given:  # embedding, _embedding_bag and the like
        yield given["weight"].shape[0], given["indices"]
    elif name == "index":
        for size, index in zip(table.shape, given["indices"], strict=False):
            if index is not None:
                yield size, index
    elif "dim" in given and isinstance(given.get("index"), torch.Tensor) and table.dim():
        yield table.shape[given["dim"]], given["index"]
    elif name == "eq" and isinstance(given["other"], torch.Tensor) and given["other"].dim():
        # Compared with all ids there are, as one_hot does.
        yield given["other"].shape[-1], table


def find_vocabulary_size(
    model: nn.Module, run: Callable[[nn.Module, torch.Tensor], object], device: torch.device
) -> int:
    """Return how many token ids a model takes: the least size of all tables that ids index.

    The model is run on the ids 0 and 1, which every vocabulary has.

    Args:
        run: how the model is run on token ids (batch, sequence).
        device: where it takes them.

    Raises:
        DiscoveryError: no ids index anything.
    """
    if model in _known:
        return _known[model]
    tokens = (torch.arange(16) % 2).view(2, 8)
    failure: Exception | None = None
    with ghosts_of(model) if is_on_meta(model) else nullcontext():
        tokens = tokens if device.type == "meta" else tokens.to(device)
        watch = _Watch(tokens)
        try:
            with staged(model, contents=True), in_sight(model), watch:
                run(model, tokens)
        except Exception as error:  # what was seen until then may be enough
            failure = error
    sizes = [size for size in watch.sizes if size > 1]
    if not sizes:
        cause = f" (running it raised {type(failure).__name__}: {failure})" if failure else ""
        raise DiscoveryError(
            f"the model has no token embedding: {type(model).__name__} looks its token ids up in "
            f"no table{cause}; give one that maps token ids to logits"
        )
    _known[model] = min(sizes)
    return _known[model]
