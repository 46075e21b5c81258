"""Experts of a mixture: what goes with them, how many must stay, and who notices."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import architectures

from families import discovered, make
from llm_pruner import Criterion, Selection, Target, allocate, score
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import InfeasibleError
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import cut_verified_, largest_difference
from llm_pruner.types import Discovery, Removal
from nets import HIDDEN, Net
from removals import cut_as_twin_, pick


def experts(discovery: Discovery) -> dict[str, Any]:
    return {
        group.name: group
        for group in discovery.groups
        if group.kind == "experts" and group.frozen is None
    }


def test_router_rows_go_with_their_experts() -> None:
    _, discovery = discovered("mixtral")
    groups = experts(discovery)
    assert list(groups) == ["layers.0.experts", "layers.1.experts"]
    for layer, group in enumerate(groups.values()):
        at = f"model.layers.{layer}.mlp"
        assert (group.size, group.least, group.layer) == (4, 2, layer)
        assert {(member.tensor, member.dim) for member in group.members} == {
            (f"{at}.gate.weight", 0),
            (f"{at}.experts.gate_up_proj", 0),
            (f"{at}.experts.down_proj", 0),
        }
        assert all((member.index == np.arange(4)[:, None]).all() for member in group.members)


def test_numbers_that_only_losses_read_follow_equal_mixtures() -> None:
    model, discovery = discovered("mixtral")
    smaller: Any = copy.deepcopy(model)
    cut_(smaller, discovery, {name: np.array([1]) for name in experts(discovery)})
    assert smaller.num_experts == 3
    tokens = torch.arange(16).view(2, 8)
    routed = smaller(tokens, labels=tokens, output_router_logits=True)
    assert routed.aux_loss.isfinite()
    uneven: Any = copy.deepcopy(model)
    cut_(uneven, discovery, {"layers.1.experts": np.array([1])})
    assert uneven.num_experts == 4
    assert [layer.mlp.experts.num_experts for layer in uneven.model.layers] == [4, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixtures_that_cannot_be_pruned_keep_their_numbers() -> None:
    """The experts of a token, by its number, are frozen beside those that a router chooses."""
    model: Any = architectures.tiny_model("deepseek_v4")
    discovery = discover(model)
    (group,) = experts(discovery).values()
    cut_verified_(model, discovery, {group.name: np.array([1])})
    numbers = [layer.mlp.experts.num_experts for layer in model.model.layers]
    assert numbers == [group.size, group.size - 1]


def test_experts_in_groups_go_one_of_each() -> None:
    _, discovery = discovered("deepseek_v3")
    groups = experts(discovery)
    assert list(groups) == ["layers.1.experts", "layers.2.experts"]
    group = groups["layers.1.experts"]
    # Two experts of one group are looked at to rate the group, and two are chosen of one group.
    assert (group.size, group.least) == (4, 2)
    members = {
        member.tensor.removeprefix("model.layers.1.mlp."): member for member in group.members
    }
    assert set(members) == {
        *("gate.weight", "gate.e_score_correction_bias"),
        *("experts.gate_up_proj", "experts.down_proj"),
    }
    assert members["gate.e_score_correction_bias"].buffer
    assert members["gate.weight"].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    whole = discovery.group("layers.1.experts_2")
    assert whole.frozen is not None
    assert "stays whole" in whole.frozen
    assert whole.members[0].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_as_many_stay_as_a_token_is_given() -> None:
    model, discovery = discovered("mixtral")
    with pytest.raises(InfeasibleError, match=r"experts: leaves 1 units; .* chooses 2 of them"):
        cut_(copy.deepcopy(model), discovery, {"layers.0.experts": np.array([0, 1, 3])})
    every = make("mixtral", num_experts_per_tok=4)
    groups = [group for group in discover(every).groups if group.kind == "experts"]
    assert {group.frozen for group in groups} == {"all of its units are chosen for every token"}


def test_no_target_takes_more_experts_than_can_go() -> None:
    model, discovery = discovered("mixtral")
    names = experts(discovery)
    scores = score(model, discovery, Criterion("l2"), seed=0, groups=set(names))
    assert all(scores[name].shape == (4,) and (scores[name] > 0).all() for name in names)
    for target in (Target(unit_ratio=0.9), Target(ratio=0.2, loose=True)):
        for scope in ("local", "global"):
            selection = Selection(("experts",), scope=scope)
            removal = allocate(discovery, scores, selection, target)
            assert {len(removal[name]) for name in names if name in removal} <= {1, 2}


def never_chosen(name: str, model: Any, discovery: Discovery, removal: Removal) -> nn.Module:
    """Return the dense model with routers that cannot choose the removed experts.

    This knows nothing of the trace beside the numbers of the experts.
    """
    model = copy.deepcopy(model)
    for layer, decoder in enumerate(model.model.layers):
        units = removal.get(f"layers.{layer}.experts")
        if units is None:
            continue
        group = discovery.group(f"layers.{layer}.experts")
        gone = torch.from_numpy(group.members[0].index[units].ravel())
        router = decoder.mlp.gate
        if name == "deepseek_v3":
            router.e_score_correction_bias[gone] = -torch.inf
            continue

        def route(
            module: Any, args: Any, output: Any, gone: torch.Tensor = gone
        ) -> tuple[torch.Tensor, ...]:
            logits = output[0].clone()
            logits[:, gone] = -torch.inf
            weights, chosen = torch.topk(logits.softmax(-1), module.top_k, dim=-1)
            if getattr(module, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        router.register_forward_hook(route)
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_pruned_equals_a_router_that_never_chooses_them(name: str) -> None:
    model, discovery = discovered(name)
    groups = experts(discovery)
    removal = {
        group: np.arange(number % 2, number % 2 + 2)
        for number, group in enumerate(groups)
        if groups[group].size - 2 >= groups[group].least
    }
    assert removal
    expected = pruned_logits(never_chosen(name, model, discovery, removal), discovery)
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    actual = pruned_logits(smaller, discovery)
    assert largest_difference(pruned_logits(model, discovery), expected) > 0.05
    assert largest_difference(expected, actual) <= 1e-5


def test_other_implementations_of_experts(record_property: Any) -> None:
    model = make("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    discovery = discover(model)
    assert [group.size for group in experts(discovery).values()] == [4, 4]
    whole = pick(discovery)
    assert {discovery.group(name).kind for name in whole} >= {"experts", "ffn", "hidden"}
    # Grouped products want aligned widths, for which this trace saw no need.
    narrow = pick(discovery, ("experts", "heads"))
    for implementation in ("batched_mm", "eager", "grouped_mm"):
        removal = narrow if implementation == "grouped_mm" else whole
        expected = twin_logits(model, discovery, removal)
        smaller = copy.deepcopy(model)
        cut_(smaller, discovery, removal)
        smaller.set_experts_implementation(implementation)
        difference = largest_difference(expected, pruned_logits(smaller, discovery))
        record_property("twin", (f"qwen3_moe {implementation}", "all", difference))
        assert difference <= 1e-5


@pytest.mark.parametrize(
    ("name", "gone", "kind", "key", "left"),
    [
        ("mixtral", {0: [1], 1: [3]}, "stock", "num_local_experts", 3),
        ("mixtral", {0: [1]}, "remote_code", "num_local_experts", 4),
        ("deepseek_v3", {1: [0, 2], 2: [1, 3]}, "stock", "num_local_experts", 4),
        ("deepseek_v3", {1: [0], 2: [1, 3]}, "remote_code", "num_local_experts", 8),
    ],
)
def test_saved_and_loaded(
    name: str, gone: dict[int, list[int]], kind: str, key: str, left: int, tmp_path: Path
) -> None:
    model, discovery = discovered(name)
    smaller: Any = copy.deepcopy(model)
    removal = {f"layers.{layer}.experts": np.array(units) for layer, units in gone.items()}
    edits = cut_(smaller, discovery, removal)
    saved = save_checkpoint(
        smaller,
        tmp_path / "out",
        edits=edits,
        plan_json="{}",
        dense_config=model.config,
    )
    assert saved.kind == kind
    loaded: PreTrainedModel = type(smaller).from_pretrained(saved.path, dtype=torch.float32)
    assert getattr(loaded.config, key) == left
    for ours, theirs in zip(
        pruned_logits(smaller, discovery), pruned_logits(loaded, discovery), strict=True
    ):
        # Weights that were read from a file lie elsewhere in memory, which moves the last bit.
        assert largest_difference([ours], [theirs]) <= 1e-5
    prompt = torch.tensor([[5, 9, 77, 20]])
    one, other, again = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
        for model, cached in ((smaller, True), (loaded, True), (loaded, False))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, again)


# --------------------------------------------------------------------------- hand-written mixtures

EXPERTS, CHOSEN = 5, 2
Weights = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Mixture(nn.Module):
    """Experts whose weights are taken by what a router chooses; ``between`` changes the choice."""

    def __init__(
        self, between: Callable[[torch.Tensor], torch.Tensor] = lambda chosen: chosen
    ) -> None:
        super().__init__()
        self.experts, self.chosen, self.between = EXPERTS, CHOSEN, between
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 8))
        self.down = nn.Parameter(torch.zeros(EXPERTS, 8, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).softmax(-1)
        weights, chosen = scores.topk(self.chosen, dim=-1)
        chosen = self.between(chosen)
        inner = torch.einsum("bth,btkhi->btki", x, self.up[chosen]).relu()
        outer = torch.einsum("btki,btkih->btkh", inner, self.down[chosen])
        return (outer * weights[..., None]).sum(2)


def of_router(discovery: Discovery) -> list[Any]:
    """Return the groups that can shrink and hold rows of the router."""
    row = ("bodies.0.router.weight", 0)
    return [
        group
        for group in discovery.groups
        if group.frozen is None and row in {(m.tensor, m.dim) for m in group.members}
    ]


def why(discovery: Discovery) -> str | None:
    """Return why the experts are frozen; they must be so in all that holds them."""
    trace = discovery.graph.trace
    reasons = [
        trace.atoms.reason(trace.tensors[f"bodies.0.{name}"][0])
        for name in ("router.weight", "up", "down")
    ]
    assert not of_router(discovery)
    assert None not in reasons
    return reasons[0]


@pytest.mark.parametrize(
    "between",
    [lambda chosen: chosen, lambda chosen: torch.cat([chosen[..., :1], chosen[..., :1]], -1)],
    ids=["as it is", "joined"],
)
def test_weights_taken_by_choice(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net = Net(Mixture(between))
    discovery = discover(net)
    (group,) = experts(discovery).values()
    assert (group.size, group.least) == (EXPERTS, CHOSEN)
    assert {(member.tensor, member.dim) for member in group.members} == {
        *(("bodies.0.router.weight", 0), ("bodies.0.router.bias", 0)),
        *(("bodies.0.up", 0), ("bodies.0.down", 0)),
    }
    removal = {group.name: np.array([0, 3])}
    assert cut_as_twin_(net, discovery, removal) > 1e-3


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (lambda chosen: (chosen + 1) % EXPERTS, "its positions are chosen by add"),
        (lambda chosen: chosen.clamp(max=EXPERTS - 1), "its positions are chosen by clamp"),
        (
            lambda chosen: torch.cat([chosen[..., :1], torch.zeros_like(chosen[..., :1])], -1),
            "its positions are chosen by cat",
        ),
        (lambda chosen: torch.where(chosen > 2, chosen, 0), "its positions are chosen by gt"),
        (lambda chosen: torch.tensor(chosen.tolist()), "the code follows its values (tolist)"),
    ],
    ids=["shifted", "clamped", "joined", "replaced", "read"],
)
def test_a_choice_that_is_changed_freezes_the_experts(
    between: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    assert said in str(why(discover(Net(Mixture(between)))))


class Counted(nn.Module):
    """Adds a weight for each time that an expert is chosen."""

    def __init__(self, *, literal: bool = False) -> None:
        super().__init__()
        self.experts, self.literal = EXPERTS, literal
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        self.down = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).topk(CHOSEN, dim=-1)[1]
        bins = EXPERTS if self.literal else self.experts
        counts = torch.histc(chosen.reshape(-1).float(), bins=bins, min=0, max=bins - 1)
        return x * F.silu(counts @ self.up) + counts @ self.down


def test_counts_of_choices() -> None:
    net = Net(Counted())
    discovery = discover(net)
    (group,) = of_router(discovery)
    assert (group.size, group.least) == (EXPERTS, CHOSEN)
    removal = {group.name: np.array([1, 2])}
    expected = twin_logits(net, discovery, removal)
    cut_(net, discovery, removal)
    assert net.bodies[0].experts == 3
    assert largest_difference(expected, pruned_logits(net, discovery)) <= 1e-5
