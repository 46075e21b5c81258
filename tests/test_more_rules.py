"""Patterns of code beyond the plain ones: the pruned model equals a dense copy with zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner.groups import discover
from llm_pruner.removal import removed_positions
from llm_pruner.surgery import prune_
from llm_pruner.tracing.run import evaluating, logits_of
from llm_pruner.types import Discovery, Group, Removal
from llm_pruner.verification import largest_difference, pruned_logits, twin_logits
from nets import HIDDEN, VOCABULARY, Net
from removals import bound_to, pick

LENGTHS = (3, 8, 40)


def removals(discovery: Discovery) -> Iterator[Removal]:
    """Yield one removal for each group with what is bound to it, and one of all groups."""
    for group in discovery.groups:
        if group.frozen is None:
            picked = pick(discovery, (group.kind,), seed=1)
            removal = {name: picked[name] for name in bound_to(discovery, group) if name in picked}
            if removal:
                yield removal
    yield pick(discovery)


def zeroed(model: nn.Module, discovery: Discovery, removal: Removal) -> nn.Module:
    """Return a dense copy with zeros at the removed positions of every parameter."""
    dense = copy.deepcopy(model)
    parameters = dict(dense.named_parameters())
    for (name, dim), gone in removed_positions(discovery, removal).items():
        if name in parameters:
            parameters[name].data.index_fill_(dim, torch.from_numpy(gone), 0.0)
    return dense


def checked(
    model: nn.Module, *, dense: bool = True, lengths: tuple[int, ...] = LENGTHS
) -> Discovery:
    """Discover in float64, and compare what is left of each removal with the masked twin.

    Args:
        dense: compare with a zeroed dense copy as well, which knows nothing of the trace; only
            where no norm or softmax sees the removed positions.
    """
    model = model.double().eval()
    discovery = discover(model)
    for removal in removals(discovery):
        assert removal
        smaller = copy.deepcopy(model)
        prune_(smaller, discovery, removal)
        for length in lengths:
            tokens = torch.randint(
                VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length)
            )
            expected = twin_logits(model, discovery, removal, tokens)
            actual = pruned_logits(smaller, discovery, tokens)
            assert largest_difference(expected, actual) <= 1e-9, (list(removal), length)
            if dense and not any(discovery.group(name).modules for name in removal):
                with evaluating(model):
                    plain = [logits_of(zeroed(model, discovery, removal)(tokens))]
                assert largest_difference(plain, actual) <= 1e-9, (list(removal), length)
            original = pruned_logits(model, discovery, tokens)
            assert largest_difference(original, actual) > 1e-6
    return discovery


def of_kind(discovery: Discovery, kind: str) -> list[Group]:
    return [group for group in discovery.groups if group.kind == kind]


def free(discovery: Discovery) -> set[str]:
    return {group.kind for group in discovery.groups if group.frozen is None}


def member(group: Group, tensor: str, dim: int) -> list[list[int]]:
    (found,) = [m for m in group.members if m.tensor.endswith(tensor) and m.dim == dim]
    return found.index.tolist()


# --------------------------------------------------------------------------------- convolutions


class Mixer(nn.Module):
    """up, a convolution along the sequence, down."""

    def __init__(self, make: Callable[[], nn.Module], width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(out, HIDDEN)
        self.conv = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.gelu(self.up(x)).transpose(1, 2))
        return self.down(F.gelu(y[..., : x.shape[1]].transpose(1, 2)))


def test_transposed_convolution() -> None:
    discovery = checked(Net(Mixer(lambda: nn.ConvTranspose1d(8, 6, 3), out=6)))
    first, second = of_kind(discovery, "ffn")
    assert (first.size, second.size) == (8, 6)
    assert member(first, "conv.weight", 0) == [[i] for i in range(8)]
    assert member(second, "conv.weight", 1) == [[i] for i in range(6)]


GROUPED = {
    "plain": (lambda: nn.Conv1d(8, 6, 3, padding=2), 6, {8, 6}),
    "same": (lambda: nn.Conv1d(8, 6, 3, padding="same"), 6, {8, 6}),
    "circular": (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"), 6, {8, 6}),
    "replicate": (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="replicate"), 6, {8, 6}),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, padding=2, groups=8), 8, {8}),
    "depthwise with a multiplier": (
        lambda: nn.Conv1d(8, 16, 3, padding=2, groups=8), 16, {8, 2},
    ),
    "groups": (lambda: nn.Conv1d(8, 6, 3, padding=2, groups=2), 6, {2, 4, 3}),
    "transposed depthwise": (lambda: nn.ConvTranspose1d(8, 8, 3, groups=8), 8, {8}),
    "transposed multiplier": (lambda: nn.ConvTranspose1d(8, 16, 3, groups=8), 16, {8, 2}),
    "transposed groups": (lambda: nn.ConvTranspose1d(8, 6, 3, groups=2), 6, {2, 4, 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_a_convolution(name: str) -> None:
    make, out, sizes = GROUPED[name]
    net = Net(Mixer(make, out=out))
    discovery = checked(net)
    inner = [group for group in discovery.groups if group.kind != "hidden"]
    assert {group.size for group in inner} == sizes
    assert all(group.frozen is None for group in inner)
    prune_(net, discovery, pick(discovery))
    conv = net.bodies[0].conv
    transposed = isinstance(conv, nn.ConvTranspose1d)
    first, second = conv.weight.shape[:2]
    grouped = (first, second * conv.groups) if transposed else (second * conv.groups, first)
    assert (conv.in_channels, conv.out_channels) == grouped


class Functional(Mixer):
    """A causal depthwise convolution as a function, over two dimensions, groups by keyword."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.kernel = nn.Parameter(torch.zeros(8, 1, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(self.up(x).mT[..., None], (0, 0, 2, 0))
        y = F.conv2d(y, self.kernel, groups=y.shape[1])
        return self.down(F.gelu(y[..., 0].mT))


def test_groups_given_by_keyword() -> None:
    ffn = of_kind(checked(Net(Functional())), "ffn")
    assert [group.size for group in ffn] == [8]
