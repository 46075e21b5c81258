"""Tensors of which only the parts are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_pruner.models.assembled import (
    Assembled,
    are_mapped,
    element,
    files,
    leaves,
    put_together_late,
    whole,
)
from llm_pruner.models.stored_weight import mapped_files


def made() -> tuple[Assembled, torch.Tensor]:
    """Return experts, stacked and joined, and the same as a plain tensor."""
    gates, ups = (list(torch.randn(4, rows, 5).unbind()) for rows in (2, 3))
    stacks = [Assembled(tuple(parts), 0, stacked=True) for parts in (gates, ups)]
    expected = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
    return Assembled(tuple(stacks), -2, stacked=False), expected


def test_what_asks_for_values_gets_those_of_the_parts() -> None:
    note, expected = made()
    assert note.shape == expected.shape == (4, 5, 5)
    assert type(whole(note)) is torch.Tensor
    assert torch.equal(whole(note), expected)
    assert torch.equal(note + 1, expected + 1)
    assert torch.equal(note[1:3, ..., 2], expected[1:3, ..., 2])
    assert isinstance(note.detach(), Assembled)
    parameter = torch.nn.Parameter(note)
    assert isinstance(parameter, Assembled)
    assert parameter.requires_grad
    assert torch.equal(parameter.double(), expected.double())


def test_the_parts_have_their_places() -> None:
    note, expected = made()
    into = torch.zeros_like(expected)
    for leaf, place in leaves(note, into):
        assert not place.any()
        place.copy_(leaf)
    assert torch.equal(into, expected)
    assert len([*files(note)]) == 8
    flat = expected.reshape(-1)
    for index in range(flat.numel()):
        assert torch.equal(element(note, index), flat[index : index + 1])


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_axis(dim: int) -> None:
    parts = tuple(torch.randn(3, 2, 3).unbind())
    assert torch.equal(whole(Assembled(parts, dim, stacked=True)), torch.stack(parts, dim))
    if dim < 2:
        assert torch.equal(whole(Assembled(parts, dim, stacked=False)), torch.cat(parts, dim))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="tells no maps of files")
def test_what_lies_in_weight_files_alone_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64, 64), "b": torch.randn(64, 64).half()}, file)
    values = load_file(file)
    a, b = values["a"], values["b"]
    with put_together_late(lambda: mapped_files(tmp_path)):
        assert isinstance(torch.stack([a, a]), Assembled)
        assert isinstance(torch.cat([torch.stack([a, a]), torch.stack([a, a])], dim=1), Assembled)
        for plain in (torch.stack([a, torch.randn(64, 64)]), torch.cat([a.T, a.T])):
            assert type(plain) is torch.Tensor
        assert type(torch.cat([a.float(), b.float()])) is torch.Tensor
    assert type(torch.stack([a, a])) is torch.Tensor
    assert not are_mapped(torch.randn(64, 64), mapped_files(tmp_path))
