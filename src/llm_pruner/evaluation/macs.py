"""Multiply-accumulates, bytes read and cache growth, counted while the model runs.

No architecture is known: every operation that PyTorch dispatches is seen, whatever Python called
it. A model without weights (on the meta device) is counted as well, on stand-ins.

What is counted: matrix products (linear layers, experts that a token is routed to, the output
layer for every position) and convolutions, one MAC for each multiplication; attention as its two
products over all pairs of positions, as the paper does, though causal kernels may skip half. What
is not: norms, activations, rotations, softmax, scans and look-ups, which are no products (under
0.1% of a Llama of 7B).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llm_pruner.discovery.tracing.ghosts import GhostRunner, ghosts_of
from llm_pruner.discovery.tracing.run import example_tokens
from llm_pruner.discovery.tracing.scenes import staged
from llm_pruner.discovery.tracing.tracer import tensors_in
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.models.forward import Decoder, is_on_meta, logits_of, tensor_bytes

PAPER_TOKENS = 64
"""Length of the text that LLM-Pruner (arXiv 2305.11627) counts MACs on."""


@dataclass(frozen=True)
class Work:
    """What a run took.

    Attributes:
        macs: multiply-accumulates.
        bytes_read: bytes of all operands of its products: weights, cache, activations. Decoding
            one token reads each weight once, which is what limits its speed.
    """

    macs: int
    bytes_read: int


@dataclass(frozen=True)
class Cache:
    """What a model keeps of each text while it decodes.

    Attributes:
        bytes_per_token: growth with each token, over all layers. Layers with a sliding window stop
            growing when it is full.
        bytes_fixed: size that does not depend on the length (states of recurrent layers).
    """

    bytes_per_token: int
    bytes_fixed: int


@dataclass(frozen=True)
class Counts:
    """What a generation takes; see ``count_work``.

    Attributes:
        prefill: the prompts as they are read before decoding, for which the logits of the last
            position are enough.
        token: one more token for each text, with the cache.
        cache: of one text.
    """

    prefill: Work
    token: Work
    cache: Cache


def paper_macs(model: Any, tokens: int = PAPER_TOKENS) -> int:
    """Return the MACs of one forward pass over a text, logits at every position.

    LLM-Pruner counts so: 424.0G for LLaMA-7B and 64 tokens.

    Raises:
        LLMPrunerError: the model does not run.
    """
    with _runnable(model), counting() as counter:
        logits_of(model(input_ids=example_tokens(model, (1, tokens)), use_cache=False))
    return counter.work().macs


def count_work(model: Any, *, prompt_tokens: int = PAPER_TOKENS, batch_size: int = 1) -> Counts:
    """Count the prefill of a generation and the token after it.

    Args:
        model: a causal language model of transformers, with or without weights.
        prompt_tokens: length of each text.
        batch_size: texts at once.

    Raises:
        UserError: a setting is not positive.
        LLMPrunerError: the model does not run.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value} counts nothing; use at least 1")
    with _runnable(model):
        tokens = example_tokens(model, (batch_size, prompt_tokens + 1))
        decoder = Decoder(model)
        with counting() as prefill:
            decoder.step(tokens[:, :-1])
        before = tensor_bytes(decoder.cache)
        with counting() as token:
            decoder.step(tokens[:, -1:])
        grown = tensor_bytes(decoder.cache) - before
    fixed = max(before - grown * prompt_tokens, 0)
    cache = Cache(grown // batch_size, fixed // batch_size)
    return Counts(prefill.work(), token.work(), cache)


@contextmanager
def _runnable(model: Any) -> Iterator[None]:
    """Let a model run, with stand-ins where it has no weights."""
    with ExitStack() as stack:
        if is_on_meta(model):
            stack.enter_context(ghosts_of(model))
            stack.enter_context(_OnGhosts())
        stack.enter_context(staged(model))
        try:
            yield
        except LLMPrunerError:
            raise
        except Exception as error:
            raise LLMPrunerError(
                f"{type(model).__name__} does not run: {type(error).__name__}: {error}; "
                "its work cannot be counted"
            ) from error


class _OnGhosts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._ghosts = GhostRunner()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._overloadpacket.__name__
        return self._ghosts.run(func, name, args, kwargs or {}, _execute)


def _execute(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return func(*args, **kwargs)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what runs in the context."""
    counter = Counter()
    with counter:
        yield counter


class Counter(TorchDispatchMode):
    """Adds up the work of every product that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self._macs = 0
        self._bytes = 0

    def work(self) -> Work:
        """Return what was counted so far."""
        return Work(self._macs, self._bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        operands = [t for t in tensors_in([*args, *kwargs.values()]) if t.dim() > 1]
        if "scaled_dot_product" in name and "backward" not in name:
            self._macs += attention_macs(*(tensor.shape for tensor in args[:3]))
        elif name in _OWN:
            macs, operands = _OWN[name](args, kwargs)
            self._macs += macs
        elif func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]
            # PyTorch counts a multiplication and an addition as two.
            self._macs += formula(*args, **kwargs, out_val=out) // 2
        else:
            return out
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in operands)
        return out


def attention_macs(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Return the MACs of attention: query times keys, and weights times values, for all pairs.

    Shapes are (..., heads, T, d); key-value heads that several query heads read count for each.
    """
    pairs = math.prod(query[:-1]) * key[-2]
    return int(pairs * (query[-1] + value[-1]))


def _vector_product(args: tuple[Any, ...], _: dict[str, Any]) -> tuple[int, list[torch.Tensor]]:
    matrix = next(tensor for tensor in args if tensor.dim() == 2)
    return matrix.numel(), [matrix]


def _grouped_product(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, list[torch.Tensor]]:
    """Rows (S, K), sorted by group, times one matrix (K, N) of (G, K, N) each.

    ``offs``, shape (G,), holds where each group ends; a group without rows is not read.
    """
    rows, matrices = args[0], args[1]
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if ends is None or rows.dim() != 2 or matrices.dim() != 3:
        return rows.numel() * matrices.shape[-1], [rows, matrices]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    used = int((ends > starts).sum())
    return rows.numel() * matrices.shape[-1], [rows, matrices[:used]]


_OWN: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], tuple[int, list[torch.Tensor]]]] = {
    "mv": _vector_product,
    "addmv": _vector_product,
    "_grouped_mm": _grouped_product,
    "grouped_mm_fallback": _grouped_product,
}
"""Products that PyTorch's own table of formulas lacks."""
