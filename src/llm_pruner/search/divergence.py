"""How far a model's logits are from the dense model's, on held-out text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner.models.activation_store import Borders
from llm_pruner.models.blockwise import (
    Call,
    Chain,
    NotBlockwise,
    find_chain,
    hidden_of,
    with_hidden,
)
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.logits import run_for_logits
from llm_pruner.models.undisturbed import undisturbed
from llm_pruner.surgery.cut import prune_
from llm_pruner.surgery.removal import removed_modules, removed_positions
from llm_pruner.types import Discovery, Removal

_LOG = logging.getLogger(__name__)
_BUDGET = 2**27
_ROWS = 64
"""Tokens whose logits are compared at a time."""


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return float16 on the CPU, shape (tokens, vocabulary) as the logits."""
    found = torch.empty(logits.shape, dtype=torch.float16)
    for rows, values in zip(found.split(_ROWS), logits.split(_ROWS), strict=True):
        rows.copy_(values.float().log_softmax(-1))
    return found


def divergences(
    dense: nn.Module, networks: Sequence[nn.Module], held_out: torch.Tensor
) -> list[float]:
    """Return for each network the mean over tokens of KL(dense || network) in nats.

    The logits of one sample at a time are held.
    """
    totals = [0.0] * len(networks)
    for ids in held_out.split(1):
        judge = Judge(dense, ids)
        totals = [total + judge.of(one) for total, one in zip(totals, networks, strict=True)]
    return [total / len(held_out) for total in totals]


class Judge:
    """Measures the divergence from a dense model, also of removals carried out on copies of it.

    Args:
        model: the dense model; left as it was.
        held_out: token ids, shape (samples, seq_len), on which the logits are compared.
        resume: keep the dense hidden states between blocks, so that a trial that leaves the first
            blocks alone runs only the others; where the model is no chain of blocks, or no such
            trial, all of it runs.
    """

    def __init__(self, model: nn.Module, held_out: torch.Tensor, *, resume: bool = False) -> None:
        self._model = model
        self._ids = held_out.to(next(model.parameters()).device, torch.long)
        self._chain: Chain | None = None
        self._names: list[str] = []
        self._entries: Borders | None = None
        if resume:
            self._find_chain()
        with undisturbed(model), torch.no_grad():
            # Half the memory of float32; what is lost is far below any damage of interest.
            self._dense = [
                _log_probabilities(self._dense_logits(index)) for index in range(len(self._ids))
            ]

    def of(self, network: nn.Module) -> float:
        """Return the mean over tokens of KL(dense || network) in nats."""
        return self._divergence(network, 0, ())

    def of_removal(self, discovery: Discovery, removal: Removal) -> float:
        """Return the same of a copy that shares the weights and is pruned."""
        network = sharing_copy(self._model)
        first = self._first_changed(discovery, removal)
        blocks = [network.get_submodule(name) for name in self._names[: first + 1]]
        prune_(network, discovery, removal)
        return self._divergence(network, first, blocks)

    def _divergence(self, network: nn.Module, first: int, blocks: Sequence[nn.Module]) -> float:
        total = 0.0
        with undisturbed(network), torch.no_grad():
            for index, dense in enumerate(self._dense):
                logits = self._logits(network, index, first, blocks)
                for start in range(0, len(logits), _ROWS):
                    rows = slice(start, start + _ROWS)
                    after = logits[rows].float().log_softmax(-1).cpu()
                    before = dense[rows].float()
                    total += float(F.kl_div(after, before, log_target=True, reduction="sum"))
        return total / self._ids.numel()

    def close(self) -> None:
        """Forget the dense logits and hidden states; nothing can be judged any more."""
        self._dense.clear()
        if self._entries is not None:
            self._entries.close()

    def _find_chain(self) -> None:
        with undisturbed(self._model):
            try:
                self._chain = find_chain(self._model, self._ids, {})
            except NotBlockwise as reason:
                _LOG.info("trials run the whole model: %s", reason)
                return
        names = {id(module): name for name, module in self._model.named_modules()}
        self._names = [names[id(block)] for block in self._chain.blocks]

    def _dense_logits(self, index: int) -> torch.Tensor:
        ids = self._ids[index : index + 1]
        if self._chain is None:
            return run_for_logits(self._model, ids)[0]

        def keep(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = hidden_of(args, kwargs)
            if self._entries is None:
                shape = (len(self._ids), *given.shape[1:])
                every = range(len(self._names))
                self._entries = Borders(every, shape, given.dtype, _BUDGET)
            self._entries.write(at, slice(index, index + 1), given)
            return original(*args, **kwargs)

        with self._chain.opened():
            return self._chain.run(ids, keep)[0]

    def _first_changed(self, discovery: Discovery, removal: Removal) -> int:
        """Return how many blocks at the start are as they were; 0 if that is not known."""
        if self._chain is None or removed_modules(discovery, removal):
            return 0
        first = len(self._names)
        for tensor, _ in removed_positions(discovery, removal):
            inside = [i for i, name in enumerate(self._names) if tensor.startswith(f"{name}.")]
            if not inside:
                return 0
            first = min(first, inside[0])
        return first if first < len(self._names) else 0

    def _logits(
        self, network: nn.Module, index: int, first: int, blocks: Sequence[nn.Module]
    ) -> torch.Tensor:
        ids = self._ids[index : index + 1]
        if first == 0:
            return run_for_logits(network, ids)[0]
        assert self._chain is not None
        assert self._entries is not None
        hidden = self._entries.read(first, slice(index, index + 1))
        chain = Chain(network, tuple(blocks), [], {}, forms=self._chain.forms)

        def go_on(at: int, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = hidden_of(args, kwargs)
            if at < first:
                return chain.as_output(at, given)
            args, kwargs = with_hidden(args, kwargs, hidden.to(given.device))
            return original(*args, **kwargs)

        with chain.opened():
            return chain.run(ids, go_on)[0]
