"""Python in place of code that PyTorch or ``transformers`` hide from a trace.

Scripted functions and compiled code run below the level at which sizes are watched. Inside
``in_sight`` the Python originals run instead. What has no original runs as it is, and everything
that goes in is frozen. ``REWRITES`` writes functions of PyTorch out in others that are watched.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.jit._state import _try_get_jit_cached_function
from torch.overrides import _get_current_function_mode, handle_torch_function

from llm_pruner.runtime.precision import torch_functions
from llm_pruner.tracing.sizes import plain

COMPILED_CODE = "compiled code"
TRANSFORMED_CODE = "code under torch.vmap or another transform of torch.func"
"""Names under which the tracer knows code that it cannot follow."""


@contextmanager
def in_sight(model: nn.Module) -> Iterator[None]:
    """Run Python in place of code that cannot be watched, inside the context."""
    with ExitStack() as stack:
        _replace(stack, torch._C.ScriptFunction, "__call__", _script_function)
        _replace(stack, torch._C.ScriptMethod, "__call__", _script_method)
        # In inference mode operations are not decomposed into those that have rules.
        _replace(stack, torch.inference_mode, "__enter__", lambda _: None)
        _replace(stack, torch.inference_mode, "__exit__", lambda *_: None)
        mapping: Any = torch._functorch.vmap
        count = mapping._validate_and_get_batch_size
        number = "_validate_and_get_batch_size"  # which goes to code in C
        _replace(stack, mapping, number, lambda *given: int(count(*given)))
        attention: Any = sys.modules.get("transformers.integrations.sdpa_attention")
        choose = getattr(attention, "use_gqa_in_sdpa", None)
        if choose is not None:

            def untraced(*args: Any, **kwargs: Any) -> Any:
                with torch._C.DisableTorchFunction():  # its sizes only choose a kernel
                    return choose(*args, **kwargs)

            _replace(stack, attention, "use_gqa_in_sdpa", untraced)
        stack.enter_context(torch_functions())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        settings = getattr(model, "config", None)
        if getattr(settings, "_attn_implementation", None) == "flex_attention":
            # Eager attention reads all sizes that any implementation reads.
            set_attention: Any = model.set_attn_implementation
            stack.callback(set_attention, "flex_attention")
            set_attention("eager")
        for name in {type(module).__module__ for module in model.modules()}:
            space = sys.modules.get(name)
            if hasattr(space, "load_balancing_loss_func"):
                _replace(stack, space, "load_balancing_loss_func", _load_balancing_loss)
        yield


def _replace(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


_CALL_FUNCTION = torch._C.ScriptFunction.__call__
_CALL_METHOD = torch._C.ScriptMethod.__call__


def _script_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    original = vars(function).get("_torchdynamo_inline")
    # A traced function keeps its original too, but runs with fixed sizes.
    scripted = None if original is None else _try_get_jit_cached_function(original)
    if scripted is not None and scripted.qualified_name == function.qualified_name:
        return original(*args, **kwargs)
    return _unseen(_CALL_FUNCTION, function, args, kwargs)


def _script_method(method: Any, *args: Any, **kwargs: Any) -> Any:
    return _unseen(_CALL_METHOD, method, args, kwargs)


def _unseen(call: Callable[..., Any], code: Any, args: Any, kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(code, *args, **kwargs)

    run.__name__ = COMPILED_CODE
    if _get_current_function_mode() is None:
        return run(*args, **kwargs)
    return handle_torch_function(run, (), *args, **kwargs)


def _load_balancing_loss(gate_logits: Any, num_experts: Any = None, *_: Any, **__: Any) -> Any:
    """Zero: logits do not depend on it. Its code reads the number of experts from one attribute."""
    if not isinstance(gate_logits, tuple | list):
        return 0
    return handle_torch_function(_router_losses, (), gate_logits, num_experts)


def _router_losses(gate_logits: Any, num_experts: Any) -> torch.Tensor:  # noqa: ARG001
    return gate_logits[0].new_zeros(())


_router_losses.__name__ = "load_balancing_loss_func"


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` written out, so that every axis and size in it is seen.

    The default scale reads the head size from the shape, which records it as a number.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if enable_gqa and plain(query.shape[-3]) != plain(key.shape[-3]):
        groups = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_interleave(x, groups, dim=-3) for x in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        rows, columns = int(query.shape[-2]), int(key.shape[-2])
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    # A row that may attend to nothing gives zeros, as the fused kernels do.
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value


def _repeat_interleave(
    input: torch.Tensor,
    repeats: int | torch.Tensor | None = None,
    dim: int | None = None,
    **_: Any,
) -> Any:
    """``repeat_interleave`` by a number as ``expand`` and ``flatten``; None in its other forms."""
    if repeats is None or isinstance(repeats, torch.Tensor) or dim is None:
        return None
    dim = dim % input.dim()
    sizes = [-1] * (input.dim() + 1)
    sizes[dim + 1] = repeats
    return input.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


def _group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> torch.Tensor:
    """``group_norm`` as statistics of each group (a head, in most models)."""
    groups = input.unflatten(1, (num_groups, -1))
    dims = [*range(2, groups.dim())]
    variance = groups.var(dims, correction=0, keepdim=True)
    normed = (groups - groups.mean(dims, keepdim=True)) * (variance + eps).rsqrt()
    normed = normed.flatten(1, 2)
    sizes = [-1] + [1] * (input.dim() - 2)
    normed = normed if weight is None else normed * weight.view(sizes)
    return normed if bias is None else normed + bias.view(sizes)


def _single_position(input: torch.Tensor, index: Any) -> torch.Tensor | None:
    """``x[..., [-2], :]`` as a copy of ``x[..., -2:-1, :]``; None for any other index."""
    items = [*index] if isinstance(index, tuple) else [index]
    listed = [place for place, item in enumerate(items) if isinstance(item, list)]
    plainly = all(item is None or isinstance(item, slice | type(...) | list) for item in items)
    if not plainly or len(listed) != 1 or [*map(type, items[listed[0]])] != [int]:
        return None
    [position] = items[listed[0]]
    items[listed[0]] = slice(position, position + 1 or None)
    return input[tuple(items)].clone()


def _one_hot(input: torch.Tensor, num_classes: Any = -1) -> torch.Tensor | None:
    """``one_hot`` as ``scatter``; None if the number of classes is not given."""
    if plain(num_classes) < 1:
        return None
    empty = input.new_zeros((*input.shape, num_classes))
    return empty.scatter_(-1, input.unsqueeze(-1), 1)


def _tensor_split(
    input: torch.Tensor, indices_or_sections: Any = None, dim: int = 0, **_: Any
) -> tuple[torch.Tensor, ...] | None:
    """``tensor_split`` at given positions as slices; None for a number of sections."""
    if not isinstance(indices_or_sections, Sequence):
        return None
    front = (slice(None),) * (dim % input.dim())
    ends = pairwise([None, *indices_or_sections, None])
    return tuple(input[(*front, slice(*pair))] for pair in ends)


REWRITES: dict[str, Callable[..., Any]] = {
    "__getitem__": _single_position,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "one_hot": _one_hot,
    "repeat_interleave": _repeat_interleave,
    "tensor_split": _tensor_split,
}
"""Name of a function of PyTorch -> the same in watched functions; gives None if it cannot."""
