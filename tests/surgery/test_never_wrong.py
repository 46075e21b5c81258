"""What a short run does not show, and sizes that are used as numbers: right, or frozen and why."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from llm_pruner import discover, prune_
from llm_pruner.errors import VerificationError
from llm_pruner.types import Discovery, Group
from removals import pick

HIDDEN, FFN, HEADS, SIZE, VOCABULARY = 32, 24, 4, 8, 50
LENGTHS = (3, 8, 40, 300)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HEADS * SIZE) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, SIZE).transpose(1, 2)

    def scores(self, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        if mask is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = self.scores(q @ k.mT * 0.3).masked_fill(~mask, -1e9)
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.heads * SIZE))

    def out(self, y: torch.Tensor) -> torch.Tensor:
        return self.o(y)


class Block(nn.Module):
    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = attention or Attention()
        self.a, self.b = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return F.gelu(y)

    def forward(self, x: torch.Tensor, *given: Any) -> torch.Tensor:
        x = x + self.attention(x, *given)
        return x + self.b(self.between(self.a(x)))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.double()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.run(self.embed(tokens)))


def zeroed(model: nn.Module, discovery: Discovery, group: Group, units: np.ndarray) -> nn.Module:
    """Return a dense copy in which the positions of the units are zero; layers hand on."""
    dense = copy.deepcopy(model)
    for unit in units if group.modules else ():
        layer = dense.get_submodule(group.modules[unit])
        layer.forward = lambda x, *_: x  # type: ignore[method-assign]
    for member in group.members:
        index = torch.from_numpy(member.index[units].ravel())
        if not member.buffer:
            dense.get_parameter(member.tensor).data.index_fill_(member.dim, index, 0.0)
    return dense


def logits(model: nn.Module, length: int) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        found = model(ids)
    return found["logits"] if isinstance(found, dict) else found


def is_right(model: nn.Module, discovery: Discovery, kind: str) -> bool:
    """Prune a third of a kind, in the first group of it; compare with a copy that has zeros there.

    Nothing of the twin is used. Returns False if every group of the kind is frozen or absent.
    """
    groups = [g for g in discovery.groups if g.kind == kind and g.frozen is None]
    if not groups:
        return False
    removal = pick(discovery, (kind,))
    removal = {groups[0].name: removal[groups[0].name]}
    smaller = copy.deepcopy(model)
    prune_(smaller, discovery, removal, verify=False)
    dense = zeroed(model, discovery, groups[0], removal[groups[0].name])
    for length in LENGTHS:
        expected, actual = logits(dense, length), logits(smaller, length)
        assert (expected - actual).abs().max() <= 1e-9, (kind, length)
        assert (logits(model, length) - actual).abs().max() > 1e-6
    return True


def why(discovery: Discovery, tensor: str, dim: int = 0) -> str:
    trace = discovery.graph.trace
    return str(trace.atoms.reason(trace.tensors[tensor][dim]))


# ------------------------------------------------------------------- what a short run does not show


def test_window_by_place_in_the_loop() -> None:
    class Windows(Net):
        def run(self, x: torch.Tensor) -> torch.Tensor:
            i = torch.arange(x.shape[1])
            full = i[:, None] >= i
            window = full & (i[:, None] - i < 16)
            for n, layer in enumerate(self.layers):
                x = layer(x, window if n % 2 else full)
            return x

    net = Windows()
    discovery = discover(net)
    (layers,) = (g for g in discovery.groups if g.kind == "layers")
    assert layers.frozen is not None
    assert "argument 1 of a layer depends on its place in the list (test_never_wrong.py:" in (
        layers.frozen
    )
    for kind in ("heads", "ffn"):
        assert is_right(net, discovery, kind)


FAR = (4, 200)


def mask(length: int, window: int = 190) -> torch.Tensor:
    i = torch.arange(length)
    return (i[:, None] >= i) & (i[:, None] - i < window)


@pytest.mark.parametrize(
    "of",
    [
        lambda net, length: mask(length, net.sizes["windows"][0]),
        lambda _, length: mask(length, FAR[1]),
        lambda _, length: mask(length),
        lambda _, length: mask(length, 170 + 7),
    ],
    ids=["dictionary", "of the file", "default", "written in the code"],
)
def test_window_whose_length_no_module_holds(of: Callable[[Any, int], torch.Tensor]) -> None:
    class Windows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = {"windows": [200]}

        def run(self, x: torch.Tensor) -> torch.Tensor:
            local, full = self.local(x.shape[1]), mask(x.shape[1], 5000)
            for n, layer in enumerate(self.layers):
                x = layer(x, local if n % 2 else full)
            return x

        local = of

    (layers,) = (g for g in discover(Windows()).groups if g.kind == "layers")
    assert "argument 1 of a layer depends on its place in the list" in str(layers.frozen)


def test_window_by_place_that_the_twin_sees() -> None:
    class Windows(Net):
        def run(self, x: torch.Tensor) -> torch.Tensor:
            for n, layer in enumerate(self.layers):
                x = layer(x, mask(x.shape[1], 150 if n == len(self.layers) - 1 else 5000))
            return x

    net = Windows()
    discovery = discover(net)
    (layers,) = (g for g in discovery.groups if g.kind == "layers")
    with pytest.raises(VerificationError):
        prune_(net, discovery, {"layers": np.array([layers.size - 1])})


def test_window_by_what_the_layer_says_of_itself() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            for n, layer in enumerate(self.layers):
                layer.local = bool(n % 2)

        def run(self, x: torch.Tensor) -> torch.Tensor:
            i = torch.arange(x.shape[1])
            full = i[:, None] >= i
            for layer in self.layers:
                x = layer(x, full & (i[:, None] - i < 16) if layer.local else full)
            return x

    net = Named()
    assert is_right(net, discover(net), "layers")


def table(heads: Any, length: int) -> torch.Tensor:
    slopes = 2.0 ** (-8 * (torch.arange(heads) + 1) / heads)
    i = torch.arange(length)
    return -(i[:, None] - i[None]).abs()[None] * slopes[:, None, None]


class Alibi(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.alibi = table(HEADS, 64)

    def scores(self, scores: torch.Tensor) -> torch.Tensor:
        length = scores.shape[-1]
        if length > self.alibi.shape[-1]:
            self.alibi = table(self.heads, length)
        return scores + self.alibi[:, :length, :length]


def test_table_that_is_made_anew_when_it_is_too_short() -> None:
    net = Net(lambda: Block(Alibi()))
    held = net.layers[0].attention.alibi
    discovery = discover(net)
    assert net.layers[0].attention.alibi is held, "the model is given back as it was"
    assert not any(g.kind == "heads" and g.frozen is None for g in discovery.groups)
    assert "(test_never_wrong.py:" in why(discovery, "layers.0.attention.q.weight")
    assert is_right(net, discovery, "ffn")


def test_einops() -> None:
    class Einops(Attention):
        def split(self, x: torch.Tensor) -> torch.Tensor:
            return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    for _ in range(2):  # and nothing of one trace is left for the next
        net = Net(lambda: Block(Einops()))
        discovery = discover(net)
        for kind in ("heads", "ffn", "layers"):
            assert is_right(net, discovery, kind)


class SideBySide(nn.Module):
    """Queries, key and value of each group beside each other, as in InternLM2."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.size = 2, SIZE
        self.qkv = nn.Linear(HIDDEN, HEADS * (2 + 2) * SIZE)
        self.o = nn.Linear(HEADS * 2 * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = {"gs": 2 + self.groups, "d": self.size}
        qkv = rearrange(self.qkv(x), "b n (h gs d) -> b n h gs d", **sizes)
        q = rearrange(qkv[..., : self.groups, :], "b n h gs d -> b (h gs) n d")
        k, v = (
            one.transpose(1, 2).repeat_interleave(self.groups, dim=1)
            for one in (qkv[..., -2, :], qkv[..., -1, :])
        )
        y = (q @ k.mT * 0.3).softmax(-1) @ v
        return self.o(rearrange(y, "b h n d -> b n (h d)"))


def test_key_and_value_that_are_counted_from_the_end() -> None:
    net = Net(lambda: Block(SideBySide()))
    discovery = discover(net)
    for kind in ("heads", "head_dim", "layers"):
        assert is_right(net, discovery, kind)


def test_transposed_convolution() -> None:
    class Convolved(Block):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.ConvTranspose1d(FFN, FFN, 3)

        def between(self, y: torch.Tensor) -> torch.Tensor:
            return F.gelu(self.c(F.gelu(y).mT)[..., : y.shape[1]].mT)

    net = Net(Convolved)
    assert is_right(net, discover(net), "ffn")


def test_bare_table_outputs_in_a_dict_and_an_empty_place() -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.embed
            self.table = nn.Parameter(torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64))
            self.layers.append(None)  # type: ignore[arg-type]

        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.table[tokens]
            for layer in self.layers:
                x = x if layer is None else layer(x)
            return {"logits": x @ self.table.T}

    net = Bare()
    discovery = discover(net)
    for kind in ("heads", "ffn", "layers"):
        assert is_right(net, discovery, kind)


def test_code_for_long_input_alone() -> None:
    class Long(Block):
        def between(self, y: torch.Tensor) -> torch.Tensor:
            return F.gelu(y) if y.shape[1] <= 64 else F.gelu(y) * (FFN / y.shape[-1])

    discovery = discover(Net(Long))
    assert "its size is used as a number" in why(discovery, "layers.0.a.weight")


def test_code_for_training_alone() -> None:
    class Trained(Block):
        def between(self, y: torch.Tensor) -> torch.Tensor:
            return F.gelu(y) / y.shape[-1] if self.training else F.gelu(y)

    net = Net(Trained).eval()
    discovery = discover(net)
    assert "its size is used as a number" in why(discovery, "layers.0.a.weight")
    assert not any(module.training for module in net.modules())


# ----------------------------------------------------------------------------- what a layer is told


class Scaled(Block):
    def forward(self, x: torch.Tensor, given: Any = 1.0) -> torch.Tensor:
        return x + self.b(F.gelu(self.a(x))) * (given[0][0] if isinstance(given, tuple) else given)


@pytest.mark.parametrize("nested", [False, True])
def test_factor_by_place(nested: bool) -> None:
    class Factors(Net):
        def __init__(self) -> None:
            super().__init__(Scaled)
            self.factors = [1.0, 0.5, 2.0, 0.25]

        def run(self, x: torch.Tensor) -> torch.Tensor:
            for layer, factor in zip(self.layers, self.factors, strict=False):
                x = layer(x, ((factor,),) if nested else factor)
            return x

    discovery = discover(Factors())
    (layers,) = (g for g in discovery.groups if g.kind == "layers")
    assert "depends on its place in the list" in str(layers.frozen)


class Counted(Block):
    number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.gelu(self.a(x))) * (1.0 / (1 + self.number))


def test_number_of_a_layer_that_it_calculates_with_stays() -> None:
    net = Net(Counted)
    for number, layer in enumerate(net.layers):
        layer.number = number
    discovery = discover(net)
    assert is_right(net, discovery, "layers")


class Cached(Counted):
    def forward(self, x: torch.Tensor, cache: dict[int, float] | None = None) -> torch.Tensor:
        if cache is not None:
            cache[self.number] = 1.0
        return super().forward(x)


def test_number_of_a_layer_that_is_its_place_as_well() -> None:
    class Caching(Net):
        def run(self, x: torch.Tensor) -> torch.Tensor:
            cache: dict[int, float] = {}
            for layer in self.layers:
                x = layer(x, cache)
            return x

    net = Caching(Cached)
    for number, layer in enumerate(net.layers):
        layer.number = number
    (layers,) = (g for g in discover(net).groups if g.kind == "layers")
    assert "layers are told apart by number (test_never_wrong.py:" in str(layers.frozen)


class Remembering(Block):
    """Returns what its next call is given, as layers did before there were cache classes."""

    def forward(self, x: torch.Tensor, before: Any = None) -> Any:
        seen = x if before is None else torch.cat([before[0], x], 1)
        y = self.a(x + seen.mean(1, keepdim=True))
        return x + self.b(F.gelu(y)), (seen,)


class Tuples(Net):
    def __init__(self) -> None:
        super().__init__(Remembering)
        self.num_layers = len(self.layers)

    def run(self, x: torch.Tensor, before: Any = None) -> Any:
        found = []
        for place in range(self.num_layers):
            x, seen = self.layers[place](x, before[place] if before else None)
            found.append(seen)
        return x, found

    def step(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Run all tokens but the last, and the last on what was returned."""
        x, before = self.run(self.embed(tokens[:, :-1]))
        y, _ = self.run(self.embed(tokens[:, -1:]), before)
        return [self.head(x), self.head(y)]


def test_what_a_layer_returned_itself_is_its_own_at_any_place() -> None:
    net = Tuples()
    discovery = discover(net, forward=Tuples.step)
    (layers,) = (g for g in discovery.groups if g.kind == "layers")
    assert layers.frozen is None
    dense = zeroed(net, discovery, layers, np.array([1]))
    dense.layers[1].forward = lambda x, before=None: (x, (x,))
    prune_(net, discovery, {layers.name: np.array([1])})
    assert net.num_layers == len(net.layers) == 3
    ids = torch.arange(12).view(2, 6)
    for ours, theirs in zip(net.step(ids), dense.step(ids), strict=True):
        assert torch.allclose(ours, theirs)


def test_blocks_of_a_sequence_are_layers_and_those_of_a_network_in_one_are_not() -> None:
    class Sequence(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*self.layers)
            for layer in self.layers:
                layer.a = nn.Sequential(layer.a, nn.Linear(FFN, FFN).double())

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    net = Sequence()
    discovery = discover(net)
    (layers,) = (g for g in discovery.groups if g.kind == "layers")
    assert len(layers.modules) == 4
    assert is_right(net, discovery, "layers")


# ------------------------------------------------------------------------- a size used as a number

TABLE = [0.1 * i for i in range(2 * FFN)]


@functools.lru_cache
def remembered(n: int) -> float:
    return 1.0 / n


@functools.lru_cache
def same(n: int) -> int:
    return n


def written_into(n: Any) -> torch.Tensor:
    found = torch.zeros(1)
    found[0] = n
    return found


WAYS: dict[str, Callable[[Any], Any]] = {
    "1 / n": lambda n: 1 / n,
    "1.0 / n": lambda n: 1.0 / n,
    "n / 2": lambda n: n / 2,
    "n ** -0.5": lambda n: n**-0.5,
    "2.0 ** -n": lambda n: 2.0**-n,
    "0.5 * n": lambda n: 0.5 * n,
    "n * 0.5": lambda n: n * 0.5,
    "n - 0.5": lambda n: n - 0.5,
    "math.sqrt(n)": lambda n: math.sqrt(n),
    "math.log(n)": lambda n: math.log(n),
    "math.exp(-n)": lambda n: math.exp(-n),
    "math.gcd(n, 16)": lambda n: math.gcd(n, 16),
    "np.sqrt(n)": lambda n: float(np.sqrt(n)),
    "np.array(n)": lambda n: float(np.array(n)),
    "np.float32(n)": lambda n: float(np.float32(n)),
    "int(n)": lambda n: int(n),
    "float(n)": lambda n: float(n),
    "complex(n)": lambda n: complex(n).real,
    "round(n, -1)": lambda n: round(n, -1),
    "operator.index(n)": lambda n: operator.index(n),
    "min(n, 20)": lambda n: min(n, 20),
    "max(n, 20)": lambda n: max(n, 20),
    "if n > 20": lambda n: 2.0 if n > 20 else 1.0,
    "if n == 24": lambda n: 2.0 if n == FFN else 1.0,
    "n % 5 comparison": lambda n: 2.0 if n % 5 == 4 else 1.0,
    "if n - 24": lambda n: 2.0 if n - FFN else 1.0,
    "n % 5 if not zero": lambda n: 2.0 if n % 5 else 1.0,
    "not n % 8": lambda n: 2.0 if not n % 8 else 1.0,
    "tensor[...] = n": lambda n: written_into(n),
    "tensor[[n]]": lambda n: torch.arange(100.0)[[n]],
    "select(n)": lambda n: torch.arange(100.0).select(0, n),
    "table[n]": lambda n: TABLE[n],
    "table[:n]": lambda n: sum(TABLE[:n]),
    "dict[n]": lambda n: dict(enumerate(TABLE))[n],
    "n in set": lambda n: 2.0 if n in {FFN} else 1.0,
    "n in tuple": lambda n: 2.0 if n in (FFN, 2 * FFN) else 1.0,
    "range(n)": lambda n: sum(1.0 for _ in range(n)),
    "[0.1] * n": lambda n: sum([0.1] * n),
    "n >> 1 as a number": lambda n: 1.0 / (n >> 1),
    "n & 15": lambda n: float(n & 15),
    "n ^ 7": lambda n: float(n ^ 7),
    "~n": lambda n: float(~n),
    "n.bit_length()": lambda n: n.bit_length(),
    "n.real": lambda n: 1.0 / n.real,
    "str(n)": lambda n: float(str(n)),
    'f"{n}"': lambda n: float(f"{n}"),
    '"%d" % n': lambda n: float("%d" % n),  # noqa: UP031
    "repr(n)": lambda n: float(repr(n)),
    "hash(n)": lambda n: float(hash(n)),
    "torch.tensor(n)": lambda n: torch.tensor(n, dtype=torch.float64),
    "torch.tensor(float(n))": lambda n: torch.tensor(float(n)),
    "torch.full((), n)": lambda n: torch.full((), n, dtype=torch.float64),
    "torch.arange(n).sum()": lambda n: torch.arange(n).sum(),
    "lru_cache": lambda n: remembered(n),
    "sum((n, 1)) / 2": lambda n: sum((n, 1)) / 2,
    "divmod(100, n)": lambda n: float(divmod(100, n)[1]),
}

OF_A_TENSOR: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape.numel()": lambda y: 1.0 / y.shape.numel() * y.shape[0] * y.shape[1],
    "numel()": lambda y: y[0, 0].numel(),
    "stride()": lambda y: float(y.stride()[1]),
    "stride(1)": lambda y: float(y.stride(1)),
    "nbytes": lambda y: float(y[0, 0].nbytes),
    "len()": lambda y: len(y[0, 0]),
    "size(-1)": lambda y: 1.0 / y.size(-1),
    "shape[-1:].numel()": lambda y: 1.0 / y.shape[-1:].numel(),
    "shape in a comparison": lambda y: 2.0 if y.shape[-1] > 20 else 1.0,
    "str(shape)": lambda y: float(len(str(y.shape[-1:]).strip("torch.Size([])"))),
}


class Used(Block):
    """An FFN whose output is multiplied by what is made of its width."""

    def __init__(self, use: Callable[[Any], Any], source: str) -> None:
        super().__init__()
        self.use, self.source = use, source
        self.width = FFN

    def between(self, y: torch.Tensor) -> torch.Tensor:
        y = F.gelu(y)
        if self.source == "attribute":
            return y.view(*y.shape[:2], self.width) * self.use(self.width)
        if self.source == "out_features":
            return y * self.use(self.a.out_features)
        if self.source == "shape":
            return y * self.use(y.shape[-1])
        return y * self.use(y)


@pytest.mark.parametrize("source", ["attribute", "out_features", "shape"])
@pytest.mark.parametrize("way", WAYS)
def test_size_as_a_number_freezes_the_axis_and_names_the_line(way: str, source: str) -> None:
    discovery = discover(Net(lambda: Used(WAYS[way], source), layers=1))
    assert not any(g.kind == "ffn" and g.frozen is None for g in discovery.groups)
    group = next((g for g in discovery.groups if g.kind == "ffn"), None)
    reason = why(discovery, "layers.0.a.weight") if group is None else str(group.frozen)
    assert "(test_never_wrong.py:" in reason or "layers.0.a.out_features in its own" in reason


SIZES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "halves by >>": lambda y, n: torch.cat([y[..., : n >> 1], y[..., n >> 1 :]], -1),
    "doubled and halved": lambda y, n: y.view(*y.shape[:2], (n << 1) // 2),
    "round": lambda y, n: y.view(*y.shape[:2], round(n)),
    "more than one": lambda y, n: y.view(*y.shape[:2], n) if n > 1 else y,
    "more than none": lambda y, n: y if n >= 1 else y * 0,
    "new tensor": lambda y, n: y + y.new_ones(n),
}


@pytest.mark.parametrize("way", SIZES)
def test_size_as_a_size_stays_prunable(way: str) -> None:
    class Sized(Block):
        def __init__(self) -> None:
            super().__init__()
            self.width = FFN

        def between(self, y: torch.Tensor) -> torch.Tensor:
            return F.gelu(SIZES[way](y, self.width))

    net = Net(Sized, layers=2)
    if way == "halves by >>":
        # Both halves must lose as many; whatever is offered is right.
        is_right(net, discover(net), "ffn")
    else:
        assert is_right(net, discover(net), "ffn")


def test_nothing_of_a_trace_is_left() -> None:
    class Keeps(Block):
        def between(self, y: torch.Tensor) -> torch.Tensor:
            self.seen = same(y.shape[-1])
            return F.gelu(y).view(*y.shape[:2], self.seen)

    same.cache_clear()
    net = Net(Keeps)
    assert is_right(net, discover(net), "ffn")
    fresh = Net(Keeps)
    discover(fresh)
    assert not any("seen" in vars(layer) for layer in fresh.layers)
    for size in (FFN, FFN // 3, FFN - FFN // 3):
        assert type(same(size)) is int


# ------------------------------------------------------------------------------ pruning from Python


class Unseen(Block):
    """A use of a size that PyTorch is told to hide."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            size = y.shape[-1]
        return F.gelu(y) * (1.0 / size)


def test_a_model_that_would_come_out_wrong_is_left_as_it_was() -> None:
    net = Net(Unseen)
    discovery = discover(net)
    before = {name: (tensor, tensor.clone()) for name, tensor in net.named_parameters()}
    dense = logits(net, 8)
    name = next(g.name for g in discovery.groups if g.kind == "ffn")
    removal = {name: np.arange(8), "layers": np.array([1])}
    with pytest.raises(VerificationError, match="at fault: ffn; nothing was saved"):
        prune_(net, discovery, removal)
    assert len(net.layers) == 4
    for key, tensor in net.named_parameters():
        assert tensor is before[key][0]
        assert torch.equal(tensor, before[key][1])
    assert torch.equal(logits(net, 8), dense)
    prune_(net, discovery, removal, verify=False)
    assert len(net.layers) == 3
