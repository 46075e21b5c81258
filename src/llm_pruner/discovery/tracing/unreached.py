"""What a run does not call: experts that no token chose run on what others were given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from llm_pruner.discovery.tracing.tracer import Tracer


class Siblings:
    """Remembers which children of lists and dictionaries of modules ran, and on what."""

    def __init__(self, model: nn.Module) -> None:
        self._parents = [
            module
            for module in model.modules()
            if isinstance(module, nn.ModuleList | nn.ModuleDict)
        ]
        self._calls: dict[nn.Module, tuple[Any, Any, Any]] = {}
        self._handles = [
            child.register_forward_hook(self._hook, with_kwargs=True)
            for parent in self._parents
            for child in parent.children()
            if not isinstance(child, torch.jit.ScriptModule)
        ]

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A call on no tokens at all shows nothing.
        if all(tensor.numel() for tensor in _tensors((args, kwargs))):
            self._calls.setdefault(module, (args, kwargs, output))

    def run_rest(self, tracer: Tracer) -> None:
        """Run each child that was not called on what its first equal sibling was given.

        Whatever calls it would treat both alike, so the results are taken to shrink together.
        """
        for parent in self._parents:
            children = list(parent.children())
            called = [child for child in children if child in self._calls]
            for child in children:
                if child in self._calls:
                    continue
                like = next((other for other in called if _alike(child, other)), None)
                if like is None:
                    continue
                args, kwargs, expected = self._calls[like]
                try:
                    output = child(*args, **kwargs)
                except Exception:  # it stays one that was not reached
                    continue
                for one, other in zip(_tensors(output), _tensors(expected), strict=False):
                    axes = tracer.label(one), tracer.label(other)
                    if [*map(len, axes[0])] == [*map(len, axes[1])]:
                        for left, right in zip(*axes, strict=True):
                            tracer.unify(left, right)

    def close(self) -> None:
        """Remove the hooks, and let go of what the modules were given."""
        for handle in self._handles:
            handle.remove()
        self._calls.clear()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _alike(left: nn.Module, right: nn.Module) -> bool:
    def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, parameter.shape) for name, parameter in module.named_parameters()]

    with torch._C.DisableTorchFunction():  # it is not the model that compares
        return type(left) is type(right) and shapes(left) == shapes(right)
