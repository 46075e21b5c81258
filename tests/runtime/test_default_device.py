"""What the package computes on the processor stays there, whatever device new tensors have.

``meta`` stands for a GPU: what is made there by mistake cannot be brought back.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import numpy as np
import torch

import llm_pruner
from families import discovered
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.data.selfmade import write_text
from llm_pruner.discovery.groups import discover
from llm_pruner.importance import Criterion, score
from llm_pruner.surgery.verify import prune_

MAKES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"}
MAKES |= {"randn", "randperm", "tensor", "zeros"}

OF_MODELS = {"modeling.py", "modeling_pruned.py", "remote_code.py"}
"""Modelling code, which is run where models are made, and what runs it."""


def test_new_tensors_are_told_where_to_be() -> None:
    folder = Path(llm_pruner.__file__).parent
    found = [
        f"{file.relative_to(folder)}:{node.lineno}"
        for file in folder.rglob("*.py")
        if file.name not in OF_MODELS
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in MAKES and ast.unparse(node.func.value) == "torch"
        if "device" not in [one.arg for one in node.keywords]
    ]
    assert found == []


def test_steps_under_another_default_device() -> None:
    dense, expected = discovered("llama")
    model = copy.deepcopy(dense)
    ids = torch.arange(3, 27).view(2, 12)
    scores = score(dense, expected, Criterion("taylor"), input_ids=ids, seed=0)
    with torch.device("meta"):
        found = discover(model)
        again = score(model, found, Criterion("taylor"), input_ids=ids, seed=0)
        prune_(model, found, {"layers.0.ffn": np.array([0])})
    assert found.shapes == expected.shapes
    assert all(np.array_equal(scores[name], again[name]) for name in scores)
    assert model.model.layers[0].mlp.gate_proj.weight.device.type == "cpu"


def test_text_is_written_under_another_default_device() -> None:
    model = tiny_model()
    with torch.device("meta"):
        found = write_text(model, tiny_tokenizer(), samples=2, seq_len=8, seed=0)
    assert torch.equal(found, write_text(model, tiny_tokenizer(), samples=2, seq_len=8, seed=0))
