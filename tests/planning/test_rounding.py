"""``--round-to`` by what is to run the model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.planning import Selection, Target, allocate
from llm_pruner.planning.rounding import rounded_for
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.types import Discovery

BOTH = Selection(("heads", "ffn"), scope="global")


@cache
def found(**config: Any) -> Discovery:
    """Return a model so large, by its vocabulary, that a step of 256 channels is fine enough."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_hidden_layers": 4, "vocab_size": 40_000}
    return discover(tiny_model("llama", **{**sizes, **config}))


def rounded(purpose: str, **config: Any) -> tuple[int, int]:
    selection = rounded_for(purpose, found(**config), BOTH)
    return selection.round_to, selection.heads_to


@pytest.mark.parametrize(
    ("purpose", "width", "multiple"),
    [
        ("blocks", 1536, 32),
        ("blocks", 768, 1),
        ("blocks", 1540, 1),
        ("gguf", 1536, 256),
        ("gguf", 1504, 32),  # no multiple of 256 itself
        ("gguf", 768, 32),  # 256 would leave two smaller sizes
        ("gptq", 1536, 128),
        ("marlin", 1536, 64),
        ("tp4", 1536, 4),
    ],
)
def test_multiples_by_purpose(purpose: str, width: int, multiple: int) -> None:
    assert rounded(purpose, intermediate_size=width)[0] == multiple


def test_what_reads_heads_keeps_a_multiple_if_it_has_one() -> None:
    # Each key-value head has 2 * 8 of the 64 inputs of o_proj.
    assert rounded("marlin", intermediate_size=1536) == (64, 4)
    assert rounded("gptq", intermediate_size=1536) == (128, 1)
    assert rounded("tp2", intermediate_size=1536) == (2, 2)


def test_widths_and_heads_of_a_plan_divide() -> None:
    discovery = found(intermediate_size=1536)
    selection = rounded_for("tp2", discovery, BOTH)
    scores = {group.name: np.arange(1.0, group.size + 1) for group in discovery.groups}
    removal = allocate(discovery, scores, selection, Target(ratio=0.1))
    kept = {
        (group.kind, group.size - len(removal.get(group.name, ()))) for group in discovery.groups
    }
    assert all(size % 2 == 0 for kind, size in kept if kind in ("heads", "ffn"))
    assert {size for kind, size in kept if kind == "heads"} != {4}


def test_query_heads_that_go_one_by_one_are_not_rounded() -> None:
    selection = replace(BOTH, structures=("query_heads", "ffn"))
    with pytest.raises(UserError, match=r"--round-to tp2 needs .*; leave query_heads out of"):
        rounded_for("tp2", found(intermediate_size=1536), selection)
    assert rounded_for("blocks", found(intermediate_size=1536), selection)


def test_a_model_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"layers.0.ffn has 1536 units, which do not divide by 5"):
        rounded("tp5", intermediate_size=1536)
    with pytest.raises(UserError, match=r"heads has 4 units, .* by 3; round for another number"):
        rounded("tp3", intermediate_size=1536)  # whichever structures are pruned
    with pytest.raises(UserError, match=r"heads has 4 units, .* leave heads out of the structures"):
        rounded("tp8", intermediate_size=1536)  # which would have each of the 4 twice


@pytest.mark.parametrize(("shared_by", "name"), [(7, "query_heads"), (1, "heads")])
def test_query_heads_divide_whichever_structures_are_pruned(shared_by: int, name: str) -> None:
    sizes = {"hidden_size": 112, "num_attention_heads": 4 * shared_by, "num_key_value_heads": 4}
    discovery = found(**sizes, intermediate_size=1536)
    assert rounded_for("tp4", discovery, Selection(("ffn",))).round_to == 4
    refused = rf"layers\.0\.{name} has {4 * shared_by} units, which do not divide by 8"
    with pytest.raises(UserError, match=refused):
        rounded_for("tp8", discovery, Selection(("ffn",)))


@pytest.mark.parametrize("given", ["blocks", "gguf", "gptq", "marlin", "tp4", "32"])
def test_names_and_numbers(given: str) -> None:
    settings = PruneSettings(model="m", out="o", ratio=0.2, round_to=given)
    assert settings.round_to == (32 if given == "32" else given)
