"""Weights that may be spread over processes: the part that one holds, and the whole again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a whole tensor that is spread as another one is.

    Args:
        full: the whole, of the shape of ``like``.
        like: a weight; one that is not spread is held whole.
    """
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    each = -(-len(full) // mesh.size())
    first = each * mesh.get_local_rank()
    return full[first : first + each]


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a weight; written to, it changes the weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def spread(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the tensor of which this process holds ``part``, spread as another one is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all processes, which must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(
    tensors: Mapping[str, torch.Tensor], *, keep: bool = True
) -> dict[str, torch.Tensor]:
    """Return tensors with the parts of all processes, which must ask for it together.

    Args:
        tensors: in the same order in all processes; those that are not spread are returned as they
            are, the others on the CPU.
        keep: False in a process that only gives its parts, and gets nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full
    return found


def parts_of(
    tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return this process's parts of whole tensors; what ``like`` does not name stays whole."""
    return {
        name: part_of(tensor, like[name]).clone() if name in like else tensor
        for name, tensor in tensors.items()
    }
