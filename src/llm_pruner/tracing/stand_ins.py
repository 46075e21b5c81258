"""Lets the code of a model be seen where PyTorch or ``transformers`` hide it from a trace.

TorchScript, compiled functions and ``flex_attention`` run below the level at which sizes are
watched. While a context is open, the Python originals run in their place, whoever holds them; what
has no original is run as it is and freezes all that goes in. ``REWRITES`` does the same for
functions of PyTorch that are watched.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import nn
from torch.jit._script import RecursiveScriptModule
from torch.jit._state import _try_get_jit_cached_function
from torch.overrides import _get_current_function_mode, handle_torch_function
from torch.utils._python_dispatch import _disable_current_modes

from llm_pruner.models.forward import own_forward
from llm_pruner.runtime.precision import torch_functions
from llm_pruner.tracing.sizes import TracedShape, plain

COMPILED_CODE = "compiled code"
TRANSFORMED_CODE = "code under torch.vmap or another transform of torch.func"
"""Names of the functions under which code runs of which nothing is known."""


@contextmanager
def in_sight(model: nn.Module) -> Iterator[None]:
    """Run Python in place of code that cannot be watched, for the time of the context."""
    with ExitStack() as stack:
        _replace(stack, torch._C.ScriptFunction, "__call__", _script_function)
        _replace(stack, torch._C.ScriptMethod, "__call__", _script_method)
        _replace(stack, RecursiveScriptModule, "__call__", _script_module)
        _replace(stack, torch, "broadcast_shapes", _broadcast_shapes)
        # Under it operations are not taken apart into those that have rules.
        _replace(stack, torch.inference_mode, "__enter__", lambda _: None)
        _replace(stack, torch.inference_mode, "__exit__", lambda *_: None)
        mapping: Any = torch._functorch.vmap
        count = mapping._validate_and_get_batch_size
        number = "_validate_and_get_batch_size"  # which goes to code in C
        _replace(stack, mapping, number, lambda *given: int(count(*given)))
        library = sys.modules.get("torch.nn.attention.flex_attention")
        if library is not None:
            # The code of it, since it is held under other names as well.
            for part in ("__code__", "__defaults__", "__kwdefaults__"):
                _replace(stack, library.flex_attention, part, getattr(_flex_attention, part))
        attention: Any = sys.modules.get("transformers.integrations.sdpa_attention")
        choose = getattr(attention, "use_gqa_in_sdpa", None)
        if choose is not None:
            _replace(stack, attention, "use_gqa_in_sdpa", _unheard(choose))
        stack.enter_context(torch_functions())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        settings = getattr(model, "config", None)
        if getattr(settings, "_attn_implementation", None) == "flex_attention":
            # The plain code reads all sizes that any of the implementations reads.
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


def _unheard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads sizes unheard: it decides how fast the same is computed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def _broadcast_shapes(*shapes: Any) -> Any:
    """As in PyTorch, but that integers are not asked whether they are sizes of nested tensors."""
    each = [(shape,) if isinstance(shape, int) else tuple(shape) for shape in shapes]
    found = []
    for sizes in zip_longest(*map(reversed, each), fillvalue=1):
        met = [one for one in sizes if plain(one) != 1] or [1]
        found.append(met[0] if len(met) == 1 else max(map(operator.index, met)))
        if any(plain(one) != plain(met[0]) for one in met):
            raise RuntimeError(f"shapes {each} cannot be broadcast to one")
    return TracedShape(reversed(found))


def _flex_attention(*args: Any, **kwargs: Any) -> Any:
    # Runs with the globals of another module, so all that it needs is imported here.
    from llm_pruner.tracing.stand_ins import flex_attention

    return flex_attention(*args, **kwargs)


_CALL_FUNCTION = torch._C.ScriptFunction.__call__
_CALL_METHOD = torch._C.ScriptMethod.__call__


def _script_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    original = vars(function).get("_torchdynamo_inline")
    # A function that was traced keeps its original too, but holds sizes as plain numbers.
    scripted = None if original is None else _try_get_jit_cached_function(original)
    if scripted is not None and scripted.qualified_name == function.qualified_name:
        return original(*args, **kwargs)
    return _unseen(_CALL_FUNCTION, function, args, kwargs)


def _script_method(method: Any, *args: Any, **kwargs: Any) -> Any:
    return _unseen(_CALL_METHOD, method, args, kwargs)


def _script_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module in TorchScript with the forward pass that it was made from, if it is known."""
    kind = getattr(vars(module).get("_concrete_type"), "py_class", None)
    with own_forward(module):
        if kind is not None and "forward" in vars(module):
            vars(module)["forward"] = partial(kind.forward, module)
        return nn.Module.__call__(module, *args, **kwargs)


def _unseen(call: Callable[..., Any], code: Any, args: Any, kwargs: Any) -> Any:
    if _get_current_function_mode() is None:
        return call(code, *args, **kwargs)
    return handle_torch_function(
        _compiled_code, (), call, code, args, tuple(kwargs), tuple(kwargs.values())
    )


def _compiled_code(call: Any, code: Any, args: Any, keys: Any, values: Any) -> Any:
    return call(code, *args, **dict(zip(keys, values, strict=True)))


_compiled_code.__name__ = COMPILED_CODE


def _load_balancing_loss(gate_logits: Any, num_experts: Any = None, *_: Any, **__: Any) -> Any:
    """No loss, of which logits know nothing; its code takes experts' numbers from one attribute."""
    if not isinstance(gate_logits, tuple | list):
        return 0
    return handle_torch_function(_router_losses, (), gate_logits, num_experts)


def _router_losses(gate_logits: Any, num_experts: Any) -> torch.Tensor:  # noqa: ARG001
    return gate_logits[0].new_zeros(())


_router_losses.__name__ = "load_balancing_loss_func"


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention written out, so that every axis and number in it is seen, and its scores.

    Without ``scale`` the function divides by the square root of the head size; the division below
    reads that size from the shape, which records the use.

    Args:
        change: what is done to the scores before the softmax.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if enable_gqa and plain(query.shape[-3]) != plain(key.shape[-3]):
        groups = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_interleave(x, groups, dim=-3) for x in (key, value))
    scores = change((query * scale) @ key.transpose(-2, -1))
    # A row that may look nowhere gives zeros, as the fused kernels do.
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value, scores


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
    """``scaled_dot_product_attention`` written out."""

    def masked(scores: torch.Tensor) -> torch.Tensor:
        if is_causal:
            rows, columns = int(query.shape[-2]), int(key.shape[-2])
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
        if attn_mask is None:
            return scores
        if attn_mask.dtype == torch.bool:
            return scores.masked_fill(~attn_mask, float("-inf"))
        return scores + attn_mask

    return _attend(query, key, value, masked, scale, enable_gqa)[0]


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,  # noqa: ARG001
    *,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention`` written out.

    What ``score_mod`` and the mask do with the number of a head freezes the heads, as numbers of
    positions are fixed.
    """

    def changed(scores: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            shape = tuple(scores.shape)
        places = [torch.arange(size, device=query.device) for size in shape]
        if score_mod is not None:
            scores = _by_position(score_mod, places, scores).to(scores.dtype)
        if block_mask is not None:
            scores = scores.masked_fill(~_by_position(block_mask.mask_mod, places), float("-inf"))
        return scores

    out, scores = _attend(query, key, value, changed, scale, enable_gqa)
    out = out.to(query.dtype)
    if return_aux is not None:
        return out, type("Aux", (), {"lse": scores.logsumexp(-1), "max_scores": scores.amax(-1)})()
    return (out, scores.logsumexp(-1)) if return_lse else out


def _by_position(
    function: Callable[..., torch.Tensor], places: list[torch.Tensor], *scores: torch.Tensor
) -> torch.Tensor:
    """Call a function of (scores,) batch, head, query and key of single positions on all at once.

    It is made for ``vmap``. Most such functions do the same by broadcasting, where axes can be
    followed; any other runs as code of which nothing is known.
    """
    columns = [
        place.view([-1 if i == dim else 1 for i in range(4)]) for dim, place in enumerate(places)
    ]

    def single(*given: torch.Tensor) -> torch.Tensor:
        mapped = function
        for dim in (3, 2, 1, 0):
            dims = [0 if dim == place else None for place in range(4)]
            mapped = torch.vmap(mapped, in_dims=(*[0] * len(scores), *dims))
        return mapped(*given)

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        expected = single(*scores, *places)
    try:
        found = function(*scores, *columns)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            same = torch.equal(found.expand(expected.shape), expected)
    except (RuntimeError, IndexError, TypeError):
        same = False
    if same:
        return found
    single.__name__ = COMPILED_CODE
    return handle_torch_function(single, (), *scores, *places)


def _repeat_interleave(
    input: torch.Tensor,
    repeats: int | torch.Tensor | None = None,
    dim: int | None = None,
    **_: Any,
) -> Any:
    """``repeat_interleave`` by a number, as ``expand`` and ``flatten``; None if not applicable."""
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
    """``group_norm`` as statistics of each group, whose number is that of heads in most code."""
    groups = input.unflatten(1, (num_groups, -1))
    dims = [*range(2, groups.dim())]
    variance = groups.var(dims, correction=0, keepdim=True)
    normed = (groups - groups.mean(dims, keepdim=True)) * (variance + eps).rsqrt()
    normed = normed.flatten(1, 2)
    sizes = [-1] + [1] * (input.dim() - 2)
    normed = normed if weight is None else normed * weight.view(sizes)
    return normed if bias is None else normed + bias.view(sizes)


def _single_position(input: torch.Tensor, index: Any) -> torch.Tensor | None:
    """``x[..., [-2], :]`` as ``x[..., -2:-1, :]``, copied; None for any other index."""
    items = [*index] if isinstance(index, tuple) else [index]
    listed = [place for place, item in enumerate(items) if isinstance(item, list)]
    plainly = all(item is None or isinstance(item, slice | type(...) | list) for item in items)
    if not plainly or len(listed) != 1 or [*map(type, items[listed[0]])] != [int]:
        return None
    [position] = items[listed[0]]
    items[listed[0]] = slice(position, position + 1 or None)
    return input[tuple(items)].clone()


def _one_hot(input: torch.Tensor, num_classes: Any = -1) -> torch.Tensor | None:
    """``one_hot`` as writing by position; None where it counts the classes by the values."""
    if plain(num_classes) < 1:
        return None
    empty = input.new_zeros((*input.shape, num_classes))
    return empty.scatter_(-1, input.unsqueeze(-1), 1)


def _tensor_split(
    input: torch.Tensor,
    indices_or_sections: Any = None,
    dim: int = 0,
    *,
    indices: Any = None,
    sections: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, ...] | None:
    """``tensor_split`` as slices, or as ``chunk`` where all are alike; None if not applicable."""
    named = (indices_or_sections, indices, sections)
    parts = next((given for given in named if given is not None), 0)
    dim = dim % input.dim()
    if isinstance(parts, Sequence):
        front = (slice(None),) * dim
        return tuple(input[(*front, slice(*ends))] for ends in pairwise([None, *parts, None]))
    alike = isinstance(parts, int) and parts > 0 and plain(input.shape[dim]) % plain(parts) == 0
    return input.chunk(parts, dim) if alike else None


REWRITES: dict[str, Callable[..., Any]] = {
    "__getitem__": _single_position,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "one_hot": _one_hot,
    "repeat_interleave": _repeat_interleave,
    "tensor_split": _tensor_split,
}
"""Name of a function of PyTorch -> the same in functions that are watched, or None if it cannot."""
