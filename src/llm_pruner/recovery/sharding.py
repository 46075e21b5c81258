"""A model spread over the processes: each holds a part of every layer.

A layer is whole while it runs, and its parts are gathered again for the backward pass (fully
sharded data parallel training, arXiv 2304.11277). Where its weights are trained, each process gets
the part of their gradient that it holds of them, and the optimizer's state is spread alike. What
lies outside the layers (embeddings, last norm) and the adapters are whole in each process; their
gradients are summed as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import trainer

from llm_pruner.errors import UserError
from llm_pruner.recovery.methods import unmarked
from llm_pruner.recovery.parts import own_part, part_of, whole
from llm_pruner.recovery.processes import Processes


def mesh_of(device: str, processes: Processes) -> DeviceMesh:
    """Return the processes' devices, a mesh of one dimension; all of them ask for it together.

    Args:
        device: this process's, such as ``cpu`` or ``cuda:1``.
        processes: those that train together.
    """
    return init_device_mesh(torch.device(device).type, (processes.count,))


def shard_(model: nn.Module, device: str, mesh: DeviceMesh) -> None:
    """Spread the layers of a model, which lies on the CPU, and put the rest on the device.

    Nothing is sent: each process has loaded the model and keeps its part. From here on, whatever
    runs the model must be done by all processes, as often and in the same order.

    Args:
        model: each process's own, all alike.
        device: this process's.
        mesh: the devices of all.

    Raises:
        UserError: it has no list of layers, or layers that share weights.
    """
    try:
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--shard: the layers of this model cannot be spread ({reason}); leave it out"
        ) from error
    model.to(device)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Return the members of the list that holds most of the weights."""
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one)]
    if not lists:
        raise UserError("--shard: this model has no list of layers to spread; leave it out")
    yield from max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()))


def hide_from_sums_(trained: nn.Module) -> None:
    """Keep what is spread out of what is sent between the processes for what is whole in each.

    Raises:
        UserError: weights that are spread are to be trained, and the Trainer cannot.
    """
    spread = {name: one for name, one in trained.named_parameters() if isinstance(one, DTensor)}
    if any(one.requires_grad for one in spread.values()) and not hasattr(
        trainer, "has_mixed_dtensor"
    ):
        raise UserError(
            f"the Trainer of transformers {transformers.__version__} does not train a mixture of "
            "whole weights and weights that are spread (--shard); use a newer one, or --method lora"
        )
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, list(spread))


@torch.no_grad()
def merge_shards_(trained: Any) -> Any:
    """Add adapters to the weights that they belong to, layer by layer; return the plain model.

    Each layer is gathered, merged and spread again, so that one layer at a time is whole. Without
    adapters there is nothing to add.
    """
    if not hasattr(trained, "unload"):
        return unmarked(trained)
    for module in trained.modules():
        if isinstance(module, FSDPModule):
            assert isinstance(module, nn.Module)
            module.unshard()
            for one in module.modules():
                if isinstance(one, BaseTunerLayer):
                    one.merge()
            merged = [weight.detach().clone() for weight in module.parameters()]
            module.reshard()
            for weight, full in zip(module.parameters(), merged, strict=True):
                if isinstance(weight, DTensor):
                    own_part(weight).copy_(part_of(full, weight))
    for one in trained.modules():
        if isinstance(one, BaseTunerLayer) and not one.merged:
            one.merge()
    return unmarked(trained.unload())


@torch.no_grad()
def whole_weights(model: nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    """Return all weights, whole and on the CPU, in the first process; nothing in the others."""
    weights = {}
    for name, weight in model.named_parameters():
        full = whole(weight)
        if processes.is_first:
            weights[name] = full.detach().to("cpu", copy=True)
    return weights


@torch.no_grad()
def fill_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put what ``whole_weights`` gave into a model that is not spread, name by name."""
    for name, weight in model.named_parameters():
        weight.copy_(weights[name])
