"""Losses of learned tokens, a few at a time, so that their logits never exist all at once.

Those are by far the largest tensors of training. The output embedding and the loss run forward and
backward on as many tokens as fit in the cache, and only the gradient of what enters the output
embedding is kept: training on a CPU is 1.3 times as fast (benchmarks/results/recovery_speed.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.func import functional_call

from llm_pruner.models.forward import own_forward
from llm_pruner.recovery.objective import Objective, WithGradient
from llm_pruner.recovery.packing import Batch, arguments_of, target_logits

_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits at a time. On a CPU below what malloc keeps, see ``llm_pruner.runtime.memory``."""

_LEAST_TOKENS = 64
"""Fewer at a time would spend more on reading the weights than on multiplying them."""

_otherwise: WeakSet[nn.Module] = WeakSet()
"""Output embeddings of models that do more to the logits than these give, or cannot do without."""

_switched = {"on": True}


@contextmanager
def logits_at_once() -> Iterator[None]:
    """Have the logits of a batch made all at once until the block ends."""
    _switched["on"] = False
    try:
        yield
    finally:
        _switched["on"] = True


_halves: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, torch.Tensor]]] = WeakKeyDictionary()
"""See ``_frozen_in_half``: what the weights were when they were converted, and the result."""


def summed_loss(model: Any, batch: Batch, objective: Objective) -> torch.Tensor:
    """Return the sum of a loss over the learned tokens of a batch.

    Where the model returns just what its output embedding gives, which is seen at each call, the
    logits are computed in chunks; else all at once.

    Args:
        model: the result is differentiable in its weights.
        batch: the samples.
        objective: called once for each chunk, in order.
    """
    found = _before_head(model, batch)
    if found is None:
        logits, _ = target_logits(model, batch)
        if logits.requires_grad:
            return WithGradient.apply(logits, objective)
        return objective(logits, slice(0, len(logits)))[0]
    head, hidden = found
    weights = [one for one in head.parameters() if one.requires_grad]
    rows = _tokens_at_once(head, hidden, trained=bool(weights))
    if torch.is_grad_enabled() and (hidden.requires_grad or weights):
        return _Chunked.apply(hidden, head, objective, rows, *weights)
    total = torch.zeros((), device=hidden.device)
    run = _as_multiplied(head)
    for span in _spans(len(hidden), rows):
        total += objective(run(hidden[span]).float(), span)[0]
    return total


class _Chunked(torch.autograd.Function):
    """Forward computes the gradients too, chunk by chunk; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: nn.Module,
        objective: Objective,
        rows: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        grads = torch.empty_like(hidden)
        of_weights = [torch.zeros_like(one) for one in weights]
        run = _as_multiplied(head)
        buffer: torch.Tensor | None = None  # new memory would be faulted in for each chunk
        for span in _spans(len(hidden), rows):
            with torch.enable_grad():
                part = hidden[span].detach().requires_grad_()
                logits = run(part)
            if buffer is None:
                buffer = torch.empty_like(logits, dtype=torch.float32)
            whole = buffer[: len(logits)].copy_(logits.detach())
            loss, gradient = objective(whole, span)
            assert gradient is not None
            gradient = gradient.to(logits.dtype)
            own, *others = torch.autograd.grad(logits, (part, *weights), gradient)
            grads[span] = own
            for of_weight, one in zip(of_weights, others, strict=True):
                of_weight += one
            total += loss
        ctx.save_for_backward(grads, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        grads, *of_weights = ctx.saved_tensors
        scale = upstream[0]
        return (scale * grads, None, None, None, *(scale * one for one in of_weights))


def logits_of(model: Any, batch: Batch) -> Callable[[slice], torch.Tensor]:
    """Run a model, and return what makes float32 logits (n, vocabulary) of tokens when asked."""
    found = _before_head(model, batch)
    if found is None:
        logits, _ = target_logits(model, batch)
        return lambda span: logits[span]
    head, hidden = found
    run = _as_multiplied(head)
    return lambda span: run(hidden[span]).float()


def _as_multiplied(head: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from (n, features) to logits (n, vocabulary)."""
    weights = _frozen_in_half(head)
    return lambda hidden: functional_call(head, weights, (hidden.unsqueeze(0),)).squeeze(0)


def _frozen_in_half(head: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights that are not trained in autocast's type, kept for all chunks; else none."""
    frozen = {name: one for name, one in head.named_parameters() if not one.requires_grad}
    device = next(head.parameters()).device.type
    if not frozen or not torch.is_autocast_enabled(device):
        return {}
    dtype = torch.get_autocast_dtype(device)
    state = (dtype, *((name, one.data_ptr(), one._version) for name, one in frozen.items()))
    kept = _halves.get(head)
    if kept is None or kept[0] != state:
        kept = state, {name: one.detach().to(dtype) for name, one in frozen.items()}
        _halves[head] = kept
    return kept[1]


def _spans(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _tokens_at_once(head: nn.Module, hidden: torch.Tensor, *, trained: bool) -> int:
    vocabulary = max(one.numel() for one in head.parameters()) // hidden.shape[-1]
    size = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"])
    rows = max(_LEAST_TOKENS, size // (4 * vocabulary))
    # The gradient of trained weights is as large as they are, and is added up chunk by chunk.
    return 4 * rows if trained else rows


def _before_head(model: Any, batch: Batch) -> tuple[nn.Module, torch.Tensor] | None:
    """Run a model without its output embedding; return that, and what enters it.

    The latter is of shape (n, features), at the positions that predict learned tokens; None if the
    logits are more than what it gives.
    """
    if not _switched["on"]:
        return None
    head = model.get_output_embeddings()
    rows, length = batch.input_ids.shape
    if (
        head is None
        or head in _otherwise
        or next(head.parameters(), None) is None
        # Hooks of the module would not be called, and accelerate's bring its weights.
        or head._forward_hooks
        or head._forward_pre_hooks
        or hasattr(head, "_hf_hook")
    ):
        return None
    seen: list[torch.Tensor] = []

    def stand_in(*args: Any, **others: Any) -> torch.Tensor:
        fits = len(args) == 1 and not others and isinstance(args[0], torch.Tensor)
        if not fits or args[0].shape[:-1] != (rows, length) or rows == length or seen:
            raise ValueError("the output embedding was called in another way than expected")
        learned = batch.learned[:, 1:].to(args[0].device)
        chosen = args[0][:, :-1][learned][None]
        seen.append(chosen)
        return chosen

    on_gpu = torch.cuda.is_initialized()
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        with own_forward(head):
            head.forward = stand_in
            output = model(**arguments_of(model, batch))
        untouched = len(seen) == 1 and seen[0]._version == 0 and _is_same(output.logits, seen[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):
        untouched = False  # if this was not the reason, the whole model says so again
    if not untouched:
        torch.set_rng_state(drawn[0])  # all of it runs again, and drops out what it would have
        if on_gpu:
            torch.cuda.set_rng_state_all(drawn[1])
        if rows != length:
            _otherwise.add(head)
        return None
    return head, seen[0].squeeze(0)


def _is_same(found: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a tensor is the one given, or that in float32, as accelerate passes it on."""
    if found is given:
        return True
    if found.dtype not in (given.dtype, torch.float32) or found.shape != given.shape:
        return False
    if not found.requires_grad:
        return torch.equal(found.float(), given.float())
    node = found.grad_fn
    if node is not None and node.name() == "ToCopyBackward0":
        node, _ = node.next_functions[0]
    return node is given.grad_fn
