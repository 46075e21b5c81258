"""A cache with room for the next tokens gives what one without gives."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from helpers import VOCABULARY, tiny_model
from llm_pruner.models.forward import Decoder, make_room_


def decoded(model_type: str, room: int | None, steps: int = 9) -> tuple[torch.Tensor, Decoder]:
    model = tiny_model(model_type)
    tokens = torch.randint(
        VOCABULARY, (3, 4 + steps), generator=torch.Generator().manual_seed(0)
    ).split([4] + [1] * steps, dim=1)
    decoder = Decoder(model)
    logits = [decoder.step(tokens[0])]
    if room is not None:
        make_room_(decoder.cache, room)
    logits += [decoder.step(one) for one in tokens[1:]]
    return torch.stack(logits), decoder


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("room", [13, 7], ids=["enough", "too little"])
def test_room_changes_no_logits(model_type: str, room: int) -> None:
    plain, _ = decoded(model_type, None)
    roomy, _ = decoded(model_type, room)
    torch.testing.assert_close(roomy, plain, rtol=1e-5, atol=1e-6)


def test_tokens_are_written_in_place_while_there_is_room() -> None:
    _, decoder = decoded("llama", 13, steps=2)
    (layer, *_) = decoder.cache.layers
    place = layer.keys.data_ptr()
    for _ in range(7):
        decoder.step(torch.zeros(3, 1, dtype=torch.int64))
    assert (layer.keys.data_ptr(), layer.get_seq_length()) == (place, 13)
    decoder.step(torch.zeros(3, 1, dtype=torch.int64))
    assert layer.keys.data_ptr() != place
    assert layer.get_seq_length() == 14


def test_layers_that_drop_tokens_stay_as_they_are() -> None:
    cut = tiny_model("mistral", sliding_window=3)
    decoder = Decoder(cut)
    decoder.step(torch.zeros(1, 5, dtype=torch.int64))
    before = list(decoder.cache.layers)
    make_room_(decoder.cache, 20)
    assert decoder.cache.layers == before
    assert {type(one) for one in before} == {DynamicSlidingWindowLayer}
