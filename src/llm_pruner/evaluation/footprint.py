"""What a model takes: parameters and bytes, multiply-accumulates, bytes read, cache, peak memory.

All but the size is counted while the model runs, or stand-ins do where it has no weights: every
operation that PyTorch dispatches is seen, so no architecture needs to be known. Counted are matrix
products and convolutions, one MAC for each multiplication, and attention as two products over all
pairs of positions, as in the paper. Norms, activations, rotations and look-ups are not (under 0.1%
of a Llama of 7B).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llm_pruner.discovery.run import example_tokens
from llm_pruner.errors import LLMPrunerError
from llm_pruner.models.forward import Decoder, caching, is_on_meta, logits_of, tensor_bytes
from llm_pruner.models.layers import heaviest_list, names_in_float32
from llm_pruner.tracing.ghosts import GhostRunner, ghosts_of
from llm_pruner.tracing.ops import operation, tensors_in
from llm_pruner.tracing.scenes import staged
from llm_pruner.types import Size

PAPER_TOKENS = 64
"""Length of the text that LLM-Pruner (arXiv 2305.11627) counts MACs on."""


def model_size(model: Any, stored: torch.dtype | None = None) -> Size:
    """Count the parameters of a causal language model, the largest module list being its layers.

    ``stored``: the type of its files, which bytes are of; by default that in which it is here.
    """
    parameters = dict(model.named_parameters())
    taken = tensor_bytes([*parameters.values()])
    if stored is not None:
        wide = names_in_float32(model, stored)
        widths = {name: torch.float32 if name in wide else stored for name in parameters}
        taken = sum(one.numel() * widths[name].itemsize for name, one in parameters.items())
    layers = heaviest_list(model)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return Size(
        total=_count(model),
        embedding=_count(*(head for head in heads if head is not None)),
        blocks=0 if layers is None else _count(layers),
        bytes=taken,
    )


def _count(*modules: nn.Module) -> int:
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())


@dataclass(frozen=True)
class Counts:
    """What a generation takes; see ``count_work``.

    Attributes:
        token_bytes_read: bytes of all operands of that token's products: weights, cache,
            activations. It reads each weight once, which is what limits its speed.
        cache_bytes_per_token: growth of one text's cache with each token, over all layers. Layers
            with a sliding window stop growing when it is full.
        cache_bytes_fixed: what of it does not depend on the length (states of recurrent layers).
    """

    prefill_macs: int
    token_macs: int
    token_bytes_read: int
    cache_bytes_per_token: int
    cache_bytes_fixed: int


def paper_macs(model: Any) -> int:
    """Return the MACs of a forward pass over a text, logits everywhere, as LLM-Pruner counts.

    That is 424.0G for LLaMA-7B and 64 tokens.
    """
    with _runnable(model), Counter() as counter:
        tokens = example_tokens(model, (1, PAPER_TOKENS))
        logits_of(model(input_ids=tokens, **caching(model, False)))
    return counter.macs


def count_work(
    model: Any, *, prompt_tokens: int = PAPER_TOKENS, batch_size: int = 1, weights: bool = True
) -> Counts:
    """Count the prefill of a generation and the token after it.

    Without ``weights`` stand-ins take the place of those that the model has. Raises LLMPrunerError
    if the model does not run.
    """
    with _runnable(model, weights=weights):
        tokens = example_tokens(model, (batch_size, prompt_tokens + 1))
        decoder = Decoder(model)
        with Counter() as prefill:
            decoder.step(tokens[:, :-1])
        before = tensor_bytes(decoder.cache)
        with Counter() as token:
            decoder.step(tokens[:, -1:])
        grown = tensor_bytes(decoder.cache) - before
    return Counts(
        prefill_macs=prefill.macs,
        token_macs=token.macs,
        token_bytes_read=token.bytes_read,
        cache_bytes_per_token=grown // batch_size,
        cache_bytes_fixed=max(before - grown * prompt_tokens, 0) // batch_size,
    )


@contextmanager
def _runnable(model: Any, *, weights: bool = True) -> Iterator[None]:
    with ExitStack() as stack:
        if is_on_meta(model) or not weights:
            stack.enter_context(ghosts_of(model, weights=not weights))
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._ghosts.run(operation(func), args, kwargs or {})


class Counter(TorchDispatchMode):
    """Adds up the MACs, and the bytes of the operands, of every product dispatched inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.bytes_read = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        operands = [t for t in tensors_in([*args, *kwargs.values()]) if t.dim() > 1]
        if "scaled_dot_product" in name and "backward" not in name:
            self.macs += attention_macs(*(tensor.shape for tensor in args[:3]))
        elif name in _OWN:
            macs, operands = _OWN[name](args, kwargs)
            self.macs += macs
        elif func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]
            # PyTorch counts a multiplication and an addition as two.
            self.macs += formula(*args, **kwargs, out_val=out) // 2
        else:
            return out
        self.bytes_read += sum(tensor.numel() * tensor.element_size() for tensor in operands)
        return out


def attention_macs(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Return the MACs of query times keys, and weights times values, for all pairs and heads."""
    pairs = math.prod(query[:-1]) * key[-2]
    return int(pairs * (query[-1] + value[-1]))


def _vector_product(args: tuple[Any, ...], _: dict[str, Any]) -> tuple[int, list[torch.Tensor]]:
    matrix = next(tensor for tensor in args if tensor.dim() == 2)
    return matrix.numel(), [matrix]


def _grouped_product(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, list[torch.Tensor]]:
    """Rows (S, K), sorted by group, times one matrix (K, N) of (G, K, N) each; ``offs``: ends."""
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


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of weights and, on top, of the most tensors alive in the prefill and in decoding."""

    prefill: int
    decode: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int


def measure_memory(
    model: Any, *, batch_size: int = 1, prompt_tokens: int = 64, new_tokens: int = 4
) -> PeakMemory:
    """Run a prefill and decode some tokens, and return the largest sums of living tensors.

    On a GPU the allocator is asked; elsewhere every tensor is followed from the operation that
    makes it to its end, so that the sum does not depend on what ran before.
    """
    weights = tensor_bytes([*model.parameters(), *model.buffers()])
    tokens = example_tokens(model, (batch_size, prompt_tokens + new_tokens))
    follow = _on_cuda(tokens.device) if tokens.device.type == "cuda" else Follower()
    with staged(model), follow as peak:
        decoder = Decoder(model)
        decoder.step(tokens[:, :prompt_tokens])
        prefill = peak()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            decoder.step(tokens[:, position : position + 1])
        decode = peak()
    return PeakMemory(weights + prefill, weights + decode, batch_size, prompt_tokens, new_tokens)


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield what returns the most bytes that were alive at once since it was last called."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)

    def peak() -> int:
        found = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return int(found)

    yield peak


class Follower(TorchDispatchMode):
    """Follows the memory of all results; a call returns the largest sum since the last call."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = 0
        self._most = 0

    def __call__(self) -> int:
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
