"""Weights of a wider type than most of a checkpoint, where weights are read block by block.

A model that is to be read so is loaded in the type of most of its files, as a weight that is cast
is no view of them; others would be rounded to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from llm_pruner.errors import NeedsMemory
from llm_pruner.models.stored import rounded_by

_LEFT_OUT = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Tensors of earlier versions that transformers passes over in the files of any model."""


def unrounded(
    source: str,
    model: PreTrainedModel,
    folder: Path,
    there: torch.dtype,
    kind: torch.dtype,
    unread: Collection[str],
) -> dict[int, torch.Tensor]:
    """Return id of a parameter -> its values, where the type that it was loaded in rounds them.

    Args:
        there: the type that it was loaded in.
        kind: that it will compute in; where it is no wider, a model in memory is rounded as well.
        unread: names of weights in the files that the model does not have.

    Raises:
        NeedsMemory: the model has such a weight under another name, and which is not known.
    """
    if torch.promote_types(kind, there) == there:
        return {}  # in which a model in memory would have them, too
    own = model.state_dict(keep_vars=True)
    found: dict[int, torch.Tensor] = {}
    # What the class leaves out without a word, and what it has in float32 in any case.
    left_out = (*_LEFT_OUT, *(model._keys_to_ignore_on_load_unexpected or ()))
    exact = re.compile("|".join((*left_out, *map(re.escape, model._get_dtype_plan(there)))))
    for tensor in rounded_by(folder, there):
        if tensor.name in own:
            with safe_open(tensor.file, "pt") as weights:
                found[id(own[tensor.name])] = weights.get_tensor(tensor.name)
        elif tensor.name not in unread and not exact.search(tensor.name):
            raise NeedsMemory(
                f"{source} has {tensor.name} in {tensor.dtype} under another name than the model, "
                f"and most weights in {str(there).removeprefix('torch.')}, to which it would be "
                "rounded where weights are read block by block"
            )
    return found
