"""``round_to`` chosen by what this machine multiplies fast: products of several widths, timed."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner.evaluation.speed import now
from llm_pruner.planning import Selection, choose_groups
from llm_pruner.planning.candidates import CHANNELS
from llm_pruner.planning.rounding import largest_multiple
from llm_pruner.runtime.progress import track
from llm_pruner.types import Discovery, Group

CANDIDATES = (8, 16, 32, 64, 128)
"""Multiples that are tried; kernels work on blocks of these sizes."""

TOLERANCE = 0.03
"""Share of the best throughput that a smaller multiple may cost."""

_TOKENS = (1, 128)
"""Rows of the other factor: a decoding step, and a prefill."""
_KEPT = (0.4, 0.6, 0.8)
"""Shares of the units that are kept, around which widths are tried."""
_ROUNDS = 5
_SHORTEST = 1e-3
"""Seconds that one timing takes at least; shorter products are repeated."""


@dataclass(frozen=True)
class Product:
    """A weight matrix of which one side shrinks.

    Attributes:
        rows, columns: its size.
        dim: the side that shrinks, 0 for rows and 1 for columns.
        units: how many units that side is pruned by.
        positions: rows or columns that go with each unit.
        linear: whether it is stored as ``nn.Linear`` stores it, (outputs, inputs), and not as
            (inputs, outputs).
    """

    rows: int
    columns: int
    dim: int
    units: int
    positions: int
    linear: bool

    def pruned(self, kept: int) -> tuple[int, int]:
        """Return rows and columns with ``kept`` units left."""
        shape = [self.rows, self.columns]
        shape[self.dim] -= (self.units - kept) * self.positions
        return shape[0], shape[1]


@dataclass(frozen=True)
class Rounding:
    """A multiple and why.

    Attributes:
        multiple: for ``round_to``; 1 if no candidate fits the model.
        throughput: candidate -> MACs per second as a share of the fastest candidate's.
        tolerance: share of the throughput that the choice may cost.
    """

    multiple: int
    throughput: Mapping[int, float]
    tolerance: float = TOLERANCE


def choose_multiple(throughput: Mapping[int, float], tolerance: float = TOLERANCE) -> int:
    """Return the smallest candidate within ``tolerance`` of the best; 1 if there is none."""
    best = max(throughput.values(), default=0.0)
    good = [m for m, value in throughput.items() if value >= (1 - tolerance) * best]
    return min(good, default=1)


def fast_multiple(
    products: Sequence[Product],
    candidates: Sequence[int] = CANDIDATES,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rounding:
    """Time products at widths that are multiples of each candidate and of no larger one.

    For each candidate m, widths of an odd number of m near 40, 60 and 80% of the units are timed
    with 1 token and with 128, all candidates in turns, and the shortest of five timings counts.
    The throughput of a candidate is the geometric mean, over products and numbers of tokens, of
    MACs per second.

    Args:
        products: what is pruned; without any, no candidate is tried.
        candidates: multiples to try.
        dtype, device: of the weights.
    """
    if not products or not candidates:
        return Rounding(1, {})
    cases = [
        _Case(candidate, product, kept, tokens)
        for candidate in candidates
        for product in products
        for kept in _widths(product.units, candidate)
        for tokens in _TOKENS
    ]
    size = max(math.prod(case.product.pruned(case.kept)) for case in cases)
    inputs = max(max(case.product.pruned(case.kept)) for case in cases) * max(_TOKENS)
    generator = torch.Generator().manual_seed(0)
    # Both factors are cut out of one stretch of memory each: nothing is allocated between timings.
    weights, rows = (
        torch.empty(count, device="cpu").uniform_(-1, 1, generator=generator).to(device, dtype)
        for count in (size, inputs)
    )
    best = dict.fromkeys(cases, math.inf)
    with torch.inference_mode():
        for case in cases:
            case.time(weights, rows)  # kernels are chosen and compiled at first use
        shuffle = random.Random(0)
        for _ in track(range(_ROUNDS), "timing widths"):
            for case in shuffle.sample(cases, len(cases)):
                best[case] = min(best[case], case.time(weights, rows))
    rates = {candidate: _rate(candidate, best) for candidate in candidates}
    fastest = max(rates.values())
    throughput = {candidate: rate / fastest for candidate, rate in rates.items()}
    return Rounding(choose_multiple(throughput), throughput)


@dataclass(frozen=True)
class _Case:
    candidate: int
    product: Product
    kept: int
    tokens: int

    @property
    def macs(self) -> int:
        return self.tokens * math.prod(self.product.pruned(self.kept))

    def time(self, weights: torch.Tensor, rows: torch.Tensor) -> float:
        """Return the seconds of one product."""
        shape = self.product.pruned(self.kept)
        weight = weights[: math.prod(shape)].view(shape)
        width = shape[1] if self.product.linear else shape[0]
        factor = rows[: self.tokens * width].view(self.tokens, width)
        times, more = 0, 1
        begin = now(weights.device)
        while True:
            for _ in range(more):
                F.linear(factor, weight) if self.product.linear else factor @ weight
            times += more
            seconds = now(weights.device) - begin
            if seconds >= _SHORTEST:
                return seconds / times
            more = times  # as many again: to ask for the time is to wait for a GPU


def _rate(candidate: int, best: Mapping[_Case, float]) -> float:
    """Return the candidate's MACs per second."""
    macs: Counter[tuple[Product, int]] = Counter()
    seconds: dict[tuple[Product, int], float] = defaultdict(float)
    for case, took in best.items():
        if case.candidate == candidate:
            macs[case.product, case.tokens] += case.macs
            seconds[case.product, case.tokens] += took
    return geometric_mean([macs[one] / seconds[one] for one in macs])


def _widths(units: int, multiple: int) -> list[int]:
    """Return numbers of units to keep that are odd multiples of ``multiple``, below ``units``."""
    found = []
    for share in _KEPT:
        times = round(share * units / multiple)
        times += 1 - times % 2
        while times > 1 and times * multiple >= units:
            times -= 2
        found.append(times * multiple)
    return sorted({kept for kept in found if 0 < kept < units})


_MOST_PRODUCTS = 4


def measured_rounding(
    model: nn.Module, discovery: Discovery, selection: Selection, dtype: torch.dtype
) -> Rounding:
    """Time the products of the channels that may be pruned, on the device of the model.

    Candidates that leave the smallest group fewer than four sizes are left out, and those that
    are too coarse to reach a number of parameters within half a point; where the ranking is
    local, all layers take a step together.

    Args:
        dtype: in which the pruned model is saved, and will run.

    Raises:
        UserError: nothing can be pruned.
    """
    chosen = choose_groups(discovery, selection)
    groups = [group for group in chosen if group.kind in CHANNELS]
    candidates = [
        m for m in CANDIDATES if m <= largest_multiple(discovery, groups, selection.scope)
    ]
    weight = next(model.parameters())
    # Without weights (on meta) the processor stands in.
    device = torch.device("cpu") if weight.is_meta else weight.device
    products = _products(model, discovery, groups)
    return fast_multiple(products, candidates, dtype=dtype, device=device)


def _products(model: Any, discovery: Discovery, groups: Sequence[Group]) -> list[Product]:
    """Return the distinct products that the groups' members shrink, the heaviest first."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    found: Counter[Product] = Counter()
    for group in groups:
        for member in group.members:
            shape = () if member.buffer else discovery.shapes[member.tensor]
            path = member.tensor.rpartition(".")[0]
            # Of the weights of all experts, shape (experts, ...), one matrix is multiplied.
            dim = member.dim - (len(shape) - 2)
            if len(shape) not in (2, 3) or dim < 0:
                continue
            owner = model.get_submodule(path)
            # The embeddings are no blocks of a layer, and a look-up is no product.
            if id(owner) in ends or isinstance(owner, nn.Embedding):
                continue
            linear = isinstance(owner, nn.Linear) or len(shape) == 3
            positions = member.index.shape[1]
            rows, columns = shape[-2:]
            product = Product(rows, columns, dim, group.size, positions, linear)
            found[product] += math.prod(shape)
    return [product for product, _ in found.most_common(_MOST_PRODUCTS)]
