"""Models with several lists of layers, of which each is numbered from 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fake_discovery import units
from llm_pruner import discover, prune_
from llm_pruner.planning import (
    Numbering,
    Selection,
    Target,
    allocate,
    choose_groups,
    explain,
    step_targets,
)
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery
from nets import Gated, Net


class Layer(Gated):
    """A layer that adds to the stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class TwoLists(Net):
    """One list of layers behind the other."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(*(Layer() for _ in range(first)))
        self.others = nn.ModuleList(Layer() for _ in range(second)).eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in (*self.bodies, *self.others):
            x = body(x)
        return self.out(x)


def found(first: int, second: int) -> Discovery:
    discovery = discover(TwoLists(first, second))
    paths = {group.name: group.path for group in discovery.groups if group.kind == "layers"}
    names = ("bodies", "others") if first >= second else ("others", "bodies")
    assert paths == dict(zip(("layers", "layers_2"), names, strict=True))
    return discovery


class Heads(Net):
    """Beside the layers lies a list that is none of layers."""

    def __init__(self) -> None:
        super().__init__(*(Layer() for _ in range(3)))
        self.heads = nn.ModuleList(Gated() for _ in range(3)).eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for body in self.bodies:
            x = body(x)
        return self.out(torch.stack([head(x) for head in self.heads]).sum(0))


def test_a_layer_of_one_list_takes_none_of_another() -> None:
    discovery = found(3, 2)
    removal = {"layers": units(1, 2), "layers_2": units(0)}
    left = Numbering.dense(discovery).after(removal)
    assert {path: kept.tolist() for path, kept in left.layers.items() if path} == {
        "bodies": [0],
        "others": [1],
    }
    assert {group.path for group in discovery.groups if group.name in left.kept} == {
        *("", "bodies", "others")
    }
    rows = {row.layer: row for row in explain(discovery, removal)}
    assert rows[None].sizes["layers"] == (1, 3)
    assert [rows[layer].removed for layer in range(3)] == [False, False, True]
    assert [rows[layer].sizes for layer in range(3)] == [
        {"ffn": (8, 8), "ffn_2": (0, 8)},
        {"ffn": (0, 8), "ffn_2": (8, 8)},
        {"ffn": (0, 8)},
    ]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_lists_are_the_same_in_every_step(scope: Any) -> None:
    """The list that is the longest at first is the shorter one after two steps."""
    model, dense = TwoLists(4, 3), found(4, 3)
    size = count_parameters(dense)
    three = size - count_parameters(dense, {"layers": units(0, 1, 2)})
    selection, target = Selection(("layers",), scope=scope), Target(params=size - three)
    importance = {"bodies": np.arange(4.0), "others": 9 + np.arange(3.0)}
    numbering, discovery = Numbering.dense(dense), dense
    for step in step_targets(size, target, 3):
        scores = {
            group.name: importance[group.path][numbering.layers[group.path]]
            for group in discovery.groups
            if group.kind == "layers"
        }
        removal = allocate(discovery, scores, selection, step, numbering)
        prune_(model, discovery, removal, verify=False)
        numbering = numbering.after(removal)
        discovery = numbering.matched(discover(model))
    gone = {name: numbers.tolist() for name, numbers in numbering.removal().items()}
    assert gone == (
        {"layers": [0, 1, 2]} if scope == "global" else {"layers": [0, 1], "layers_2": [0]}
    )
    assert count_parameters(discovery) == target.params


def test_the_end_of_each_list_is_protected() -> None:
    dense = found(6, 4)
    chosen = choose_groups(dense, Selection(("ffn",), protect_first=2, protect_last=1))
    places = [("bodies", 2), ("bodies", 3), ("bodies", 4), ("others", 2)]
    assert [group.place for group in chosen] == places
    scores = {name: -np.arange(6.0)[: dense.group(name).size] for name in ("layers", "layers_2")}
    expected = {1: {"layers": [3, 4], "layers_2": [2]}, 4: {"layers": [1]}}
    for protected, gone in expected.items():
        selection = Selection(("layers",), protect_last=protected)
        removal = allocate(dense, scores, selection, Target(unit_ratio=0.5))
        assert {name: numbers.tolist() for name, numbers in removal.items()} == gone
