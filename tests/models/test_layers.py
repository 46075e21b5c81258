"""What the settings say of layers, once some are gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from llm_pruner import discover, prune_
from llm_pruner.models.layers import _filter_config, is_settings, layer_numbers


class Own(PreTrainedConfig):
    """The number of layers goes by another name, and another number is the same."""

    model_type = "own"

    def __init__(self, **given: Any) -> None:
        self.n_head = 4
        self.depth = 4
        self.windows = [8, 16, 8, 16]
        super().__init__(**given)

    @property
    def num_hidden_layers(self) -> int:
        return self.depth


def test_a_number_of_layers_that_follows_from_another() -> None:
    config = Own()
    with pytest.raises(AttributeError):
        config.num_hidden_layers = 3
    _filter_config(config, 4, [0, 2, 3])
    assert (config.num_hidden_layers, config.n_head) == (3, 4)
    assert config.windows == [8, 8, 16]


def test_a_config_is_settings_whatever_it_is_called() -> None:
    assert is_settings("c", Own())
    assert not is_settings("generation_config", Own())
    assert not is_settings("c", object())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks() -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(4))


class Counted(nn.Module):
    """Holds in its settings, and asks, how many layers a module inside of it has."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layers=4, n_heads=4)
        self.body = nn.ModuleDict({"embedding": nn.Embedding(32, 8), "blocks": blocks()})
        self.head = nn.Linear(8, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.body["embedding"](tokens)
        states = []
        for block in self.body["blocks"]:
            x = block(x)
            states.append(x)
        assert len(states) == self.config.n_layers
        return self.head(x)


def test_settings_of_a_module_around_the_holder_count_the_layers() -> None:
    net = Counted()
    discovery = discover(net)
    (layers,) = (group for group in discovery.groups if group.kind == "layers")
    prune_(net, discovery, {layers.name: np.array([1])})
    assert vars(net.config) == {"n_layers": 3, "n_heads": 4}


def test_a_number_of_layers_may_be_that_of_another_list() -> None:
    net = Counted()
    removed = {"body.blocks": [0, 2, 3]}
    assert [*layer_numbers(net, removed)] == [("", "config.n_layers", 3)]
    net.others = blocks()
    assert not [*layer_numbers(net, removed)]
    assert len([*layer_numbers(net, removed | {"others": [0, 1, 2]})]) == 2
