"""Units in the ways in which a person writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from families import discovered
from llm_pruner.errors import InfeasibleError, UserError
from llm_pruner.planning import Plan
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import prune_

FFN = "layers.0.ffn"
IDS = torch.arange(3, 9)[None]


def mask(*units: int) -> np.ndarray[Any, Any]:
    return np.isin(np.arange(40), units)


def counted(removal: Any) -> int:
    return count_parameters(discovered("llama")[1], removal)


def pruned(removal: Any) -> int:
    model, discovery = discovered("llama")
    model = copy.deepcopy(model)
    prune_(model, discovery, removal, verify=False)
    return sum(one.numel() for one in model.parameters())


def planned(removal: Any) -> str:
    _, discovery = discovered("llama")
    said = {"package_version": "0", "model_name": "tiny"}
    return Plan.from_removal(discovery, removal, **said).groups[0].removed


def silenced(removal: Any) -> float:
    return twin_logits(*discovered("llama"), removal, IDS)[0].double().sum().item()


TAKERS = [counted, pruned, planned, silenced]


@pytest.mark.parametrize("take", TAKERS)
def test_units_in_any_collection_are_the_same_units(take: Callable[[Any], Any]) -> None:
    wanted = take({FFN: np.array([1, 4])})
    assert wanted != take({FFN: np.array([1, 5])}) or take in (counted, pruned)
    for units in (
        (1, 4),
        {4, 1},
        [4, 1],
        range(1, 5, 3),
        dict.fromkeys((1, 4)),
        iter([1, 4]),
        np.array([4, 1], np.uint8),
        torch.tensor([1, 4]),
        mask(1, 4),
        mask(1, 4).tolist(),
        torch.from_numpy(mask(1, 4)),
    ):
        assert take({FFN: units}) == wanted, units
    assert counted({FFN: ()}) == counted({FFN: []}) == counted({}) == counted(None)


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize(
    ("units", "message"),
    [
        (np.array([1.0, 4.0]), r"layers.0.ffn: units are whole numbers, .* not \[1. 4.\]"),
        (np.array([[1, 4]]), "units are whole numbers"),
        ([True, False], "or a mask of 40 truth values"),
        ([1, 1], "duplicate units 1"),
        ([-1], r"out of range \(-1\)"),
        ([40], r"out of range \(40\)"),
    ],
)
def test_what_names_no_units_is_refused(
    take: Callable[[Any], Any], units: Any, message: str
) -> None:
    with pytest.raises(InfeasibleError, match=message):
        take({FFN: units})


@pytest.mark.parametrize("take", TAKERS)
def test_a_removal_is_units_by_groups(take: Callable[[Any], Any]) -> None:
    with pytest.raises(InfeasibleError, match=r"layers.0.fnn is no group .* did you mean layers"):
        take({"layers.0.fnn": [1]})


def test_logits_of_a_wrapped_model_on_ids_of_any_kind() -> None:
    model, discovery = discovered("llama")
    held = SimpleNamespace(network=model)
    removal = {FFN: [1]}
    for one in (model, held, SimpleNamespace(model=model)):
        for ids in (IDS, IDS.numpy(), IDS.tolist(), IDS.int()):
            found = twin_logits(one, discovery, removal, ids)  # type: ignore[arg-type]
            assert torch.equal(found[0], twin_logits(model, discovery, removal, IDS)[0])
            whole = pruned_logits(one, discovery, ids)  # type: ignore[arg-type]
            assert torch.equal(whole[0], pruned_logits(model, discovery, IDS)[0])
    for ids, message in (
        (IDS[0], r"token ids of shape \(6,\) and type torch.int64 cannot be read; give integers"),
        (IDS.float(), "type torch.float32 cannot be read"),
        (IDS + 1000, "token ids run from 1003 to 1008"),
    ):
        for take in (lambda x: twin_logits(model, discovery, removal, x), pruned_of):
            with pytest.raises(UserError, match=message):
                take(ids)


def pruned_of(ids: Any) -> Any:
    return pruned_logits(*discovered("llama"), ids)


def test_the_twin_of_another_model_is_refused() -> None:
    model, discovery = discovered("llama")
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, {FFN: np.array([1])})
    with pytest.raises(InfeasibleError, match=r"has shape \(39, 48\), the traced model \(40, 48\)"):
        twin_logits(smaller, discovery, {FFN: [2]})
    del smaller.model.layers[1:]
    for take in (twin_logits, prune_):
        with pytest.raises(InfeasibleError, match="run discover again on the model as it is"):
            take(smaller, discovery, {"layers.1.ffn": [2]})
