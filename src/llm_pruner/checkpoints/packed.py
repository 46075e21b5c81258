"""Folders whose linear weights are int8, packed by torchao."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_pruner.checkpoints.save import make_readable, silent_writing
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
    """Write a checkpoint anew with the weights of its linear layers in int8.

    That is torchao's ``Int8WeightOnlyConfig``, symmetric with a scale for each row. Embeddings,
    norms and what is no ``nn.Linear`` stay as they are. What lies beside the weights comes along.

    Args:
        source: a folder of a model whose code is in transformers.
        out: the folder; appears only once it is complete.
        beside: called with the folder and the packed model, to write more files beside the weights.

    Returns:
        The model with its weights as they were packed.

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
        )
    if not any(map(is_traceable_wrapper_subclass, model.parameters())):
        raise UserError(f"{source.name} has no linear layers that torchao packs")
    weights = shutil.ignore_patterns("*.safetensors*", MANIFEST)
    with atomic_directory(out, overwrite=False) as folder, silent_writing():
        shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        make_readable(folder)
        beside(folder, model)
    return model
