"""The chain of blocks of a model: when it is proven, and when the proof is still good."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from helpers import tiny_model
from llm_pruner.discovery.groups import discover
from llm_pruner.models import blockwise
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.models.layers import without_layers
from llm_pruner.surgery.cut import cut_copy

IDS = torch.arange(16)[None]


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were run for a proof."""
    found: list[nn.Module] = []
    probe = blockwise._probe

    def noted(chain: blockwise.Chain, ids: torch.Tensor, carries: bool) -> None:
        found.append(chain.model)
        probe(chain, ids, carries)

    monkeypatch.setattr(blockwise, "_probe", noted)
    return found


@pytest.fixture
def model() -> Any:
    return tiny_model(num_hidden_layers=2).requires_grad_(False)


def test_a_proof_is_good_for_what_it_looked_at(model: Any, proofs: list[nn.Module]) -> None:
    embedding, inner = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
    some = {name: model.get_parameter(name) for name in (embedding, inner)}
    first = find_chain(model, IDS, some)
    assert first.bottom
    assert first.outside.keys() == {embedding}
    assert [[*one] for one in first.owned] == [[], [inner]]
    for scored in ({}, {inner: some[inner]}, some):
        again = find_chain(model, IDS, scored, carries=True)
        assert again.bottom == (embedding in scored)
        assert [[*one] for one in again.owned] == [[], [inner] if scored else []]
        assert again.vocabulary == first.vocabulary == model.config.vocab_size
        torch.testing.assert_close(again.as_output(0, IDS), first.as_output(0, IDS))
    assert len(proofs) == 1
    find_chain(model, IDS, {"lm_head.weight": model.lm_head.weight})
    assert len(proofs) == 2


def test_a_model_that_was_changed_is_proven_anew(model: Any, proofs: list[nn.Module]) -> None:
    changes = [
        lambda: setattr(model.model.layers[0], "mlp", copy.deepcopy(model.model.layers[0].mlp)),
        lambda: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight[:50].detach())),
        lambda: model.model.layers.append(copy.deepcopy(model.model.layers[0])),
    ]
    for number, change in enumerate(changes, start=1):
        find_chain(model, IDS, {})
        assert len(proofs) == number
        change()
    model.config.num_hidden_layers = 3
    model.model.layers[2].self_attn.layer_idx = 2
    assert len(find_chain(model, IDS, {}).blocks) == 3
    assert len(proofs) == 4


def test_a_cut_model_is_the_chain_that_its_model_is(model: Any, proofs: list[nn.Module]) -> None:
    chain = find_chain(model, IDS, {})
    discovery = discover(model)
    ffn = next(group.name for group in discovery.groups if group.kind == "ffn")
    pruned: Any = cut_copy(model, discovery, {ffn: torch.arange(3).numpy()})
    after = chain.after_surgery(pruned)
    assert proofs == [model]
    assert after is not None
    proven = find_chain(pruned, IDS, {})
    assert proofs == [model, pruned]
    assert after.blocks == proven.blocks
    with torch.no_grad(), after.opened():
        entry = after.entry(IDS)
        ran = after.run_block(0, IDS, entry)[1]
    with torch.no_grad(), proven.opened():
        torch.testing.assert_close(ran, proven.run_block(0, IDS, entry)[1])
    assert chain.after_surgery(without_layers(model, "model.layers", [1])) is None


def test_a_block_that_refuses_what_it_is_given_alone_is_no_chain(model: Any) -> None:
    """As where later blocks need the indices that earlier ones have chosen."""
    inner = model.model.layers[1].forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not seen:
            raise ValueError("shared layers require indices")
        return inner(hidden, *args, **kwargs)

    seen, first = list[int](), model.model.layers[0].forward

    def leaves(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return first(*args, **kwargs)

    model.model.layers[0].forward, model.model.layers[1].forward = leaves, forward
    model.register_forward_pre_hook(lambda *_: seen.clear())
    with pytest.raises(NotBlockwise, match="return more than a hidden state"):
        find_chain(model, IDS, {})


def test_a_model_that_gives_all_logits_for_targets_alone_is_proven_at_once() -> None:
    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(40, 8), nn.Linear(8, 40)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
            x = self.embed(idx)
            for layer in self.layers:
                x = layer(x)
            return (self.out(x if targets is not None else x[:, [-1]]), None)

    assert len(find_chain(Published().requires_grad_(False), IDS, {}).blocks) == 2
