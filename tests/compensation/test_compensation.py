"""Least squares: the formula, never worse, and closer to the dense model in many families."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import make
from helpers import tiny_model
from llm_pruner.compensation import RIDGES, held_out_samples, refit, refit_
from llm_pruner.compensation.least_squares import Equations, Rows, Sums, best_refit
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, score
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.surgery.cut import cut_
from llm_pruner.types import Removal


def tokens(samples: int = 24, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 100, (samples, length), generator=torch.Generator().manual_seed(2))


def filled(
    kind: type[Equations],
    weight: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> Equations:
    made = kind(weight)
    for part in (slice(0, 3), slice(3, None)):
        made.add(rows[part], targets[part], weights[part])
    return made


@pytest.mark.parametrize("kind", [Rows, Sums])
@pytest.mark.parametrize("count", [4, 50])
def test_the_formula_minimises_fit_and_distance(kind: type[Equations], count: int) -> None:
    torch.manual_seed(0)
    rows, targets = torch.randn(count, 6).double(), torch.randn(count, 3).double()
    rows *= torch.tensor([0.5, 1, 1, 2, 5, 10])
    weights, weight = torch.rand(count).double(), torch.randn(3, 6).double()
    system = filled(kind, weight, rows, targets, weights).system()
    damping = 0.5 * (weights[:, None] * rows.square()).sum(0)
    (step,) = system.steps(0.5)
    assert step is not None
    expected = nn.Parameter(weight + step)
    fit = (weights[:, None] * (rows @ expected.T - targets).square()).sum()
    loss = fit + (damping * (expected - weight).square()).sum()
    (gradient,) = torch.autograd.grad(loss, expected)
    assert gradient.abs().max() < 1e-10
    # Some outputs alone are as they are among all.
    torch.testing.assert_close(system.steps(0.5, torch.tensor([0, 2]))[0], step[[0, 2]])
    # An infinite ridge leaves the weight alone; it does not shrink it.
    torch.testing.assert_close(system.steps(1e12)[0], torch.zeros_like(weight), atol=1e-8, rtol=0)


def test_the_error_is_that_of_the_weighted_tokens() -> None:
    torch.manual_seed(0)
    rows, targets, weights = torch.randn(50, 6), torch.randn(50, 3), torch.rand(50)
    weight = torch.randn(3, 6)
    made = filled(Rows, weight, rows, targets, weights)
    assert isinstance(made, Rows)
    for outputs in (torch.arange(3), torch.tensor([1])):
        off = (rows @ weight.T - targets)[:, outputs]
        plain = (weights[:, None] * off.square()).sum()
        whole = (weights[:, None] * targets[:, outputs].square()).sum()
        error = made.error(weight[outputs], outputs)
        assert error == pytest.approx(float(plain / whole), rel=1e-2)


@pytest.mark.parametrize("count", [200, 5000])
def test_float32_is_enough(count: int) -> None:
    """Inputs whose sizes differ a hundredfold and that are much alike, as in a layer."""
    torch.manual_seed(0)
    mixing = torch.randn(40, 300)
    rows = (torch.randn(count, 40) @ mixing + 0.3 * torch.randn(count, 300)).relu()
    rows *= torch.logspace(-1, 1, 300)
    weight = torch.randn(20, 300)
    targets = rows @ (weight + 0.1 * torch.randn(20, 300)).T
    steps = []
    for kind, dtype in ((Rows, torch.float32), (Sums, torch.float32), (Sums, torch.float64)):
        made = filled(kind, weight.to(dtype), rows, targets, torch.ones(count))
        with torch.autocast("cpu", torch.bfloat16):  # as modules may multiply meanwhile
            steps += made.system().steps(0.1)
    for step in steps[:2]:
        off = rows.double() @ (step - steps[2]).double().T
        assert off.norm() < 0.02 * (rows.double() @ steps[2].double().T).norm()


@pytest.mark.parametrize("kind", [Rows, Sums])
def test_a_fit_to_noise_is_refused(kind: type[Equations]) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(8, 6).double(), torch.randn(3, 6).double()
    held_rows = torch.randn(400, 6).double()
    noise = torch.randn(8, 3).double() * 5
    fit = filled(kind, weight, rows, rows @ weight.T + noise, torch.ones(8))
    held_out = filled(Rows, weight, held_rows, held_rows @ weight.T, torch.ones(400))
    found = best_refit(fit, held_out)
    assert found.ridge is None
    assert found.weight is weight
    assert found.before == found.after


@pytest.mark.parametrize("start", [None, 0.1, 3.0])
def test_the_search_ends_at_the_best_ridge(start: float | None) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(60, 20).double(), torch.randn(4, 20).double()
    true = weight + 0.3 * torch.randn(4, 20)
    held_rows = torch.randn(400, 20).double()
    held_targets = held_rows @ true.T
    tokens = rows, rows @ true.T + 2 * torch.randn(60, 4), torch.ones(60)
    held_out = filled(Rows, weight, held_rows, held_targets, torch.ones(400))
    assert isinstance(held_out, Rows)
    system = filled(Sums, weight, *tokens).system()

    def error(ridge: float) -> float:
        return held_out.error(weight + system.steps(ridge)[0])

    errors = {ridge: error(ridge) for ridge in np.geomspace(*RIDGES, 100)}
    best = min(errors, key=lambda ridge: errors[ridge])
    found = best_refit(filled(Sums, weight, *tokens), held_out, start=start)
    assert 0.2 < best < 1.5
    assert found.ridge == pytest.approx(best, rel=0.3)
    assert error(found.ridge) <= 1.002 * errors[best]
    assert errors[best] <= found.after <= 1.05 * errors[best]
    # One that is given is not searched for.
    assert best_refit(filled(Sums, weight, *tokens), held_out, (2.0, 2.0), start).ridge == 2.0


def removal_of(model: nn.Module, kinds: tuple[str, ...]) -> tuple[object, Removal]:
    discovery = discover(model)
    generator = np.random.default_rng(0)
    removal = {}
    for group in discovery.groups:
        if group.kind in kinds and group.frozen is None:
            count = max(1, group.size // 3)
            if group.kind == "layers":
                count = 1
            count += (group.size - count) % group.multiple
            removal[group.name] = np.sort(generator.permutation(group.size)[:count])
    return discovery, removal


def divergence(model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p = model(ids, use_cache=False).logits.log_softmax(-1)
        q = dense(ids, use_cache=False).logits.log_softmax(-1)
    return float(F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ("heads", "ffn")),
        ("llama", ("ffn", "hidden")),
        ("llama", ("layers", "ffn")),
        ("gpt2", ("heads", "ffn")),
        ("gpt_neox", ("heads", "ffn")),
        ("falcon", ("ffn",)),
        ("gemma3_text", ("ffn",)),
        ("opt", ("ffn",)),
        ("mixtral", ("heads",)),
    ],
)
def test_refitted_models_are_closer_to_the_dense_one(name: str, kinds: tuple[str, ...]) -> None:
    dense = make(name)
    model = copy.deepcopy(dense)
    discovery, removal = removal_of(model, kinds)
    cut_(model, discovery, removal)
    masked = copy.deepcopy(model)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    ids = tokens()
    done = refit_(model, dense, discovery, removal, ids)
    assert all(one.after <= one.before for one in done)
    assert sum(one.ridge is not None for one in done) >= len(done) / 2
    assert len({one.module for one in done}) == len(done) > 0
    fresh = torch.randint(3, 100, (16, 16), generator=torch.Generator().manual_seed(9))
    assert divergence(model, dense, fresh) < divergence(masked, dense, fresh)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    changed = {
        key
        for key, value in model.state_dict().items()
        if not torch.equal(value, masked.state_dict()[key])
    }
    assert changed <= {f"{one.module}.weight" for one in done if one.ridge is not None}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("gone", [[0], [1], [2], [1, 2], [3]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_the_last_consumer_before_layers_that_went_stands_in_for_them(
    name: str, gone: list[int]
) -> None:
    dense = make(name, num_hidden_layers=4)
    model = copy.deepcopy(dense)
    discovery = discover(model)
    removal = {"layers": np.array(gone)}
    cut_(model, discovery, removal)
    masked = copy.deepcopy(model)
    done = refit_(model, dense, discovery, removal, tokens())
    fresh = torch.randint(3, 100, (16, 16), generator=torch.Generator().manual_seed(9))

    def distance(one: Any) -> float:
        """Of the hidden state before the removed layers from the dense one behind them."""
        with torch.no_grad():
            given, wanted = (
                m(fresh, output_hidden_states=True, use_cache=False).hidden_states
                for m in (one, dense)
            )
        # What transformers calls the last one has gone through the last norm.
        at, behind = gone[0], gone[-1] + 1
        return float((given[at] - wanted[behind]).square().mean())

    assert len({one.module for one in done}) == len(done) > 0
    if gone[0] > 0 and name != "olmo2":  # whose last consumer goes through a norm
        assert distance(model) < distance(masked)
    assert divergence(model, dense, fresh) <= divergence(masked, dense, fresh)


@pytest.mark.parametrize(
    ("name", "kinds", "spared"),
    [
        # All but one of four parts, of all blocks: that one tells how a block is made.
        ("llama", ("ffn",), 9),
        ("llama", ("heads", "ffn"), 9),
        ("gpt_neox", ("ffn",), 6),
        ("llama", ("layers", "ffn"), 10),
        # What a norm makes of a consumer's output is no hidden state, so all parts are run.
        ("gemma3_text", ("ffn",), 0),
    ],
)
def test_hidden_states_of_the_scores_spare_the_dense_blocks(
    name: str, kinds: tuple[str, ...], spared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "_TOKENS", 10 * 16)
    dense = make(name).double()  # sums of other parts are rounded otherwise
    discovery, removal = removal_of(dense, kinds)
    chosen = {group.name for group in discovery.groups if group.kind == "ffn"}
    ids = tokens()
    longer = torch.cat((ids, tokens(60)[24:]))
    fitted: list[dict[str, torch.Tensor]] = []
    counts: list[int] = []

    def count(*_: object) -> None:
        counts[-1] += 1

    with closing(HiddenStates()) as known:
        score(
            *(dense, discovery, Criterion("fisher")),
            **{"input_ids": ids, "seed": 0, "groups": chosen, "keep": known},
        )
        assert [known.count(one) for one in (ids, ids[:3], longer, ids.flip(0))] == [24, 3, 24, 0]
        assert known.count(ids[:, 1:]) == 0
        for given, text in (
            *((None, ids), (known, ids), (known, ids.flip(0))),
            *((None, longer), (known, longer)),
        ):
            model = copy.deepcopy(dense)
            cut_(model, discovery, removal)
            counts.append(0)
            hooks = [
                module.register_forward_pre_hook(count)
                for name, module in dense.named_modules()
                if name.endswith("mlp")
            ]
            refit_(model, dense, discovery, removal, text, known=given)
            for hook in hooks:
                hook.remove()
            fitted.append(model.state_dict())
    for one, other in ((0, 1), (3, 4)):
        for key, value in fitted[one].items():
            torch.testing.assert_close(fitted[other][key], value)
    assert counts[0] - counts[1] == spared
    assert counts[2] == counts[0]
    # The samples behind those of the scores are one part more, since they begin another one.
    # Of longer text it is the same; the first of three parts that are known is run there, too.
    assert counts[3] - counts[4] == round(2 * spared / 3)


def test_weights_are_trained_afterwards_that_were_before() -> None:
    dense = make("llama")
    discovery, removal = removal_of(dense, ("ffn",))
    model = copy.deepcopy(dense)
    cut_(model, discovery, removal)
    model.model.layers[0].mlp.down_proj.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    found = refit_(model, dense, discovery, removal, tokens())
    assert any(one.changed for one in found)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before
    assert not all(before.values())


def test_what_lost_nothing_is_left_alone() -> None:
    dense = make("llama")
    model = copy.deepcopy(dense)
    discovery = discover(model)
    removal = {"layers.1.ffn": np.arange(8), "layers": np.zeros(0, dtype=np.int64)}
    cut_(model, discovery, removal)
    done = refit_(model, dense, discovery, removal, tokens())
    assert [one.module for one in done] == ["model.layers.1.mlp.down_proj"]


def test_held_out_samples_lie_together_at_the_end() -> None:
    assert held_out_samples(2, 16).tolist() == [False, True]
    assert held_out_samples(24, 16).tolist() == [False] * 21 + [True] * 3
    assert int(held_out_samples(800, 512).sum()) == 8


def test_the_first_token_of_a_sample_is_fitted_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most models have their attention sink there, so it may not be one token among many."""
    dense = make("llama")
    ids = tokens(32, 64)

    def errors(share: float) -> torch.Tensor:
        """Return the relative error of the logits by position."""
        model = copy.deepcopy(dense)
        discovery, removal = removal_of(model, ("heads", "ffn"))
        cut_(model, discovery, removal)
        monkeypatch.setattr(refit, "FIRST", share)
        refit_(model, dense, discovery, removal, ids)
        with torch.no_grad():
            wanted = dense(ids, use_cache=False).logits
            found = model(ids, use_cache=False).logits
        gap: torch.Tensor = (found - wanted).square().sum(-1).mean(0)
        return gap / wanted.square().sum(-1).mean(0)

    usual = refit.FIRST
    alike, first = errors(0.0), errors(usual)
    assert first[0] < 0.9 * alike[0]
    assert first[1:].mean() < 1.2 * alike[1:].mean()


def test_bfloat16_and_refusals() -> None:
    dense = make("llama").to(torch.bfloat16)
    model = copy.deepcopy(dense)
    discovery, removal = removal_of(model, ("ffn",))
    cut_(model, discovery, removal)
    done = refit_(model, dense, discovery, removal, tokens())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any(one.ridge is not None for one in done)
    with pytest.raises(UserError, match="at least 2 calibration samples and got 1"):
        refit_(model, dense, discovery, removal, tokens(1))


_SHARING: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
}


def test_blocks_that_read_keys_and_values_of_earlier_ones_are_refitted() -> None:
    dense = tiny_model("gemma4_text", **_SHARING).requires_grad_(False)
    model, ids = copy.deepcopy(dense), tokens()
    with pytest.raises(NotBlockwise, match="block 4 depends on more"):
        find_chain(dense, ids, {})
    chain = find_chain(dense, ids, {}, carries=True)
    kept: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda block, _, output: kept.update({block: output}))
        for block in chain.blocks
    ]
    with torch.no_grad(), chain.opened():
        dense(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        hidden, carried = chain.entry(ids), dict[Any, Any]()
        for number, block in enumerate(chain.blocks):
            _, hidden = chain.run_block(number, ids, hidden, carried)
            torch.testing.assert_close(hidden, kept[block])
    assert list(carried) == ["shared_kv_states"]
    discovery, removal = removal_of(model, ("heads", "ffn"))
    cut_(model, discovery, removal)
    masked = copy.deepcopy(model)
    done = refit_(model, dense, discovery, removal, ids)
    assert {int(one.module.split(".")[2]) for one in done if one.changed} >= {4, 5}
    fresh = torch.randint(3, 100, (16, 16), generator=torch.Generator().manual_seed(9))
    assert divergence(model, dense, fresh) < divergence(masked, dense, fresh)


def test_a_model_that_is_no_chain_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama", num_hidden_layers=1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            state = self.inner.model(input_ids, use_cache=False).last_hidden_state
            again = self.inner.model(inputs_embeds=state, use_cache=False).last_hidden_state
            return self.inner.lm_head(again)

    dense = Twice()
    model = copy.deepcopy(dense)
    discovery, removal = removal_of(model, ("ffn",))
    cut_(model, discovery, removal)
    with pytest.raises(UserError, match=r"block by block: .*; use --compensation none"):
        refit_(model, dense, discovery, removal, tokens())
