"""Take tokens out of a language model: rows of its embeddings, and the numbers in its configs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.errors import UserError
from llm_pruner.files.disk import short_digest
from llm_pruner.models.forward import embedding_rows
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.streaming import cut_parameter, is_streamed
from llm_pruner.types import Edits

_TOKENS = re.compile(r"(_token_(ids?|index)|suppress_tokens|_words_ids)$")
"""Names of settings that hold tokens."""
_OF_LAYERS = "embed_tokens_per_layer"
"""Name of a second embedding, of inputs of each layer (Gemma 3n and 4)."""


def named_tokens(model: Any) -> set[int]:
    """Return the ids of the tokens that the settings of a model name, such as the end of a text."""
    found: set[int] = set()

    def note(value: int) -> int:
        found.add(value)
        return value

    for config in _configs(model):
        _rewrite_(config, note)
    return found


def check_tables(model: Any) -> None:
    """Raise UserError if not all that have a row for each token have as many of them."""
    rows = embedding_rows(model)
    for name, module in _tables(model).items():
        for other in {len(weight) for weight in module.parameters(recurse=False)} - {rows}:
            raise UserError(
                f"the embedding of {type(model).__name__} has {rows} rows and {name} has {other}: "
                "tokens are taken out where all tables have as many; prune the model as it is"
            )


def _tables(model: Any) -> dict[str, nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name: one
        for name, one in model.named_modules()
        if one in ends or name.rpartition(".")[2] == _OF_LAYERS
    }


def with_tokens_of(dense: LoadedModel, student: LoadedModel) -> LoadedModel:
    """Return a dense model that has the student's tokens alone, so that the two can be compared.

    Tokens are matched by their texts. It is ``dense`` itself where the student has the same tokens
    or others; else a copy that shares all weights but the embeddings.
    """
    if dense.tokenizer is None or student.tokenizer is None:
        return dense
    ours, theirs = student.tokenizer.get_vocab(), dense.tokenizer.get_vocab()
    tokens = sorted(ours, key=ours.__getitem__)
    kept = np.array([theirs.get(token, -1) for token in tokens])
    rows = embedding_rows(dense.model)
    fewer = len(kept) == embedding_rows(student.model) and len(kept) < max(rows, len(theirs))
    known = 0 <= kept.min() <= kept.max() < rows
    if not (fewer and known and named_tokens(dense.model) <= {*kept.tolist()}):
        return dense
    model: Any = sharing_copy(dense.model)
    cut_vocabulary_(model, kept)
    name = f"{dense.name}, {len(kept):,} of its tokens"
    own = short_digest(dense.fingerprint, kept.tobytes())
    model = model.eval()
    return replace(dense, model=model, tokenizer=student.tokenizer, name=name, fingerprint=own)


def cut_vocabulary_(model: Any, kept: npt.NDArray[np.int64]) -> Edits:
    """Keep the rows of some tokens in the embeddings, and renumber the settings.

    Returns:
        The new shapes of the embeddings, under each of their names.
    """
    rows, before = torch.from_numpy(kept), embedding_rows(model)
    new = {int(old): index for index, old in enumerate(kept)}
    cut: dict[int, nn.Parameter] = {}
    tables = _tables(model).values()
    for module in tables:
        for weight in module.parameters(recurse=False):
            if id(weight) not in cut:
                if is_streamed(weight):
                    cut[id(weight)] = cut_parameter(weight, {0: kept})
                    continue
                values = weight.detach()[rows.to(weight.device)].contiguous()
                cut[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, len(kept))
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in cut:
                module._parameters[name] = cut[id(weight)]
        for name, table in module._buffers.items():
            numbers = table is not None and not table.is_floating_point()
            if numbers and table.shape[:1] == (before,):
                module._buffers[name] = table[rows.to(table.device)]
    inner = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    holders = {id(one): one for one in (*tables, *inner)}.values()
    for module in holders:
        if vars(module).get("padding_idx") is not None:
            module.padding_idx = new.get(module.padding_idx)
    text = model.config.get_text_config()
    model.vocab_size = text.vocab_size = len(kept)
    for holder in (*holders, text):
        for size in {"vocab_size", "vocab_size_per_layer_input"} & vars(holder).keys():
            setattr(holder, size, len(kept))
    writing = model.generation_config
    as_published = getattr(writing, "_original_object_hash", None) == hash(writing)
    for config in _configs(model):
        _rewrite_(config, new.__getitem__)
    if writing is not None and as_published:
        # Else transformers checks all of the published settings before it saves them.
        writing._original_object_hash = hash(writing)
    ours, named = {*map(id, cut.values())}, model.named_parameters(remove_duplicate=False)
    return Edits(shapes={name: (*one.shape,) for name, one in named if id(one) in ours})


def _configs(model: Any) -> list[Any]:
    parts = (
        one
        for one in vars(model.config).values()
        if isinstance(one, PreTrainedConfig) and "vocab_size" not in vars(one)
    )
    own = (model.config, model.config.get_text_config(), model.generation_config)
    all_of_them = (*own, *parts)
    return [*{id(one): one for one in all_of_them if one is not None}.values()]


def _rewrite_(config: Any, change: Callable[[int], int]) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(changed, value))
        is_token = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return change(value) if is_token else value

    for name, value in list(vars(config).items()):
        if _TOKENS.search(name) and value is not None:
            setattr(config, name, changed(value))
        elif name == "sequence_bias" and value:  # {tokens: bias}, or in JSON [[tokens, bias]]
            if isinstance(value, dict):
                biases: Any = {changed(tokens): bias for tokens, bias in value.items()}
            else:
                biases = [[changed(tokens), bias] for tokens, bias in value]
            setattr(config, name, biases)
