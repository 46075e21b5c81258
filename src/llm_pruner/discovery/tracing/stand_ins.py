"""Lets the code of a model be seen where PyTorch or ``transformers`` hide it from a trace.

TorchScript, compiled functions and ``flex_attention`` run below the level at which sizes are
watched. While a context is open, the Python originals run in their place, whoever holds them; what
has no original is run as it is and freezes all that goes in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.jit._script import RecursiveScriptModule
from torch.overrides import handle_torch_function

from llm_pruner.discovery.tracing.functions import COMPILED_CODE, flex_attention, is_watched


@contextmanager
def in_sight(model: nn.Module) -> Iterator[None]:
    """Run Python in place of code that cannot be watched, for the time of the context."""
    with ExitStack() as stack:
        _replace(stack, torch._C.ScriptFunction, "__call__", _script_function)
        _replace(stack, torch._C.ScriptMethod, "__call__", _script_method)
        _replace(stack, RecursiveScriptModule, "__call__", _script_module)
        library = sys.modules.get("torch.nn.attention.flex_attention")
        if library is not None:
            _replace_code(stack, library.flex_attention, _flex_attention)
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


def _replace_code(stack: ExitStack, function: Any, other: Any) -> None:
    """Let a function do what another does, also where it is held under other names."""
    for part in ("__code__", "__defaults__", "__kwdefaults__"):
        _replace(stack, function, part, getattr(other, part))


def _flex_attention(*args: Any, **kwargs: Any) -> Any:
    # Runs with the globals of another module, so all that it needs is imported here.
    from llm_pruner.discovery.tracing.stand_ins import visible_flex_attention

    return visible_flex_attention(*args, **kwargs)


visible_flex_attention = flex_attention

_CALL_FUNCTION = torch._C.ScriptFunction.__call__
_CALL_METHOD = torch._C.ScriptMethod.__call__


def _script_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    # A function that was traced keeps its original too, but holds sizes as plain numbers.
    original = vars(function).get("_torchdynamo_inline")
    if original is not None and "__qualname__" in vars(function):
        return original(*args, **kwargs)
    return _unseen(_CALL_FUNCTION, function, args, kwargs)


def _script_method(method: Any, *args: Any, **kwargs: Any) -> Any:
    return _unseen(_CALL_METHOD, method, args, kwargs)


def _script_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module in TorchScript with the forward pass that it was made from, if it is known."""
    kind = getattr(vars(module).get("_concrete_type"), "py_class", None)
    with ExitStack() as stack:
        if kind is not None and "forward" in vars(module):
            stack.callback(vars(module).__setitem__, "forward", vars(module)["forward"])
            vars(module)["forward"] = partial(kind.forward, module)
        return nn.Module.__call__(module, *args, **kwargs)


def _unseen(call: Callable[..., Any], code: Any, args: Any, kwargs: Any) -> Any:
    if not is_watched():
        return call(code, *args, **kwargs)
    return handle_torch_function(
        _compiled_code, (), call, code, args, tuple(kwargs), tuple(kwargs.values())
    )


def _compiled_code(call: Any, code: Any, args: Any, keys: Any, values: Any) -> Any:
    return call(code, *args, **dict(zip(keys, values, strict=True)))


_compiled_code.__name__ = COMPILED_CODE


def _load_balancing_loss(
    gate_logits: Any,
    num_experts: Any = None,
    *args: Any,  # noqa: ARG001
    **kwargs: Any,  # noqa: ARG001
) -> Any:
    """No loss; its code takes each router's number of experts from one attribute.

    That it also multiplies with the number changes the loss alone, not what the model says.
    """
    if not isinstance(gate_logits, tuple | list):
        return 0
    return handle_torch_function(_router_losses, (), gate_logits, num_experts)


def _router_losses(gate_logits: Any, num_experts: Any) -> torch.Tensor:  # noqa: ARG001
    return gate_logits[0].new_zeros(())


_router_losses.__name__ = "load_balancing_loss_func"
