"""The embeddings and heads whose weights nothing but they themselves use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from llm_pruner.models.layers import own_copy, tensors_of
from llm_pruner.runtime.progress import quiet


def lone_ends(
    model: nn.Module, blocks: nn.ModuleList, widened: torch.dtype | None
) -> tuple[list[nn.Module], set[int]]:
    """Return the embeddings and heads to be read when called, and the weights that cannot be.

    An embedding is one that does nothing but look up, a head a linear module that runs behind the
    blocks: what runs before them runs again for each block and sample. The ids are those of weights
    that are used while none of these and no block runs, as in ``hidden @ embedding.weight.T``.

    Args:
        widened: type of computation, if rows can be read where the file is mapped, as on the CPU
            alone. Embeddings stay in memory else, and where it is narrower than theirs.
    """
    within = {id(one) for one in blocks.modules()}
    ends = [
        one
        for one in model.modules()
        if (isinstance(one, nn.Linear) or _only_looks_up(one, widened))
        and id(one) not in within
        and all(weight.is_floating_point() for weight in one.parameters())
    ]
    memo: dict[int, Any] = {id(one): _shape_of(one) for one in tensors_of(model)}
    watch = _Watch({id(memo[id(one)]): id(one) for one in model.parameters()})
    try:
        with torch.no_grad(), quiet("transformers"), watch:
            network = own_copy(model, memo)
            for module in (*ends, *blocks):
                if isinstance(module, nn.Linear) and id(module) not in within:
                    memo[id(module)].register_forward_pre_hook(watch.meets_head)
                memo[id(module)].register_forward_pre_hook(watch.enters)
                memo[id(module)].register_forward_hook(watch.leaves)
            memo[id(blocks[-1])].register_forward_hook(watch.passes)
            network(torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    except Exception:  # any, of code that is not ours
        return [], set()
    elsewhere = watch.elsewhere
    alone = [end for end in ends if elsewhere.isdisjoint(map(id, end.parameters()))]
    return alone, elsewhere


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


class _Watch(TorchFunctionMode):
    """Runs a model on shapes alone, and notes the weights that are used out of turn.

    Args:
        weights: id of a tensor -> what it is noted as.

    Attributes:
        elsewhere: what was noted.
    """

    def __init__(self, weights: Mapping[int, int]) -> None:
        super().__init__()
        self._weights, self._inside, self._behind = weights, 0, False
        self.elsewhere: set[int] = set()

    def meets_head(self, module: nn.Module, *_: Any) -> None:
        if not self._behind:
            self._note(module.parameters())

    def enters(self, *_: Any) -> None:
        self._inside += 1

    def leaves(self, *_: Any) -> None:
        self._inside -= 1

    def passes(self, *_: Any) -> None:
        self._behind = True

    def _note(self, tensors: Iterable[Any]) -> None:
        self.elsewhere |= {self._weights[id(one)] for one in tensors if id(one) in self._weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKS_VALUE:  # as whether a token is padding
            return False
        if not (self._inside or _asks_form(func)):
            self._note(tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


_ASKS_VALUE = (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__contains__)
"""What shapes alone do not tell. Where the answer decides that a weight is used out of turn, the
model is NaN there, and the comparison with the twin refuses it."""


def _asks_form(func: Any) -> bool:
    """Whether a function is an attribute of a tensor that says nothing of its values."""
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    return getattr(func, "__name__", "") == "__get__" and name not in ("data", "T", "mT", "H", "mH")


def _only_looks_up(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether a module does nothing but read rows, which may be widened to a type."""
    if type(module) is not nn.Embedding or module.max_norm is not None or dtype is None:
        return False
    return torch.promote_types(module.weight.dtype, dtype) == dtype
