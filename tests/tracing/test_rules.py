"""One small net per pattern of code: what goes together, and what is frozen for which reason."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_pruner.discovery.groups import discover
from llm_pruner.tracing.ops import OPS, operation
from llm_pruner.types import Discovery, Group
from nets import HEADS, HIDDEN, SIZE, Attention, Body, Concat, Gated, Net
from removals import cut_as_twin_, pick


def found(net: Net) -> Discovery:
    """Discover, and check on the way that what may be pruned can be pruned."""
    discovery = discover(net)
    removal = pick(discovery)
    assert removal
    assert cut_as_twin_(copy.deepcopy(net), discovery, removal) > 1e-3
    return discovery


def of_kind(discovery: Discovery, kind: str) -> Group:
    (group,) = [group for group in discovery.groups if group.kind == kind]
    return group


def members(group: Group) -> dict[tuple[str, int], list[list[int]]]:
    return {
        (member.tensor.removeprefix("bodies.0."), member.dim): member.index.tolist()
        for member in group.members
    }


def reasons(discovery: Discovery, tensor: str, dim: int) -> str | None:
    trace = discovery.graph.trace
    rows = trace.tensors[f"bodies.0.{tensor}"][dim]
    return trace.atoms.reason(rows)


def column(count: int, start: int = 0) -> list[list[int]]:
    return [[i] for i in range(start, start + count)]


def test_residual_stream_is_one_group() -> None:
    hidden = of_kind(found(Net(Body(torch.relu), Gated())), "hidden")
    assert hidden.size == HIDDEN
    assert {(member.tensor, member.dim) for member in hidden.members} == {
        ("embed.weight", 1),
        ("out.weight", 1),
        ("bodies.0.up.weight", 1),
        ("bodies.0.down.weight", 0),
        ("bodies.0.down.bias", 0),
        ("bodies.1.gate.weight", 1),
        ("bodies.1.up.weight", 1),
        ("bodies.1.down.weight", 0),
        ("bodies.1.down.bias", 0),
    }
    assert all((member.index == np.arange(HIDDEN)[:, None]).all() for member in hidden.members)
    # In the order of execution: the embedding first, the output last.
    orders = [member.order for member in hidden.members]
    assert orders == sorted(orders)
    assert (hidden.members[0].tensor, hidden.members[-1].tensor) == ("embed.weight", "out.weight")


def test_tied_embeddings_are_one_tensor() -> None:
    discovery = found(Net(Gated(), tied=True))
    assert discovery.aliases == {"out.weight": "embed.weight"}
    assert "out.weight" not in discovery.shapes
    tensors = [member.tensor for member in of_kind(discovery, "hidden").members]
    assert tensors.count("embed.weight") == 1
    assert "out.weight" not in tensors


def test_vocabulary_is_frozen() -> None:
    discovery = found(Net(Gated()))
    frozen = {(axis.tensor, axis.dim): axis for axis in discovery.frozen}
    for tensor in ("embed.weight", "out.weight"):
        axis = frozen[tensor, 0]
        assert (axis.positions, axis.size) == (20, 20)
        assert axis.reason == "the vocabulary"


def test_gated_mlp() -> None:
    ffn = of_kind(found(Net(Gated())), "ffn")
    assert members(ffn) == {
        ("gate.weight", 0): column(8),
        ("gate.bias", 0): column(8),
        ("up.weight", 0): column(8),
        ("up.bias", 0): column(8),
        ("down.weight", 1): column(8),
    }
    assert ffn.layer == 0


def test_concat_keeps_branches_apart() -> None:
    discovery = found(Net(Concat()))
    first, second = (group for group in discovery.groups if group.kind == "other")
    assert members(first)["down.weight", 1] == column(5)
    assert members(second)["down.weight", 1] == column(7, 5)
    assert ("b.weight", 0) not in members(first)


def test_separate_projections() -> None:
    discovery = found(Net(Attention()))
    heads, channels = of_kind(discovery, "heads"), of_kind(discovery, "head_dim")
    rows = np.arange(HEADS * SIZE).reshape(HEADS, SIZE)
    assert set(members(heads)) == {
        *((f"{name}.{part}", 0) for name in "qkv" for part in ("weight", "bias")),
        ("o.weight", 1),
    }
    assert all(index == rows.tolist() for index in members(heads).values())
    assert members(channels)["k.weight", 0] == rows.T.tolist()
    assert set(members(of_kind(discovery, "value_dim"))) == {
        ("v.weight", 0),
        ("v.bias", 0),
        ("o.weight", 1),
    }


def test_fused_projection_one_after_the_other() -> None:
    discovery = found(Net(Attention("fused")))
    heads = members(of_kind(discovery, "heads"))["qkv.weight", 0]
    width = HEADS * SIZE
    assert heads[1] == [
        *range(4, 8),
        *range(width + 4, width + 8),
        *range(2 * width + 4, 2 * width + 8),
    ]
    value = members(of_kind(discovery, "value_dim"))["qkv.weight", 0]
    assert value[0] == [2 * width + SIZE * head for head in range(HEADS)]


def test_fused_projection_inside_each_head() -> None:
    discovery = found(Net(Attention("per_head")))
    heads = members(of_kind(discovery, "heads"))["qkv.weight", 0]
    assert heads[1] == list(range(12, 24))
    value = members(of_kind(discovery, "value_dim"))["qkv.weight", 0]
    assert value[0] == [8, 20, 32]


def test_shared_keys_and_values() -> None:
    discovery = found(Net(Attention(heads=6, kv_heads=2)))
    heads, queries = of_kind(discovery, "heads"), of_kind(discovery, "query_heads")
    assert (heads.size, queries.size) == (2, 6)
    assert members(heads)["q.weight", 0] == np.arange(24).reshape(2, 12).tolist()
    assert members(heads)["k.weight", 0] == np.arange(8).reshape(2, 4).tolist()
    assert set(members(queries)) == {("q.weight", 0), ("q.bias", 0), ("o.weight", 1)}
    assert members(queries)["q.weight", 0] == np.arange(24).reshape(6, 4).tolist()
    assert queries.blocks is not None
    assert queries.blocks.tolist() == [0, 0, 0, 1, 1, 1]


def test_sizes_written_in_the_code() -> None:
    discovery = found(Net(Attention("literal")))
    assert {group.kind for group in discovery.groups} == {"hidden"}
    for tensor, dim in (("q.weight", 0), ("v.bias", 0), ("o.weight", 1)):
        assert reasons(discovery, tensor, dim) == "its size 3 is written in the code (view)"


def test_size_used_as_a_number() -> None:
    discovery = found(Net(Attention("scaled")))
    # The heads may go; the size of a head must stay, since the scale is computed from it.
    assert {group.kind for group in discovery.groups} == {"hidden", "heads"}
    assert re.fullmatch(
        r"size is used as a number in the code \(nets\.py:\d+\)", reasons(discovery, "q.weight", 0)
    )


def rotated(
    halves: Callable[[torch.Tensor], Any],
) -> Callable[[torch.Tensor], torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x)
        return x + torch.cat([-second, first], dim=-1)

    return rotate


def negatives_set_to_zero(x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    x[x < 0] = 0
    return x


ROTARY = [[0, 4], [1, 5], [2, 6], [3, 7]]
EIGHT = column(8)
PRUNABLE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Any, Any]] = {
    "strided slices": (
        lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        ROTARY,
    ),
    "rotation": (
        rotated(lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])),
        ROTARY,
        ROTARY,
    ),
    "rotation by tensor_split": (
        rotated(lambda x: torch.tensor_split(x, [x.shape[-1] // 2], dim=-1)),
        ROTARY,
        ROTARY,
    ),
    "an unread new tensor": (lambda x: (x, x.new_zeros(2, *x.shape))[0], EIGHT, EIGHT),
    "float8": (lambda x: x.to(torch.float8_e4m3fn).to(x.dtype), EIGHT, EIGHT),
    "repeat": (lambda x: x.repeat(1, 1, 2), EIGHT, [[i, i + 8] for i in range(8)]),
    "expand": (lambda x: x * torch.ones(1, 1, 1).expand_as(x), EIGHT, EIGHT),
    "a number written by a mask": (negatives_set_to_zero, EIGHT, EIGHT),
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_prunable(name: str) -> None:
    function, up, down = PRUNABLE[name]
    inner = sum(map(len, down))
    found_members = members(of_kind(found(Net(Body(function, inner=inner))), "other"))
    assert found_members["up.weight", 0] == up
    assert found_members["down.weight", 1] == down


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * torch.ones(x.shape[-1]).sum(),
        lambda x: x * CONSTANT.view(x.new_zeros(x.shape[-1]).shape).sum(),
    ],
)
def test_the_length_of_a_new_tensor_that_is_read(read: Any) -> None:
    discovery = found(Net(Body(read)))
    assert "cannot follow" in str(of_kind(discovery, "other").frozen)


def test_layers_must_follow_each_other() -> None:
    # The caller adds the input to each body's output: a body cannot be replaced by its input.
    discovery = found(Net(Gated(), Gated()))
    assert "layers" not in {group.kind for group in discovery.groups}


CONSTANT = torch.linspace(0.5, 1.5, 8)

FROZEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, int]] = {
    "unknown operation": (lambda x: torch.fft.fft(x).real, "no rule for the operation _fft", 8),
    "cut by plain numbers inside a function": (
        lambda x: torch.cat(torch.tensor_split(x, 3, dim=-1)[::-1], dim=-1),
        "resized inside tensor_split",
        8,
    ),
    "cut at a literal place": (
        lambda x: torch.cat(torch.tensor_split(x, [3], dim=-1)[::-1], dim=-1),
        "its size 3 is written in the code (slice)",
        8,
    ),
    "cut at a literal": (lambda x: x[..., :3], "its size 3 is written in the code (slice)", 3),
    "cut from the end": (lambda x: x[..., -3:], "its size 3 is written in the code (slice)", 3),
    "literal split": (
        lambda x: torch.cat(x.split([3, 5], dim=-1)[::-1], dim=-1),
        "is written in the code (split)",
        8,
    ),
    "length as a factor": (lambda x: x * x.shape[-1], "its size is used as a number", 8),
    "count of elements as a divisor": (lambda x: x / x.numel(), "its size is used as a number", 8),
    "length by len": (lambda x: x * len(x[0, 0]), "its size is used as a number", 8),
    "length as a filling": (
        lambda x: x * torch.full((1,), x.shape[-1]),
        "its size is used as a number",
        8,
    ),
    "single positions": (lambda x: x * x[..., 2:3], "is written in the code (slice)", 8),
    "first position": (lambda x: x * x[..., :1], "single positions of it are taken", 8),
    "split into single positions": (
        lambda x: torch.cat([part * 2 for part in x.split(1, dim=-1)], dim=-1),
        "single positions of it are taken",
        8,
    ),
    "unbound": (lambda x: x * sum(x.unbind(-1)).unsqueeze(-1), "single positions of it", 8),
    "running sum": (lambda x: x.cumsum(-1), "summed position after position", 8),
    "flipped": (lambda x: x.flip(-1), "reordered by flip", 8),
    "rolled": (lambda x: x.roll(1, -1), "reordered by roll", 8),
    "padded": (lambda x: F.pad(x, (0, 2)), "padded in the code", 10),
    "shifted": (lambda x: F.pad(x, (1, -1)), "padded in the code", 8),
    "triangular": (lambda x: x.tril(), "a triangular mask", 8),
    "position table": (lambda x: x * torch.arange(8), "computed from positions", 8),
    "position table by length": (
        lambda x: x * torch.arange(x.shape[-1]),
        "computed from positions",
        8,
    ),
    "constant from outside": (lambda x: x * CONSTANT, "a constant in the code", 8),
    "chosen by value": (
        lambda x: x * torch.zeros_like(x).scatter(-1, 7 - x.topk(2, -1).indices, 1.0),
        "its positions are chosen by rsub",
        8,
    ),
    "looked up": (lambda x: x[..., torch.tensor([1, 0, 2])], "looked up by position", 3),
    "selected by a mask": (
        lambda x: x[:, :, torch.tensor([True] * 3 + [False] * 5)],
        "looked up by position",
        3,
    ),
    "sorted": (lambda x: x.sort(-1).values, "ordered by sort", 8),
    "code follows values": (
        lambda x: x * (x.abs().amax((0, 1)).tolist()[0] + 1),
        "the code follows its values (tolist)",
        8,
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_a_reason(name: str) -> None:
    function, reason, inner = FROZEN[name]
    discovery = found(Net(Body(function, inner=inner)))
    stuck = {(axis.tensor, axis.dim): axis for axis in discovery.frozen}
    axis = stuck["bodies.0.up.weight", 0]
    assert reason in axis.reason


def _in_range(x: torch.Tensor) -> torch.Tensor:
    x = x.square()  # a removed channel, which is zero, would be the lowest
    low, high = x.aminmax(dim=-1, keepdim=True)
    return (x - low) / (high - low)


def test_a_rule_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs/how-to/add-rule.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "@rule" in block]
    (tmp_path / "rule_of_a_user.py").write_text(example)
    net = Net(Body(_in_range))
    stuck = {(axis.tensor, axis.dim): axis.reason for axis in discover(net).frozen}
    assert stuck["bodies.0.up.weight", 0] == "no rule for the operation aminmax"
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("rule_of_a_user")
    try:
        assert members(of_kind(found(net), "other"))["down.weight", 1] == column(8)
    finally:
        del OPS["aminmax"]
        operation.cache_clear()


def test_largest_activations_leave_as_many_as_are_taken() -> None:
    def largest(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * torch.zeros_like(x).scatter(-1, x.topk(3, -1).indices, 1.0)

    ffn = of_kind(found(Net(Body(largest))), "ffn")
    assert (ffn.size, ffn.least) == (8, 3)
