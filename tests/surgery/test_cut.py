"""What surgery leaves: tensors, ties, attributes, layer numbers; and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from families import discovered
from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import InfeasibleError, UserError
from llm_pruner.importance import Criterion, score
from llm_pruner.models.layers import layer_numbers
from llm_pruner.models.modeling_pruned import set_own_
from llm_pruner.surgery.cut import cut_, plan_edits
from llm_pruner.surgery.removal import count_parameters, kept_shapes
from llm_pruner.surgery.twin import pruned_logits
from llm_pruner.types import Edits
from removals import pick


def fresh(name: str) -> tuple[nn.Module, object]:
    model, discovery = discovered(name)
    return copy.deepcopy(model), discovery


def states_equal(left: nn.Module, right: nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_removing_nothing_changes_nothing(name: str) -> None:
    model, discovery = fresh(name)
    before = copy.deepcopy(model)
    for removal in ({}, {group.name: np.zeros(0, int) for group in discovery.groups}):
        edits = cut_(model, discovery, removal)
        assert edits == Edits({}, {}, {}, {})
    assert states_equal(model, before)
    for one, other in zip(
        pruned_logits(model, discovery), pruned_logits(before, discovery), strict=True
    ):
        assert torch.equal(one, other)


def test_kept_values_are_the_dense_ones() -> None:
    dense, discovery = discovered("llama_biases")
    model = copy.deepcopy(dense)
    cut_(model, discovery, {"hidden": np.array([0, 5]), "layers.0.ffn": np.array([39])})
    mlp, old = model.model.layers[0].mlp, dense.model.layers[0].mlp
    hidden = [i for i in range(48) if i not in (0, 5)]
    assert torch.equal(mlp.up_proj.weight, old.up_proj.weight[:39][:, hidden])
    assert torch.equal(mlp.up_proj.bias, old.up_proj.bias[:39])
    assert torch.equal(mlp.down_proj.weight, old.down_proj.weight[hidden][:, :39])
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight[hidden])
    assert mlp.down_proj.weight.is_contiguous()


def test_key_value_group_goes_with_its_query_heads() -> None:
    dense, discovery = discovered("llama")
    model = copy.deepcopy(dense)
    cut_(model, discovery, {"layers.1.heads": np.array([0])})
    attention, old = model.model.layers[1].self_attn, dense.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.weight, old.q_proj.weight[24:])
    assert torch.equal(attention.k_proj.weight, old.k_proj.weight[8:])
    assert torch.equal(attention.o_proj.weight, old.o_proj.weight[:, 24:])
    assert attention.num_key_value_groups == 3
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (48, 48)


def test_tied_weights_stay_one_object() -> None:
    model, discovery = fresh("llama_tied")
    cut_(model, discovery, {"hidden": np.arange(10)})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (100, 38)
    assert sum(1 for name, _ in model.named_parameters() if "lm_head" in name) == 0


def test_requires_grad_is_kept() -> None:
    model, discovery = fresh("llama")
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    cut_(model, discovery, pick(discovery, ("hidden", "ffn")))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert before == after
    assert len(set(after.values())) == 2
    assert all(p.is_leaf and p.grad is None for p in model.parameters())


def test_what_a_parameter_says_of_itself_is_kept() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight._no_weight_decay = True
    discovery = discover(model)
    cut_(model, discovery, pick(discovery, ("ffn",)))
    new = model.model.layers[0].mlp.up_proj.weight
    assert new is not weight
    assert new._no_weight_decay


def test_pruned_model_can_be_trained() -> None:
    model, discovery = fresh("llama")
    cut_(model, discovery, pick(discovery))
    tokens = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


def test_attributes_that_the_code_reads() -> None:
    model, discovery = fresh("llama")
    removal = {
        "head_dim": np.array([2]),
        **{f"layers.{layer}.value_dim": np.array([0, 7]) for layer in range(3)},
        "layers.0.query_heads": np.array([1, 5]),
    }
    edits = cut_(model, discovery, removal)
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    assert (first.head_dim, second.head_dim) == (6, 6)
    assert (first.num_key_value_groups, second.num_key_value_groups) == (2, 3)
    assert edits.attributes["model.layers.0.self_attn"] == {
        "head_dim": 6,
        "num_key_value_groups": 2,
    }
    assert "num_key_value_groups" not in edits.attributes["model.layers.1.self_attn"]
    # The scale of the dense model stays: what was not removed computes what it did.
    assert first.scaling == 8**-0.5
    kept = edits.buffers["model.rotary_emb.inv_freq"]
    assert kept == {0: (0, 1, 3)}
    assert model.model.rotary_emb.inv_freq.shape == (3,)
    assert edits.buffers["model.rotary_emb.original_inv_freq"] == kept


def test_sizes_that_modules_state() -> None:
    model, discovery = fresh("llama_biases")
    cut_(model, discovery, pick(discovery))
    linears = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            linears += 1
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)
        if isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim)
    assert linears > 7
    model, discovery = fresh("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    cut_(model, discovery, pick(discovery))
    head = model.lm_head
    assert head.weight.shape == (head.out_features, head.in_features)
    for module in model.modules():
        if type(module).__name__ == "Conv1D":
            assert module.weight.shape == (module.nx, module.nf)
        if isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.normalized_shape
            assert all(type(size) is int for size in module.normalized_shape)


def test_shapes_are_those_foretold() -> None:
    for name in ("llama", "gpt2", "deepseek_v3"):
        dense, discovery = discovered(name)
        removal = pick(discovery, ("hidden", "ffn", "heads", "query_heads"))
        model = copy.deepcopy(dense)
        edits = plan_edits(model, discovery, removal)
        assert states_equal(model, dense)
        assert cut_(model, discovery, removal) == edits
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert shapes == kept_shapes(discovery, removal)
        changed = {n: s for n, s in shapes.items() if s != discovery.shapes[n]}
        assert changed == edits.shapes
        assert sum(map(np.prod, shapes.values())) == count_parameters(discovery, removal)


def test_removed_layers_renumber_the_rest() -> None:
    dense, discovery = discovered("gemma3_text")
    model = copy.deepcopy(dense)
    edits = cut_(model, discovery, {"layers": np.array([0]), "layers.2.ffn": np.array([3])})
    assert edits.layers == {"model.layers": (1, 2)}
    layers = model.model.layers
    assert len(layers) == 2
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1]
    assert torch.equal(layers[0].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)
    # What is left of layer 2 goes by its new number.
    assert edits.shapes["model.layers.1.mlp.up_proj.weight"] == (39, 48)
    assert edits.attributes["model.layers.1.self_attn"]["layer_idx"] == 1
    assert model.config.num_hidden_layers == 2
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.eos_token_id == dense.config.eos_token_id
    assert dense.config.num_hidden_layers == 3


def test_settings_of_one_module_are_its_own() -> None:
    class Settings:
        def __init__(self) -> None:
            self.heads = 6

    model = nn.Sequential(nn.Identity(), nn.Identity())
    shared = Settings()
    for module in model:
        module.config = shared
        module.sizes = (1, 2, 3)
    set_own_(model[0], "config.heads", 4)
    set_own_(model[0], "sizes.1", 9)
    set_own_(model[0], "width", 7)
    assert (model[0].config.heads, model[1].config.heads, shared.heads) == (4, 6, 6)
    assert (model[0].sizes, model[1].sizes, model[0].width) == ((1, 9, 3), (1, 2, 3), 7)


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (
            {"head_dim": [0]},
            r"removing units of head_dim: view: model\.layers\.0\.self_attn\.head_dim is 6 but 8",
        ),
        ({"layers.0.query_heads": [0, 1, 3]}, "keep different numbers of query heads"),
        ({"hidden": [48]}, r"hidden: units out of range \(48\); it has 0 to 47"),
        ({"hidden": [-1]}, r"hidden: units out of range \(-1\)"),
        ({"hidden": [3, 3]}, "hidden: duplicate units 3"),
        ({"layers.0.heads": [0, 1]}, r"layers\.0\.heads: removes all 2 units; at least one"),
        ({"layers": [0, 1, 2]}, "layers: removes all 3 units"),
    ],
)
def test_refused_before_anything_is_touched(removal: dict[str, list[int]], message: str) -> None:
    model, discovery = fresh("llama")
    before = copy.deepcopy(model)
    with pytest.raises(InfeasibleError, match=message):
        cut_(model, discovery, {name: np.array(units) for name, units in removal.items()})
    assert states_equal(model, before)
    assert model.model.layers[0].self_attn.head_dim == 8
    assert len(model.model.layers) == 3


def test_frozen_groups_and_uneven_widths_are_refused() -> None:
    model, discovery = fresh("phi")
    with pytest.raises(InfeasibleError, match="head_dim: cannot lose units: it stays whole"):
        cut_(model, discovery, {"head_dim": np.array([0])})
    model, discovery = fresh("mixtral")
    with pytest.raises(InfeasibleError, match=r"leaves 39 units; .* a multiple of 8"):
        cut_(model, discovery, {"layers.0.ffn": np.array([0])})
    with pytest.raises(InfeasibleError, match="nowhere is no group of this model"):
        cut_(model, discovery, {"nowhere": np.array([0])})


def test_another_model_than_the_traced_one_is_refused() -> None:
    model, discovery = fresh("llama")
    removal = {"layers.0.ffn": np.array([0])}
    cut_(model, discovery, removal)
    with pytest.raises(InfeasibleError, match=r"gate_proj.weight has shape \(39, 48\), the traced"):
        cut_(model, discovery, removal)


@pytest.mark.parametrize("gone", [0, 1])
def test_layers_that_are_gone_are_neither_cut_nor_scored_by_an_old_discovery(gone: int) -> None:
    model, discovery = fresh("llama")
    removal = {"layers": np.array([gone])}
    cut_(model, discovery, removal)
    with pytest.raises(InfeasibleError, match=r"layers\.2\.\S+ is gone, .* run discover again"):
        cut_(model, discovery, removal)
    with pytest.raises(UserError, match=r"layers\.2\.\S+ is gone, .* run discover again"):
        score(model, discovery, Criterion("l1"), input_ids=None, seed=0)


def test_layers_of_one_weight_that_are_gone() -> None:
    model = tiny_model()
    model.model.layers[2] = model.model.layers[0]
    discovery = discover(model)
    del model.model.layers[1]
    with pytest.raises(InfeasibleError, match=r"layers\.2\.\S+ is gone"):
        cut_(model, discovery, {})


def test_pruned_model_can_be_traced_and_pruned_again() -> None:
    model, discovery = fresh("llama")
    cut_(model, discovery, pick(discovery))
    again = discover(model)
    assert {group.name for group in again.groups if group.frozen is None} >= {
        "hidden",
        "layers.0.ffn",
    }
    before = count_parameters(again)
    cut_(model, again, {"hidden": np.array([0]), "layers.0.ffn": np.array([1])})
    assert sum(p.numel() for p in model.parameters()) < before
    assert all(bool(logits.isfinite().all()) for logits in pruned_logits(model, again))


class TwoAttentions(nn.Module):
    """A layer whose two parts are numbered through all layers."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.number_of_states = 2 * layer + 2
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        for place, part in enumerate(self.parts):
            part.layer_idx = 2 * layer + place


def test_numbers_of_parts_follow_their_layer() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([TwoAttentions(i) for i in range(4)])
    found = sorted(layer_numbers(model, {"layers": (0, 2, 3)}))
    assert found == [
        ("layers.1.parts.0", "layer_idx", 2),
        ("layers.1.parts.1", "layer_idx", 3),
        ("layers.2.parts.0", "layer_idx", 4),
        ("layers.2.parts.1", "layer_idx", 5),
    ]
