"""Folders whose linear weights are int8, packed by torchao."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_pruner.checkpoints.save import make_readable
from llm_pruner.errors import UserError
from llm_pruner.files.outputs import MANIFEST, atomic_directory
from llm_pruner.runtime.progress import quiet_bars


def save_packed(
    source: Path,
    out: Path,
    *,
    max_shard_size: str,
    beside: Callable[[Path, PreTrainedModel], None] = lambda *_: None,
) -> PreTrainedModel:
    """Write a checkpoint anew with linear weights in int8, and return the packed model.

    That is torchao's ``Int8WeightOnlyConfig``, symmetric with a scale for each row. Other weights,
    and what lies beside them, stay as they are.

    Args:
        source: a folder of a model whose code is in transformers.
        beside: called with the folder and the packed model, to write more files.

    Raises:
        UserError: nothing in the model can be packed.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    with quiet_bars("transformers"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)),
            dtype="auto",
            device_map="cpu",
            use_safetensors=True,
            use_kernels=False,
        )
    if not any(map(is_traceable_wrapper_subclass, model.parameters())):
        raise _nothing_packed(source.name)
    weights = shutil.ignore_patterns("*.safetensors*", MANIFEST)
    with atomic_directory(out, overwrite=False) as folder, quiet_bars("transformers"):
        shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        make_readable(folder)
        beside(folder, model)
    return model


def check_packs(model: PreTrainedModel, name: str) -> None:
    """Raise UserError if a model has no linear layer beside its output embedding."""
    output = model.get_output_embeddings()
    if not any(isinstance(one, nn.Linear) and one is not output for one in model.modules()):
        raise _nothing_packed(name)


def _nothing_packed(name: str) -> UserError:
    return UserError(f"{name} has no linear layers that torchao packs; leave --quantize out")
