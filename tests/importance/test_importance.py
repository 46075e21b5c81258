"""Importance: cases computed by hand, a slow float64 reference, and what must not change."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import tiny_model
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, boundary_pass, score, taylor
from llm_pruner.importance.boundary_pass import loss_stride
from llm_pruner.importance.loss import loss_cotangent
from llm_pruner.models.activation_store import ActivationStore
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.types import Discovery, Group, Member

TAYLORS = [
    Criterion("taylor", order, reduction, aggregate)
    for order, reduction, aggregate in itertools.product(
        ("first", "second", "mixed"), ("element", "vector"), ("sum", "prod", "max", "last")
    )
]


def refuse(*args: Any, **kwargs: Any) -> Any:
    """Stand in for ``find_chain``: the model is run as a whole."""
    raise NotBlockwise("asked to")


def rows(count: int, width: int = 1, start: int = 0) -> np.ndarray:
    """Return an index of ``count`` units with ``width`` neighbouring positions each."""
    return start + np.arange(count * width, dtype=np.int64).reshape(count, width)


def describe(model: nn.Module, *groups: Group) -> Discovery:
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Discovery(groups, frozen=(), shapes=names, buffers={}, aliases={})


def llama_discovery(model: Any) -> Discovery:
    """Return the groups of a llama, written by hand: FFN channels, KV heads, hidden, layers."""
    config = model.config
    kv, queries = config.num_key_value_heads, config.num_attention_heads
    size = config.hidden_size // queries
    per_kv = size * queries // kv
    groups, hidden, order = [], [Member("model.embed_tokens.weight", 1, rows(48), 0)], 1
    for layer in range(config.num_hidden_layers):
        at, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        heads = (
            Member(f"{at}.q_proj.weight", 0, rows(kv, per_kv), order + 1),
            Member(f"{at}.k_proj.weight", 0, rows(kv, size), order + 2),
            Member("rotary", 0, rows(kv, 1), order + 99, buffer=True),
            Member(f"{at}.v_proj.weight", 0, rows(kv, size), order + 3),
            Member(f"{at}.o_proj.weight", 1, rows(kv, per_kv), order + 4),
        )
        channels = rows(config.intermediate_size)
        ffn = (
            Member(f"{mlp}.down_proj.weight", 1, channels, order + 8),
            Member(f"{mlp}.gate_proj.weight", 0, channels, order + 6),
            Member(f"{mlp}.up_proj.weight", 0, channels, order + 7),
        )
        groups += [
            Group(f"layers.{layer}.heads", "heads", layer, kv, heads),
            Group(f"layers.{layer}.ffn", "ffn", layer, config.intermediate_size, ffn),
        ]
        prefix = f"model.layers.{layer}"
        readers = [f"{at}.{x}_proj" for x in "qkv"] + [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        hidden += [Member(f"{name}.weight", 1, rows(48), order) for name in readers]
        hidden += [
            Member(f"{at}.o_proj.weight", 0, rows(48), order),
            Member(f"{mlp}.down_proj.weight", 0, rows(48), order),
            Member(f"{prefix}.input_layernorm.weight", 0, rows(48), order),
        ]
        order += 10
    hidden.append(Member("model.norm.weight", 0, rows(48), order))
    if not config.tie_word_embeddings:
        hidden.append(Member("lm_head.weight", 1, rows(48), order + 1))
    groups.append(Group("hidden", "hidden", None, 48, tuple(hidden)))
    layers = tuple(f"model.layers.{layer}" for layer in range(config.num_hidden_layers))
    groups.append(Group("layers", "layers", None, len(layers), (), modules=layers))
    return describe(model, *groups)


def tokens(samples: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (samples, length), generator=generator)


def reference_gradients(
    model: Any, ids: torch.Tensor, stride: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (mean gradient, mean squared per-sample gradient) by plain backward passes."""
    first: dict[str, Any] = {name: 0.0 for name, _ in model.named_parameters()}
    second = dict(first)
    for sample in ids:
        model.zero_grad()
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1][::stride], sample[1:][::stride]).backward()
        for name, parameter in model.named_parameters():
            first[name] = first[name] + parameter.grad / len(ids)
            second[name] = second[name] + parameter.grad**2 / len(ids)
    return first, second


def reference_scores(
    model: Any,
    gradients: tuple[dict[str, Any], dict[str, Any]],
    group: Group,
    criterion: Criterion,
) -> list[float]:
    """Score one group slice by slice, straight from the formulas."""
    first, second = gradients
    parameters = dict(model.named_parameters())

    def measure(name: str, dim: int | None, positions: Any) -> float:
        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if dim is None else tensor.index_select(dim, torch.tensor(positions))

        weight = cut(parameters[name].detach())
        if criterion.name == "l1":
            return float(weight.abs().sum())
        if criterion.name == "l2":
            return float(weight.norm())
        slope, square = cut(first[name]) * weight, 0.5 * cut(second[name]) * weight**2
        term = {"first": slope, "second": square, "mixed": slope - square}[criterion.order]
        return float(term.abs().sum() if criterion.reduction == "element" else term.sum().abs())

    if group.modules:
        scores = []
        for module in group.modules:
            names = [name for name in parameters if name.startswith(module + ".")]
            values = [measure(name, None, None) for name in names]
            if criterion.name == "l2":
                values = [math.sqrt(sum(value**2 for value in values))]
            scores.append(sum(values))
        return scores
    members = [member for member in group.members if not member.buffer]
    if criterion.aggregate == "last":
        members = [max(members, key=lambda member: member.order)]
    scores = []
    for unit in range(group.size):
        values = [measure(m.tensor, m.dim, m.index[unit]) for m in members]
        if criterion.aggregate == "max":
            scores.append(max(values))
        elif criterion.aggregate == "prod":
            scores.append(math.prod(values) ** (1 / len(values)))
        else:
            scores.append(sum(values))
    return scores


class TwoLayers(nn.Module):
    """Logits of each token: ``second(first(embedding))``, all weights written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
            self.first.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
            self.second.weight.copy_(torch.tensor([[0.2, 0.0], [-0.1, 0.05]]))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embedding(input_ids)))

    def discovery(self) -> Discovery:
        members = (
            Member("first.weight", 0, rows(2), 1),
            Member("second.weight", 1, rows(2), 2),
        )
        return describe(self, Group("ffn", "ffn", 0, 2, members))


@pytest.mark.parametrize(
    ("name", "aggregate", "expected"),
    [
        # first.weight rows (1, -2), (3, 4); second.weight columns (0.2, -0.1), (0, 0.05)
        ("l1", "sum", [3 + 0.3, 7 + 0.05]),
        ("l1", "prod", [math.sqrt(3 * 0.3), math.sqrt(7 * 0.05)]),
        ("l1", "max", [3, 7]),
        ("l1", "last", [0.3, 0.05]),
        ("l2", "sum", [math.sqrt(5) + math.sqrt(0.05), 5 + 0.05]),
        ("l2", "prod", [math.sqrt(0.5), math.sqrt(5 * 0.05)]),
        ("l2", "max", [math.sqrt(5), 5]),
        ("l2", "last", [math.sqrt(0.05), 0.05]),
    ],
)
def test_magnitude_by_hand(name: str, aggregate: str, expected: list[float]) -> None:
    model = TwoLayers()
    criterion = Criterion(name, aggregate=aggregate)
    got = score(model, model.discovery(), criterion, input_ids=None, seed=0)
    assert got["ffn"].dtype == np.float64
    np.testing.assert_allclose(got["ffn"], expected, rtol=1e-6)


def taylor_by_hand() -> dict[str, tuple[list[float], list[float]]]:
    """Return (order, reduction) -> (scores in ``first``, scores in ``second``) of ``TwoLayers``.

    Samples [0, 1] and [1, 0]: one predicted token each. With x the embedding, h = first x,
    z = second h, p = softmax(z), d = p - onehot(target): the gradient of second is d h^T, that of
    first is (second^T d) x^T.

    Sample 0: x = (1, 2), h = (1 - 4, 3 + 8) = (-3, 11), z = (-0.6, 0.85), target 1.
    Sample 1: x = (3, -1), h = (3 + 2, 9 - 4) = (5, 5), z = (1, -0.25), target 0.
    d = (q, -q) with q = sigmoid(-1.45) and (-r, r) with r = sigmoid(-1.25).
    """
    q, r = 1 / (1 + math.exp(1.45)), 1 / (1 + math.exp(1.25))
    # second^T d: sample 0: q (0.2 + 0.1, -0.05) = q (0.3, -0.05); sample 1: r (-0.3, 0.05)
    first_0 = [[0.3 * q, 0.6 * q], [-0.05 * q, -0.1 * q]]
    first_1 = [[-0.9 * r, 0.3 * r], [0.15 * r, -0.05 * r]]
    second_0 = [[-3 * q, 11 * q], [3 * q, -11 * q]]
    second_1 = [[-5 * r, -5 * r], [5 * r, 5 * r]]
    weights = {"first": [[1, -2], [3, 4]], "second": [[0.2, 0], [-0.1, 0.05]]}
    table: dict[str, tuple[list[float], list[float]]] = {}
    for order, reduction in itertools.product(("first", "second", "mixed"), ("element", "vector")):
        both = []
        for name, one, two in (("first", first_0, first_1), ("second", second_0, second_1)):
            terms = [[0.0, 0.0], [0.0, 0.0]]
            for i, j in itertools.product(range(2), range(2)):
                w = weights[name][i][j]
                slope = (one[i][j] + two[i][j]) / 2 * w
                square = (one[i][j] ** 2 + two[i][j] ** 2) / 2 * w**2 / 2
                terms[i][j] = {"first": slope, "second": square, "mixed": slope - square}[order]
            units = (
                terms if name == "first" else [list(column) for column in zip(*terms, strict=True)]
            )
            if reduction == "element":
                both.append([sum(abs(value) for value in unit) for unit in units])
            else:
                both.append([abs(sum(unit)) for unit in units])
        table[f"{order} {reduction}"] = (both[0], both[1])
    return table


@pytest.mark.parametrize("criterion", TAYLORS, ids=str)
def test_taylor_by_hand(criterion: Criterion) -> None:
    model = TwoLayers()
    ids = torch.tensor([[0, 1], [1, 0]])
    got = score(model, model.discovery(), criterion, input_ids=ids, seed=0)["ffn"]
    one, two = taylor_by_hand()[f"{criterion.order} {criterion.reduction}"]
    joined = {
        "sum": [a + b for a, b in zip(one, two, strict=True)],
        "max": [max(a, b) for a, b in zip(one, two, strict=True)],
        "prod": [math.sqrt(a * b) for a, b in zip(one, two, strict=True)],
        "last": two,
    }[criterion.aggregate]
    np.testing.assert_allclose(got, joined, rtol=1e-5)


def test_query_heads_are_folded_into_the_kv_head_they_read() -> None:
    """8 query and 2 KV heads, only query heads 0 and 1 matter: [8, 0], not [4, 4]."""
    model = nn.Module()
    model.q_proj = nn.Linear(3, 16, bias=False)
    with torch.no_grad():
        model.q_proj.weight.zero_()
        model.q_proj.weight[:4] = torch.tensor([[1.0, -1.0, 0.0]])  # 2 heads of 2 rows, |w| = 2
    member = Member("q_proj.weight", 0, rows(2, 8), 0)
    discovery = describe(model, Group("heads", "heads", 0, 2, (member,)))
    got = score(model, discovery, Criterion("l1"), input_ids=None, seed=0)["heads"]
    np.testing.assert_array_equal(got, [8, 0])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request: pytest.FixtureRequest) -> Any:
    """Return (model, discovery, tokens, float64 copy, its reference gradients)."""
    model = tiny_model(tie_word_embeddings=request.param, num_hidden_layers=2)
    double = copy.deepcopy(model).double()
    ids = tokens()
    return model, llama_discovery(model), ids, double, reference_gradients(double, ids)


@pytest.mark.parametrize("criterion", TAYLORS, ids=str)
def test_matches_the_float64_reference(llama: Any, criterion: Criterion) -> None:
    model, discovery, ids, double, gradients = llama
    got = score(model, discovery, criterion, input_ids=ids, seed=0)
    assert set(got) == {group.name for group in discovery.groups}
    for group in discovery.groups:
        expected = np.array(reference_scores(double, gradients, group, criterion))
        assert got[group.name].shape == (group.size,)
        np.testing.assert_allclose(
            got[group.name], expected, rtol=2e-3, atol=2e-4 * expected.mean(), err_msg=group.name
        )


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
@pytest.mark.parametrize("path", ["blockwise", "whole"])
def test_both_paths_in_float64(
    llama: Any, order: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, discovery, ids, double, gradients = llama
    if path == "whole":
        monkeypatch.setattr(taylor, "find_chain", refuse)
    else:
        monkeypatch.setattr(
            boundary_pass, "run_for_logits", lambda *_: pytest.fail("ran as a whole")
        )
    criterion = Criterion(order=order, reduction="vector")
    got = score(double, discovery, criterion, input_ids=ids, seed=0)
    for group in discovery.groups:
        expected = np.array(reference_scores(double, gradients, group, criterion))
        # the softmax of float64 logits stays in float64, so nothing but rounding is left
        np.testing.assert_allclose(got[group.name], expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_loss_at_some_positions(llama: Any, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_pass, "loss_stride", lambda _: 3)
    _, discovery, ids, double, _ = llama
    criterion = Criterion(order=order, reduction="vector")
    got = score(double, discovery, criterion, input_ids=ids, seed=0)
    gradients = reference_gradients(double, ids, 3)
    for group in discovery.groups:
        expected = np.array(reference_scores(double, gradients, group, criterion))
        np.testing.assert_allclose(got[group.name], expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "stride"),
    [
        ({"vocab_size": 70_000}, 4),
        ({"vocab_size": 66_000, "hidden_size": 24, "intermediate_size": 22_000}, 3),
        ({"vocab_size": 66_000, "hidden_size": 24, "intermediate_size": 90_000}, 1),
        ({"vocab_size": 60_000}, 1),
    ],
)
def test_a_large_output_layer_runs_at_a_share_of_the_positions(
    config: dict[str, int], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All positions are looked at in turn, by one group of samples after the other."""
    monkeypatch.setattr(boundary_pass, "_LOGIT_BYTES", 1)
    model = tiny_model(num_hidden_layers=1, **config).requires_grad_(False)
    group = Group("f", "ffn", 0, 8, (Member("model.layers.0.mlp.up_proj.weight", 0, rows(8), 0),))
    found, real = [], loss_cotangent

    def noted(logits: torch.Tensor, ids: torch.Tensor, first: int, positions: Any) -> Any:
        found.append((logits.shape[1], positions))
        return real(logits, ids, first, positions)

    monkeypatch.setattr(boundary_pass, "loss_cotangent", noted)
    score(model, describe(model, group), Criterion(), input_ids=tokens(8, 13), seed=0)
    if stride == 1:
        assert found == [(13, None)] * 8
    else:
        assert [count for count, _ in found] == [12 // stride] * 8
        seen = torch.cat([positions for _, positions in found[:stride]])
        assert sorted(seen.tolist()) == list(range(12))


def test_positions_with_a_loss_by_the_size_of_the_output_layer() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 22_000}
    for blocks, vocabulary, stride in (
        (1, 66_000, 3),
        (2, 66_000, 2),
        (3, 66_000, 1),
        (1, 60_000, 1),
    ):
        model = tiny_model(**sizes, num_hidden_layers=blocks, vocab_size=vocabulary)
        assert loss_stride(find_chain(model.requires_grad_(False), tokens(), {})) == stride


@pytest.mark.parametrize("criterion", [Criterion(), Criterion("fisher")])
def test_a_model_that_gives_other_logits_when_asked_for_some_gives_all(
    criterion: Criterion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all activations held, too, for which there are then too many logits."""
    model = tiny_model(num_hidden_layers=1).requires_grad_(False)
    discovery, ids = llama_discovery(model), tokens()
    names = [group.name for group in discovery.groups if group.kind in ("heads", "ffn")]
    logits = ids.shape[1] * model.config.vocab_size * 4
    monkeypatch.setattr(boundary_pass, "_LOGIT_BYTES", logits)
    monkeypatch.setattr(boundary_pass, "_FEWEST_HELD", ids.shape[1] + 1)
    want = score(model, discovery, criterion, input_ids=ids, seed=0, groups=names)
    real = model.forward

    def last(input_ids: torch.Tensor, logits_to_keep: Any = 0, **others: Any) -> Any:
        count = 0 if isinstance(logits_to_keep, int) else len(logits_to_keep)
        return real(input_ids, logits_to_keep=count, **others)

    model.forward = last
    monkeypatch.setattr(boundary_pass, "loss_stride", lambda _: 2)
    got = score(model, discovery, criterion, input_ids=ids, seed=0, groups=names)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("aggregate", ["sum", "prod", "max", "last"])
def test_magnitudes_match_the_reference(llama: Any, name: str, aggregate: str) -> None:
    model, discovery, _, double, gradients = llama
    criterion = Criterion(name, aggregate=aggregate)
    got = score(model, discovery, criterion, input_ids=None, seed=0)
    for group in discovery.groups:
        expected = reference_scores(double, gradients, group, criterion)
        np.testing.assert_allclose(got[group.name], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "model_type",
    [
        *("gpt2", "gpt_neox", "bloom", "falcon", "opt", "mistral"),
        *("qwen2", "qwen3", "gemma3_text", "phi3", "mixtral"),
    ],
)
def test_stock_architectures_run_block_by_block(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type, num_hidden_layers=2)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    groups = []
    for name in names:
        size = model.get_parameter(name).shape[0]
        groups.append(Group(name, "other", None, size, (Member(name, 0, rows(size), 0),)))
    discovery = describe(model, *groups)
    criterion = Criterion(order="mixed")
    chain = find_chain(model.requires_grad_(False), tokens(), {})
    assert len(chain.blocks) == 2
    got = score(model, discovery, criterion, input_ids=tokens(), seed=0)
    monkeypatch.setattr(taylor, "find_chain", refuse)
    whole = score(model, discovery, criterion, input_ids=tokens(), seed=0)
    for name in names:
        scale = max(whole[name].mean(), 1e-12)
        np.testing.assert_allclose(got[name], whole[name], rtol=1e-3, atol=1e-4 * scale)


class Skipping(nn.Module):
    """Two blocks, where the second, or the logits, may read more than the chain hands over."""

    def __init__(self, skip: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.skip = skip
        self.embedding = nn.Embedding(259, 4)
        self.layers = nn.ModuleList(Doubling() for _ in range(3))
        self.head = nn.Linear(4, 259, bias=False)
        self.memory: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if skip == "shared":
            self.layers[2].linear = self.layers[0].linear

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        start = hidden = self.embedding(input_ids)
        self.memory = {}
        states = []
        for layer in self.layers:
            if self.skip == "kwarg":
                hidden = layer(hidden, extra=start)
            elif self.skip == "between":
                hidden = layer(hidden.tanh())
            elif self.skip == "memory":
                hidden = layer(hidden, memory=self.memory)
            elif self.skip == "in place":
                hidden = layer(hidden, in_place=True)
            else:
                hidden = layer(hidden)
            states.append(hidden)
        if self.skip == "top":
            hidden = hidden + states[0]
        if self.skip == "embedding":  # reaches the logits only: the chain may handle this
            hidden = hidden + start
        return self.head(hidden)


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        extra: torch.Tensor | None = None,
        memory: dict[str, torch.Tensor] | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        if extra is not None:
            hidden = hidden + extra
        if memory is not None:
            hidden = hidden + memory.setdefault("first", hidden)
        update = self.linear(hidden.clone()).tanh()
        return hidden.add_(update) if in_place else hidden + update


@pytest.mark.parametrize(
    ("skip", "chain"),
    [
        ("none", True),
        ("embedding", True),
        ("kwarg", False),
        ("between", False),
        ("memory", False),
        ("in place", False),
        ("top", False),
        ("shared", False),
    ],
)
@pytest.mark.parametrize("order", ["first", "mixed"])
def test_gradients_past_the_boundaries_are_not_lost(skip: str, chain: bool, order: str) -> None:
    model = Skipping(skip)
    members = [("embedding.weight", 1), ("layers.0.linear.weight", 1), ("head.weight", 1)]
    groups = [
        Group(name, "other", None, 4, (Member(name, dim, rows(4), 0),)) for name, dim in members
    ]
    criterion, ids = Criterion(order=order), tokens(4, 5)
    parameters = {name: model.get_parameter(name) for name, _ in members}
    model.requires_grad_(False)
    if chain:
        find_chain(model, ids, parameters)
    else:
        with pytest.raises(NotBlockwise):
            find_chain(model, ids, parameters)
    assert not any("forward" in vars(layer) for layer in model.layers)
    got = score(model, describe(model, *groups), criterion, input_ids=ids, seed=0)
    model.memory = {}
    wrapped = Logits(copy.deepcopy(model).double().requires_grad_(True))
    gradients = reference_gradients(wrapped, ids)
    for group in groups:
        member = group.members[0]
        renamed = Group(
            "",
            "other",
            None,
            4,
            (Member(f"inner.{member.tensor}", member.dim, member.index, 0),),
        )
        expected = reference_scores(wrapped, gradients, renamed, criterion)
        np.testing.assert_allclose(got[group.name], expected, rtol=1e-3)


class Logits(nn.Module):
    """Give a plain module the output form that ``reference_gradients`` reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.logits = torch.empty(0)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Logits:
        self.logits = self.inner(input_ids)
        return self


def test_hidden_states_on_disk_give_the_same_scores(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, discovery, ids, _, _ = llama
    want = score(model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0)
    made = []
    real = ActivationStore.write

    def write(self: ActivationStore, *args: Any) -> None:
        real(self, *args)
        made.append(len(self._files) * (not self._arrays))

    monkeypatch.setattr(ActivationStore, "write", write)
    monkeypatch.setattr(boundary_pass, "MEMORY", 0)
    got = score(model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0)
    assert set(made) == {1, 3}  # the gradient, and three boundaries of two blocks
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def state_of(model: Any) -> tuple[Any, ...]:
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [parameter.detach().clone() for parameter in model.parameters()],
        model.config.to_dict(),
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True], ids=["done", "stopped"])
@pytest.mark.parametrize("order", ["first", "mixed"])
def test_model_comes_back_as_it_was(order: str, fails: bool) -> None:
    model = tiny_model(num_hidden_layers=2)
    model.train()
    model.model.norm.eval()
    model.model.layers[0].requires_grad_(False)
    model.config.use_cache = True
    kept = torch.full_like(model.model.norm.weight, 7.0)
    model.model.norm.weight.grad = kept
    discovery, ids = llama_discovery(model), tokens()
    if fails:
        model.lm_head.weight.data[5, 3] = torch.inf
    before = state_of(model)
    if fails:
        with pytest.raises(UserError, match="loss of calibration sample 0"):
            score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)
    else:
        score(model, discovery, Criterion(order=order), input_ids=ids, seed=0)
    after = state_of(model)
    assert model.model.norm.weight.grad is kept
    assert bool((kept == 7.0).all())
    for weight, same in zip(before[2], after[2], strict=True):
        assert torch.equal(weight, same)
    assert before[0] == after[0]
    assert [flag for flag, _ in before[1]] == [flag for flag, _ in after[1]]
    for (_, old), (_, new) in zip(before[1], after[1], strict=True):
        assert new is old
    assert before[3:] == after[3:]


@pytest.mark.parametrize("path", ["blockwise", "whole"])
def test_sample_without_a_finite_loss_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=2)
    model.model.embed_tokens.weight.data[258] = torch.nan
    ids = tokens(5, 6).clamp(max=257)
    ids[3, 2] = 258
    if path == "whole":
        monkeypatch.setattr(taylor, "find_chain", refuse)
    with pytest.raises(UserError, match=r"loss of calibration sample 3 is nan.*float32"):
        score(model, llama_discovery(model), Criterion(), input_ids=ids, seed=0)


def test_weights_that_are_not_finite_are_named() -> None:
    model = TwoLayers()
    model.first.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"the weights of first\.weight are not finite"):
        score(model, model.discovery(), Criterion("l2"), input_ids=None, seed=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_half_precision_agrees_with_float32(dtype: torch.dtype, order: str) -> None:
    """Gradients of the narrow type, squared and summed in float32."""
    model = tiny_model(num_hidden_layers=2, initializer_range=0.02)
    ids, discovery, criterion = tokens(4, 60), llama_discovery(model), Criterion(order=order)
    want = score(model, discovery, criterion, input_ids=ids, seed=0)
    got = score(copy.deepcopy(model).to(dtype), discovery, criterion, input_ids=ids, seed=0)
    for name in ("layers.0.ffn", "layers.1.ffn", "layers.0.heads", "hidden"):
        assert got[name].min() > 0
        assert np.corrcoef(got[name], want[name])[0, 1] > 0.99, name
        assert got[name].mean() == pytest.approx(want[name].mean(), rel=0.05)


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_float16_gradients_below_its_smallest_number_survive(order: str) -> None:
    """Weights before the logits are so small that an unscaled float16 gradient would be zero."""
    model = tiny_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0**-12)
        model.lm_head.weight.mul_(2.0**-6)
    ids, discovery, criterion = tokens(2, 60), llama_discovery(model), Criterion(order=order)
    names = ["layers.0.ffn", "layers.1.ffn", "layers.0.heads"]
    want = score(model, discovery, criterion, input_ids=ids, seed=0, groups=names)
    half = copy.deepcopy(model).half()
    got = score(half, discovery, criterion, input_ids=ids, seed=0, groups=names)
    for name in names:
        assert np.corrcoef(got[name], want[name])[0, 1] > 0.99, name
        assert got[name].mean() == pytest.approx(want[name].mean(), rel=0.05)


def test_float16_overflow_on_the_way_is_scaled_down() -> None:
    """The gradient grows so much inside the model that the first scale cannot hold it."""
    model = TwoLayers()
    with torch.no_grad():
        model.second.weight.mul_(300.0)
        model.first.weight.div_(1000.0)
        model.embedding.weight.mul_(300.0)
    ids = torch.tensor([[0, 0], [1, 1]])
    want = score(model, model.discovery(), Criterion(), input_ids=ids, seed=0)["ffn"]
    got = score(model.half(), model.discovery(), Criterion(), input_ids=ids, seed=0)["ffn"]
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_loss_is_the_mean_over_predicted_tokens() -> None:
    logits = torch.randn(2, 300, 11, requires_grad=True)
    ids = torch.randint(0, 11, (2, 300))
    flat = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (expected,) = torch.autograd.grad(2 * flat, logits)
    cotangent, factor = loss_cotangent(logits, ids, 0)
    assert factor == 1.0
    torch.testing.assert_close(cotangent, expected)
    half, factor = loss_cotangent(logits.half(), ids, 0)
    assert factor == 1 / 299
    torch.testing.assert_close(half.float() * factor, expected, rtol=1e-2, atol=1e-6)


def test_random_depends_on_seed_and_name_alone(llama: Any) -> None:
    model, discovery, _, _, _ = llama
    every = score(model, discovery, Criterion("random"), input_ids=None, seed=1)
    some = score(
        model, discovery, Criterion("random"), input_ids=None, seed=1, groups=["layers.1.ffn"]
    )
    assert list(some) == ["layers.1.ffn"]
    np.testing.assert_array_equal(some["layers.1.ffn"], every["layers.1.ffn"])
    assert not np.array_equal(every["layers.0.ffn"], every["layers.1.ffn"])
    other = score(model, discovery, Criterion("random"), input_ids=None, seed=2)
    assert not np.array_equal(every["hidden"], other["hidden"])
    # a change here would change every plan made with this seed
    np.testing.assert_allclose(every["layers"], EXPECTED_RANDOM, rtol=1e-12)


EXPECTED_RANDOM = [0.36510112428736385, 0.631110983874611]


def test_subset_scores_are_those_of_the_whole(llama: Any) -> None:
    model, discovery, ids, _, _ = llama
    every = score(model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0)
    for names in (["layers.1.ffn"], ["layers.0.heads", "hidden"]):
        some = score(
            model, discovery, Criterion(order="mixed"), input_ids=ids, seed=0, groups=names
        )
        assert set(some) == set(names)
        for name in names:
            np.testing.assert_allclose(some[name], every[name], rtol=1e-5)


def test_frozen_groups_are_scored_only_on_request() -> None:
    model = TwoLayers()
    group = model.discovery().groups[0]
    frozen = Group("ffn", "ffn", 0, 2, group.members, frozen="because")
    discovery = describe(model, frozen)
    assert score(model, discovery, Criterion("l1"), input_ids=None, seed=0) == {}
    got = score(model, discovery, Criterion("l1"), input_ids=None, seed=0, groups=["ffn"])
    np.testing.assert_allclose(got["ffn"], [3.3, 7.05])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tailor"}, r"unknown criterion 'tailor': did you mean taylor\? choose one of"),
        ({"name": "magic"}, r"unknown criterion 'magic': choose one of random, l1, l2, taylor, "),
        ({"order": "secnd"}, r"unknown order 'secnd'.*mean second"),
        ({"reduction": "elements"}, r"unknown reduction 'elements'.*mean element"),
        ({"aggregate": "mean"}, r"unknown aggregate 'mean': choose one of sum, prod, max, last"),
    ],
)
def test_unknown_choices(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Criterion(**arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs calibration text and got none"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\).*give integers of shape"),
        (torch.zeros(3, 4), r"type torch\.float32.*give integers"),
        (torch.zeros(3, 1, dtype=torch.long), r"shape \(3, 1\) predicts no token"),
    ],
)
def test_unusable_calibration(ids: Any, message: str) -> None:
    model = TwoLayers()
    with pytest.raises(UserError, match=message):
        score(model, model.discovery(), Criterion(), input_ids=ids, seed=0)


def test_unknown_group_and_foreign_discovery() -> None:
    model = TwoLayers()
    with pytest.raises(UserError, match=r"unknown group 'fnn'.*did you mean ffn\?"):
        score(model, model.discovery(), Criterion("l1"), input_ids=None, seed=0, groups=["fnn"])
    foreign = describe(model, Group("g", "ffn", 0, 1, (Member("other.weight", 0, rows(1), 0),)))
    with pytest.raises(UserError, match=r"names the tensor other\.weight.*this very model"):
        score(model, foreign, Criterion("l1"), input_ids=None, seed=0)
