"""Criteria that look at activations: gates against autograd, formulas against a few numbers."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from families import discovered, make
from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, boundary_pass, score
from llm_pruner.importance.criteria import MEASURES, obs
from llm_pruner.importance.members import last_members
from llm_pruner.importance.observation import Measure, Observation, Reading
from llm_pruner.importance.observing import measure
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import find_chain
from llm_pruner.models.forward import undisturbed
from llm_pruner.models.linear_modules import Consumer, consumers_of, weight_of
from llm_pruner.models.streaming import stream_
from llm_pruner.types import Group, Member

ALL = ("gates", "moments", "gram")


def tokens(samples: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 100, (samples, length), generator=torch.Generator().manual_seed(1))


def observe(
    model: Any, ids: torch.Tensor, groups: list[Group], needs: Any
) -> dict[str, Observation]:
    found: dict[str, Observation] = {}

    def note(seen: Observation) -> np.ndarray[Any, Any]:
        found[seen.group.name] = seen
        return np.zeros(seen.group.size)

    measure(model, ids, groups, Measure(frozenset(needs), note), None)
    return found


def gated(
    model: Any, group: Group, ids: torch.Tensor, others: tuple[str, ...] = ()
) -> np.ndarray[Any, Any]:
    """Derivative of each sample's loss by a gate on each unit, gates put in by hand.

    Args:
        others: modules that read all units in order, beside the linear ones.
    """
    whole = [Consumer(group.name, one, np.arange(group.size)[:, None]) for one in others]
    rows = []
    for sample in ids:
        gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
        handles = []
        for consumer in (*consumers_of(model, group), *whole):
            module = model.get_submodule(consumer.module)
            place = torch.from_numpy(consumer.index)

            def hook(
                _: Any, args: Any, place: torch.Tensor = place, gate: torch.Tensor = gate
            ) -> Any:
                factors = torch.ones(args[0].shape[-1], dtype=torch.float64)
                values = gate[:, None].expand(place.shape).flatten()
                factors = factors.index_put((place.flatten(),), values)
                return (args[0] * factors, *args[1:])

            handles.append(module.register_forward_pre_hook(hook))
        logits = model(sample[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], sample[1:])
        rows.append(torch.autograd.grad(loss, gate)[0].numpy())
        for handle in handles:
            handle.remove()
    return np.stack(rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "gemma3_text"])
def test_gates_are_derivatives(name: str) -> None:
    model, discovery = discovered(name)
    model = copy.deepcopy(model).double()
    kinds = ("heads", "ffn", "hidden")
    groups = [g for g in discovery.groups if g.kind in kinds and g.frozen is None]
    ids = tokens()
    with undisturbed(model):
        seen = observe(model, ids, groups, ["gates"])
    for group in groups:
        np.testing.assert_allclose(
            seen[group.name].gates[:, 0], gated(model, group, ids), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("stride", [1, 2])
def test_activations_that_are_held_say_what_blocks_say_that_run_again(
    name: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latter where weights are read block by block; other products are rounded to bfloat16."""
    model, discovery = discovered(name)
    model.save_pretrained(tmp_path)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    stream_(streamed, torch.float32)
    kinds, needs = ("heads", "ffn", "layers"), {"gates"}
    if stride == 2:
        kinds, needs = ("heads", "ffn"), {"gates", "tokens", "moments"}
    groups = [g for g in discovery.groups if g.kind in kinds and g.frozen is None]
    ids = tokens(12, 32)
    monkeypatch.setattr(boundary_pass, "TOKENS", 256)
    monkeypatch.setattr(boundary_pass, "_TOKENS_HELD", 96)
    monkeypatch.setattr(boundary_pass, "_FEWEST_HELD", 64)
    monkeypatch.setattr(boundary_pass, "loss_stride", lambda _: stride)
    ran: list[slice] = []
    sizes: list[tuple[int, int]] = []

    class Noted(boundary_pass._BlockPass):
        def _there_and_back(self, part: slice) -> None:
            ran.append(part)
            super()._there_and_back(part)

        def _measure(self, index: int) -> None:
            super()._measure(index)
            sizes.append((self.each, self.copies))

    monkeypatch.setattr(boundary_pass, "_BlockPass", Noted)
    found, states = [], []
    for one in (model, streamed):
        seen: dict[str, Observation] = {}

        def note(one: Observation, seen: Any = seen) -> np.ndarray[Any, Any]:
            seen[one.group.name] = one
            return np.zeros(one.group.size)

        how = Measure(frozenset(needs), note)
        states.append(HiddenStates())
        with undisturbed(one), torch.autocast("cpu", torch.bfloat16, enabled=stride == 2):
            measure(one, ids, groups, how, states[-1])
        found.append(seen)
    assert sizes[0] == sizes[1]
    assert (sizes[0][1] > 0) == (stride == 2)
    assert [one.stop - one.start for one in ran] == [3, 3, 2, 3, 1]
    held, again = found
    assert held.keys() == again.keys() == {group.name for group in groups}
    for group, one in held.items():
        np.testing.assert_array_equal(one.gates, again[group].gates)
        assert (one.gates != 0).any()
        if one.token_squares is not None:
            np.testing.assert_array_equal(one.token_squares, again[group].token_squares)
        for mine, other in zip(one.readings, again[group].readings, strict=True):
            np.testing.assert_array_equal(mine.square, other.square)
    with undisturbed(model):
        blocks = len(find_chain(model, ids, {}).blocks)
    for block in range(blocks + 1):
        whole = [one.read(block, slice(0, 12)) for one in states]
        assert torch.equal(*whole)
    for one in states:
        one.close()


def test_gates_without_a_linear_consumer_come_from_weight_gradients() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    discovery = discover(model)
    groups = [g for g in discovery.groups if g.kind == "ffn" and g.frozen is None]
    ids = tokens()
    assert not any(consumers_of(model, group) for group in groups)
    with undisturbed(model):
        seen = observe(model, ids, groups, ["gates"])
    parameters = dict(model.named_parameters())
    for group in groups:
        member = max((m for m in group.members if not m.buffer), key=lambda m: m.order)
        weight = parameters[member.tensor]
        for number, sample in enumerate(ids):
            logits = model(sample[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], sample[1:])
            (gradient,) = torch.autograd.grad(loss, weight)
            product = (weight * gradient).detach()
            others = [axis for axis in range(product.ndim) if axis != member.dim]
            expected = product.sum(others).numpy()[member.index].sum(1)
            np.testing.assert_allclose(
                seen[group.name].gates[number, 0], expected, rtol=1e-4, atol=1e-8
            )
    with pytest.raises(UserError, match="not only linear modules read layers"):
        score(model, discovery, Criterion("wanda"), input_ids=ids, seed=0, groups=[groups[0].name])


@pytest.mark.parametrize(("name", "length"), [("mixtral", 9), ("qwen3_moe", 9), ("qwen2_moe", 150)])
def test_gates_of_what_linear_modules_and_experts_read(name: str, length: int) -> None:
    """The hidden state is read by routers and the fused tensors of experts, too."""
    model, discovery = discovered(name)
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # grouped products take no float64
    hidden, ids = discovery.group("hidden"), tokens(2, length)
    routed = [path for path, _ in model.named_modules() if re.search(r"mlp\.(gate|experts)$", path)]
    assert len(routed) > 2
    with undisturbed(model):
        seen = observe(model, ids, [hidden], ["gates"])["hidden"].gates
        both = [
            score(model, discovery, Criterion(one), input_ids=ids, seed=0, groups=["hidden"])
            for one in ("fisher", "fisher-obs")
        ]
    assert seen is not None
    expected = gated(model, hidden, ids, tuple(routed))
    np.testing.assert_allclose(seen[:, 0], expected, rtol=1e-7, atol=1e-12)
    assert not seen[:, 1:].any()
    # Inputs of experts are unknown, so there is no other order than that of the gates.
    np.testing.assert_array_equal(both[0]["hidden"], both[1]["hidden"])
    with pytest.raises(UserError, match="not only linear modules read hidden"):
        score(model, discovery, Criterion("wanda"), input_ids=ids, seed=0, groups=["hidden"])


def test_gates_in_front_of_the_blocks() -> None:
    """OPT-350m widens its embeddings by a linear module before the first block."""
    model = tiny_model("opt", word_embed_proj_dim=16, hidden_size=48, ffn_dim=32)
    model = model.double()
    discovery = discover(model)
    read = [one for one in discovery.groups if one.size == 16 and one.frozen is None]
    (group,) = [g for g in read if any("project_in" in m.tensor for m in g.members)]
    ids = tokens()
    with undisturbed(model):
        seen = observe(model, ids, [group], ["gates"])
    np.testing.assert_allclose(
        seen[group.name].gates[:, 0], gated(model, group, ids), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_gates_of_a_unit_of_all_layers(name: str) -> None:
    """A pair of rotary channels goes from every layer: its gate multiplies the keys of each."""
    model, discovery = discovered(name)
    model = copy.deepcopy(model).double()
    group, ids = discovery.group("head_dim"), tokens()
    with undisturbed(model):
        seen = observe(model, ids, [group], ["gates"])
    gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
    keys = [one for one in group.members if one.tensor.endswith("k_proj.weight")]
    assert len(keys) > 1

    def gated_weight(member: Member) -> torch.Tensor:
        weight = model.get_parameter(member.tensor).detach()
        factors = torch.ones(weight.shape[member.dim], dtype=torch.float64)
        index = torch.from_numpy(member.index)
        factors = factors.index_put((index.flatten(),), gate.repeat_interleave(index.shape[1]))
        return weight * factors.unsqueeze(1 - member.dim)

    for number, sample in enumerate(ids):
        weights = {one.tensor: gated_weight(one) for one in keys}
        logits = functional_call(
            model, weights, (sample[None],), {"use_cache": False}, tie_weights=False
        ).logits[0]
        loss = F.cross_entropy(logits[:-1], sample[1:])
        (expected,) = torch.autograd.grad(loss, gate)
        np.testing.assert_allclose(
            seen[group.name].gates[number, 0], expected.numpy(), rtol=1e-6, atol=1e-10
        )


def test_moments_are_those_of_the_consumers_input() -> None:
    model, discovery = discovered("llama")
    ids = tokens(5)
    group = discovery.group("layers.1.ffn")
    inputs: list[torch.Tensor] = []
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    rows = inputs[0].flatten(0, 1)
    with undisturbed(model):
        (reading,) = observe(model, ids, [group], ALL)["layers.1.ffn"].readings
    assert reading.tokens == 45
    np.testing.assert_allclose(reading.total / 45, rows.mean(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(reading.mean_square, rows.square().mean(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(reading.variance, rows.var(0, correction=0).numpy(), atol=1e-6)
    assert reading.gram is not None
    np.testing.assert_allclose(reading.gram.numpy(), (rows.T @ rows).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "gemma3_text"])
def test_inputs_alone_take_one_forward_pass(name: str) -> None:
    model, discovery = discovered(name)
    groups = [g for g in discovery.groups if g.kind in ("heads", "ffn") and g.frozen is None]
    ids = tokens(33, 64)  # two parts of at most 2,048 tokens
    with undisturbed(model):
        wanted = observe(model, ids, groups, ALL)
        calls: dict[str, int] = {}

        def count(module: str) -> None:
            calls[module] = calls.get(module, 0) + 1

        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        paths = {head, *(c.module for g in groups for c in consumers_of(model, g))}
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _m, args, path=path: count(path) if args[0].shape[-2] == 64 else None
            )
            for path in paths
        ]
        found = observe(model, ids, groups, ("moments", "gram"))
        for handle in handles:
            handle.remove()
    assert calls == dict.fromkeys(paths - {head}, 2)
    for group in groups:
        for one, other in zip(found[group.name].readings, wanted[group.name].readings, strict=True):
            assert one.tokens == other.tokens == 2112
            np.testing.assert_allclose(one.total, other.total, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(one.mean_square, other.mean_square, rtol=1e-5)
            assert torch.allclose(one.gram, other.gram, rtol=1e-4, atol=1e-3)


def test_a_layers_gate_is_the_derivative_of_what_it_adds() -> None:
    model, discovery = discovered("llama")
    model = copy.deepcopy(model).double()
    ids = tokens()
    with undisturbed(model):
        seen = observe(model, ids, [discovery.group("layers")], ["gates"])["layers"].gates
    assert seen is not None
    for unit, sample in ((0, 0), (1, 2)):
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        block = model.model.layers[unit]

        def hook(_m: Any, args: Any, output: Any, gate: torch.Tensor = gate) -> Any:
            return args[0] + gate * (output - args[0])

        handle = block.register_forward_hook(hook)
        logits = model(ids[sample : sample + 1], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[sample, 1:])
        (expected,) = torch.autograd.grad(loss, gate)
        handle.remove()
        assert seen[sample, 0, unit] == pytest.approx(float(expected), rel=1e-8)


X = torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 1.0]], dtype=torch.float64)
W = torch.tensor([[1.0, -2.0, 0.0], [2.0, 1.0, 4.0]], dtype=torch.float64)


def observation(rows: torch.Tensor = X, weight: torch.Tensor = W) -> Observation:
    index = np.arange(rows.shape[1])[:, None]
    group = Group("g", "ffn", 0, rows.shape[1], (Member("m.weight", 1, index, 0),))
    reading = Reading(
        Consumer("g", "m", index),
        weight,
        len(rows),
        rows.sum(0).numpy(),
        rows.square().sum(0).numpy(),
        rows.T @ rows,
    )
    gates = np.array([[[1.0, -2.0, 0.0]], [[3.0, 0.0, 0.5]]])
    return Observation(group, gates, (reading,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gate", [2.0, 1.0, 0.25]),
        ("fisher", [2.5, 1.0, 0.0625]),
        ("wanda", [3 * 10**0.5, 3 * 8**0.5, 4.0]),
        ("fluctuation", [5.0, 20.0, 4.0]),
        ("contribution", [25.0, 20.0, 8.0]),
    ],
)
def test_formulas(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(MEASURES[name].formula(observation()), expected)


def test_obs_is_the_error_after_the_others_were_refitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    rows[:, 1] = rows[:, 0] + 0.5 * rows[:, 1]  # each of these two can stand for the other
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(obs, "RIDGE", 0.001)
    cost = MEASURES["obs"].formula(observation(rows, weight))
    for unit in range(4):
        kept = [other for other in range(4) if other != unit]
        target = rows @ weight.T
        fit = torch.linalg.lstsq(rows[:, kept], target).solution
        error = (target - rows[:, kept] @ fit).square().sum() / len(rows)
        assert cost[unit] == pytest.approx(float(error), rel=0.1)
    assert cost.argmin() in (0, 1)
    leverage = MEASURES["leverage"].formula(observation(rows, weight))
    assert set(np.argsort(leverage)[:2]) == {0, 1}
    assert ((leverage > 0) & (leverage < 1)).all()


@pytest.mark.parametrize("extreme", [float("nan"), 1e30])
@pytest.mark.parametrize("name", ["obs", "leverage"])
@pytest.mark.parametrize(
    ("kind", "module"), [("heads", "self_attn.v_proj"), ("ffn", "mlp.up_proj")]
)
def test_activations_that_are_not_finite_are_named(
    name: str, extreme: float, kind: str, module: str
) -> None:
    model, discovery = copy.deepcopy(discovered("llama"))
    model.get_submodule(f"model.layers.0.{module}").weight.data[0] = extreme
    wanted = [f"layers.0.{kind}"]
    with pytest.raises(UserError, match=f"importance of {wanted[0]} is not finite"):
        score(model, discovery, Criterion(name), input_ids=tokens(), seed=0, groups=wanted)


def test_long_samples_are_cut_into_segments() -> None:
    model = tiny_model("llama", max_position_embeddings=512).double()
    discovery = discover(model)
    group = discovery.group("layers.0.ffn")
    ids = tokens(2, 300)
    with undisturbed(model):
        gates = observe(model, ids, [group], ["gates"])[group.name].gates
    assert gates is not None
    assert gates.shape == (2, 3, group.size)
    np.testing.assert_allclose(gates.sum(1), gated(model, group, ids), rtol=1e-7, atol=1e-12)
    seen = Observation(group, gates)
    expected = np.square(gates).sum(1).mean(0) / 2
    np.testing.assert_allclose(MEASURES["fisher"].formula(seen), expected)


class Shared(nn.Module):
    """A model that is no chain of blocks and mixes the samples' tokens in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 100)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        flat = hidden.flatten(0, 1)
        return self.head((flat + self.down(torch.relu(self.up(flat)))).view(hidden.shape))


def test_models_that_are_no_chain_or_mix_samples() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    discovery = discover(model)
    (name,) = (group.name for group in discovery.groups if group.kind == "ffn")
    ids = tokens(4)
    together = score(model, discovery, Criterion("fisher"), input_ids=ids, seed=0, groups=[name])
    module = model.down
    gates = []
    for sample in ids:
        inputs: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _m, args, to=inputs: to.append(args[0]))
        loss = F.cross_entropy(model(sample[None])[0, :-1], sample[1:])
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, inputs)
        gates.append((inputs[0] * gradient).sum(0).detach())
    expected = torch.stack(gates).square().mean(0) / 2
    np.testing.assert_allclose(together[name], expected.numpy(), rtol=1e-4, atol=1e-9)
    assert weight_of(module).shape == (8, 12)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_criterion_scores_a_real_discovery_and_leaves_the_model_alone(name: str) -> None:
    model, discovery = discovered("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = ("heads", "query_heads", "ffn")
    wanted = [group.name for group in discovery.groups if group.kind in kinds]
    scores = score(model, discovery, Criterion(name), input_ids=tokens(), seed=0, groups=wanted)
    assert list(scores) == wanted
    for key, values in scores.items():
        assert values.shape == (discovery.group(key).size,)
        assert (values >= 0).all()
        assert values.std() > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_whole_layers_are_scored_or_refused(name: str) -> None:
    model, discovery = discovered("llama")
    criterion = Criterion(name)
    if criterion.scores_layers:
        scores = score(model, discovery, criterion, input_ids=tokens(), seed=0, groups=["layers"])
        assert (scores["layers"] > 0).all()
        return
    with pytest.raises(
        UserError, match=rf"criterion '{name}' .* whole layers; use random, .*fisher"
    ):
        score(model, discovery, criterion, input_ids=tokens(), seed=0, groups=["layers"])
    groups = tuple(group for group in discovery.groups if group.kind in ("ffn", "layers"))
    scores = score(model, replace(discovery, groups=groups), criterion, input_ids=tokens(), seed=0)
    assert list(scores) == [group.name for group in groups if group.kind == "ffn"]


def test_token_squares_are_squared_derivatives_of_single_tokens() -> None:
    model, discovery = discovered("llama")
    model = copy.deepcopy(model).double()
    ids = tokens()
    groups = [discovery.group("layers.1.heads"), discovery.group("layers.0.ffn")]
    with undisturbed(model):
        seen = observe(model, ids, groups, ["gates", "tokens"])
    for group in groups:
        (consumer,) = consumers_of(model, group)
        expected = np.zeros(group.size)
        for sample in ids:
            noted: list[torch.Tensor] = []

            def note(_m: Any, args: Any, noted: list[torch.Tensor] = noted) -> None:
                noted.append(args[0])

            handle = model.get_submodule(consumer.module).register_forward_pre_hook(note)
            logits = model(sample[None], use_cache=False).logits[0]
            handle.remove()
            (slope,) = torch.autograd.grad(F.cross_entropy(logits[:-1], sample[1:]), noted[0])
            product = (noted[0] * slope)[0].detach().numpy()
            expected += np.square(product[:, consumer.index].sum(2)).sum(0)
        np.testing.assert_allclose(seen[group.name].token_squares, expected, rtol=1e-8)


def test_fisher_obs_takes_the_values_of_fisher_in_another_order() -> None:
    model, discovery = discovered("llama")
    ids = tokens()
    names = [g.name for g in discovery.groups if g.kind in ("heads", "ffn")]
    found = {
        name: score(model, discovery, Criterion(name), input_ids=ids, seed=0, groups=names)
        for name in ("fisher", "obs", "fisher-obs")
    }
    with undisturbed(model):
        seen = observe(model, ids, [discovery.group(n) for n in names], ["gates", "tokens"])
    for name in names:
        fisher, cost, both = (found[criterion][name] for criterion in found)
        np.testing.assert_array_equal(np.sort(both), np.sort(fisher))
        blend = np.sqrt(seen[name].token_squares * cost)
        np.testing.assert_array_equal(np.argsort(both), np.argsort(blend))


def test_fisher_obs_is_fisher_where_no_linear_module_reads() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    discovery = discover(model)
    names = [g.name for g in discovery.groups if g.kind in ("ffn", "layers") and g.frozen is None]
    both, fisher = (
        score(model, discovery, Criterion(name), input_ids=tokens(), seed=0, groups=names)
        for name in ("fisher-obs", "fisher")
    )
    for name in names:
        np.testing.assert_array_equal(both[name], fisher[name])


def test_the_bias_of_a_projection_is_part_of_its_gate() -> None:
    """A softmax ignores what a key's bias adds, and not what its weights do."""
    model = tiny_model("opt").double()
    discovery, ids = discover(model), tokens()
    group = next(g for g in discovery.groups if g.kind == "head_dim" and g.frozen is None)
    last = last_members(group)
    module = last[0].tensor.rpartition(".")[0]
    assert [one.tensor for one in last] == [f"{module}.weight", f"{module}.bias"]
    with undisturbed(model):
        seen = observe(model, ids, [group], ["gates"])[group.name].gates
    for number, sample in enumerate(ids):
        gate = torch.ones(model.get_submodule(module).out_features).double().requires_grad_()
        handle = model.get_submodule(module).register_forward_hook(
            lambda _m, _a, y, gate=gate: y * gate
        )
        logits = model(sample[None], use_cache=False).logits[0]
        handle.remove()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits[:-1], sample[1:]), gate)
        expected = gradient.numpy()[last[0].index].sum(1)
        assert np.abs(expected).max() > 1e-9
        np.testing.assert_allclose(seen[number, 0], expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("criterion", ["fisher", "gate", "wanda", "fisher-obs"])
def test_a_tied_output_layer_reads_the_hidden_channels_too(criterion: str) -> None:
    tied = make("llama_tied")
    untied = make("llama_tied", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict(), strict=False)
    untied.lm_head.weight = torch.nn.Parameter(tied.model.embed_tokens.weight.detach().clone())
    ids = torch.randint(3, 100, (6, 12), generator=torch.Generator().manual_seed(1))
    found = [
        score(one, discover(one), Criterion(criterion), input_ids=ids, seed=0, groups=["hidden"])
        for one in (tied, untied)
    ]
    np.testing.assert_allclose(found[0]["hidden"], found[1]["hidden"], rtol=1e-5)


@pytest.mark.parametrize("what", ["gates", "tokens", "moments", "gram"])
def test_what_is_asked_for_where_linear_modules_read_is_seen_there_alone(what: str) -> None:
    model, discovery = discovered("mixtral")
    groups = [discovery.group(name) for name in ("layers.0.heads", "layers.0.experts")]
    found: dict[str, Observation] = {}

    def note(seen: Observation) -> np.ndarray[Any, Any]:
        found[seen.group.name] = seen
        return np.zeros(seen.group.size)

    def parts(name: str) -> list[bool]:
        seen = found[name]
        grams = [one.gram is not None for one in seen.readings]
        has = (seen.gates is not None, seen.token_squares is not None, bool(grams), any(grams))
        return [*has]

    how = Measure({what}, note)  # type: ignore[arg-type]
    with undisturbed(model):
        measure(model, tokens(), groups[:1], how, None)
        wanted = found["layers.0.heads"]
        assert any(parts("layers.0.heads"))
        how = Measure(frozenset(), note, where_linear=frozenset({what}))
        measure(model, tokens(), groups, how, None)
    seen = found["layers.0.heads"]
    assert not any(parts("layers.0.experts"))
    for mine, other in ((seen.gates, wanted.gates), (seen.token_squares, wanted.token_squares)):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-12)
    for one, other in zip(seen.readings, wanted.readings, strict=True):
        np.testing.assert_allclose(one.square, other.square, rtol=1e-5)
        assert (one.gram is None) == (what != "gram")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"gives an array of shape \(\) for layers.0.ffn, which has 40 units"),
        (np.zeros((1, 40)), r"an array of shape \(1, 40\)"),
    ],
)
def test_a_criterion_gives_one_number_for_each_unit(
    value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(value: Any) -> dict[str, np.ndarray[Any, Any]]:
        monkeypatch.setitem(MEASURES, "gate", Measure(frozenset({"moments"}), lambda _: value))
        ids, wanted = tokens(), "layers.0.ffn"
        return score(*discovered("llama"), Criterion("gate"), input_ids=ids, seed=0, groups=wanted)

    with pytest.raises(UserError, match=message):
        scored(value)
    found = scored(torch.arange(40))["layers.0.ffn"]
    assert found.dtype == np.float64
    assert found[39] == 39
