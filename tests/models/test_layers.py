"""What the settings say of layers, once some are gone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedConfig

from llm_pruner.models.layers import _filter_config, is_settings


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
