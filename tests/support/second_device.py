"""A GPU that is not there: tensors that say they lie on ``cuda:0``, compute on the processor, and
refuse to meet those that lie on it, with the words that PyTorch has for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
_BOTH = {"copy_", "__getitem__", "__setitem__", "set_", "equal"}
"""What takes tensors of two devices: copies and indices."""
_PARTS = {"T", "mT", "data", "grad", "real"}


def put_(model: nn.Module) -> nn.Module:
    """Say of all tensors of a model that they lie on the device."""
    for tensor in (*model.parameters(), *model.buffers()):
        _mark(tensor, there=True)
    return model


def is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the device."""
    return bool(getattr(tensor, "_on_second_device", False))


def _mark(found: Any, *, there: bool) -> Any:
    for leaf in tree_leaves(found):
        if isinstance(leaf, torch.Tensor):
            leaf._on_second_device = there  # type: ignore[attr-defined]
    return found


def _named(value: Any) -> str | None:
    """Return the type of device that an argument names, if it does."""
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"):
        return value.split(":")[0]
    return value.type if isinstance(value, torch.device) else None


class SecondDevice(TorchFunctionMode):
    """Inside, tensors that were put on the device, and what is made of them, lie there."""

    def __enter__(self) -> SecondDevice:
        self._made = made = nn.Parameter.__new__

        def parameter(cls: Any, data: torch.Tensor, requires_grad: bool = True) -> Any:
            return _mark(made(cls, data, requires_grad), there=is_there(data))

        nn.Parameter.__new__ = parameter  # type: ignore[assignment]  # which no mode is asked about
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        nn.Parameter.__new__ = self._made  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            part, there = func.__self__.__name__, is_there(args[0])
            if part == "device":
                return GPU if there else func(*args)
            return _mark(func(*args), there=there) if part in _PARTS else func(*args)
        if name == "__set__":
            if func.__self__.__name__ == "data":
                _mark(args[0], there=is_there(args[1]))
            return func(*args)
        if func is torch.device:
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        devices = [kind for leaf in leaves if (kind := _named(leaf)) is not None]
        real = [one for one in tensors if one.ndim]
        if len({is_there(one) for one in real}) > 1 and name not in _BOTH | {"to"}:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (in {name})"
            )
        there = any(is_there(one) for one in tensors)
        if name in _BOTH and tensors:
            there = is_there(tensors[0])
        if name == "cpu" or "cpu" in devices:
            there = False
        elif devices:
            there = "cuda" in devices
        elif name == "to" and len(tensors) > 1:
            there = is_there(tensors[1])
        on_cpu = tree_map(
            lambda leaf: torch.device("cpu") if _named(leaf) == "cuda" else leaf, (args, kwargs)
        )
        found = func(*on_cpu[0], **on_cpu[1])
        if name in ("to", "cpu", "cuda") and tensors and is_there(tensors[0]) != there:
            found = found.clone() if found is tensors[0] else found
        return _mark(found, there=there)
