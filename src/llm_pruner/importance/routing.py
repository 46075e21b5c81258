"""What a router sends to each expert, and how much comes back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.gradients import batches
from llm_pruner.runtime.progress import track
from llm_pruner.types import FloatArray, Group

_TOKENS = 2048


def observe_routing(
    model: nn.Module, input_ids: torch.Tensor, groups: Sequence[Group]
) -> dict[str, FloatArray]:
    """Return group -> mean norm of what each expert adds, over the tokens that are sent to it.

    The values have shape (experts,); an expert that no token is sent to has 0. Experts are the
    modules that hold a group's fused tensors; they are called with hidden states (tokens, hidden),
    the indices and the weights of the chosen experts, both (tokens, top_k), as all mixtures of
    current ``transformers`` do. Each expert is run once more on its own tokens alone.

    Args:
        model: in eval mode.
        input_ids: shape (samples, seq_len), on the model's device.
        groups: of kind ``experts``.

    Raises:
        UserError: experts that are not called so.
    """
    watches = {group.name: _Watch(group.name, group.size) for group in groups}
    modules = {group.name: _owner(group) for group in groups}
    with _listening(model, modules, watches), torch.no_grad():
        size = max(1, _TOKENS // input_ids.shape[1])
        for part in track(batches(len(input_ids), size), "routing"):
            model(input_ids[part])
    return {name: watch.mean() for name, watch in watches.items()}


def _owner(group: Group) -> str:
    """Return the module that holds the tensors which execute last."""
    members = [member for member in group.members if not member.buffer]
    last = max(members, key=lambda member: member.order)
    return last.tensor.rpartition(".")[0]


@contextmanager
def _listening(
    model: nn.Module, modules: Mapping[str, str], watches: Mapping[str, _Watch]
) -> Iterator[None]:
    handles = [
        model.get_submodule(path).register_forward_pre_hook(watches[name].see, with_kwargs=True)
        for name, path in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Sums of norms for the experts of one group."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._norms: FloatArray = np.zeros(size)
        self._tokens: FloatArray = np.zeros(size)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        hidden, index, weights = self._routed(list(given.values()))
        for expert in index.unique().tolist():
            if not 0 <= expert < len(self._norms):
                continue  # some mixtures pad with the number of experts
            chosen = index == expert
            rows = chosen.any(1)
            weight = (weights * chosen).sum(1, keepdim=True)[rows]
            only = torch.full_like(index[rows][:, :1], expert)
            added = module.forward(hidden[rows], only, weight)
            self._norms[expert] += float(added.float().norm(dim=-1).double().sum())
            self._tokens[expert] += int(rows.sum())

    def _routed(self, given: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states, indices and weights of a call."""
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        whole = [value for value in tensors if not value.is_floating_point()]
        if len(tensors) == len(given) == 3 and len(whole) == 1:
            (index,) = whole
            hidden, weights = (value for value in tensors if value is not index)
            if index.shape == weights.shape and index.ndim == hidden.ndim == 2:
                return hidden, index, weights
        raise UserError(
            f"{self._name} are not called with the indices and weights of the chosen experts, so "
            "what each adds is unknown; use the criterion fisher, gate or taylor"
        )

    def mean(self) -> FloatArray:
        """Return the mean norm per expert, shape (experts,)."""
        found: FloatArray = self._norms / np.maximum(self._tokens, 1)
        return found
