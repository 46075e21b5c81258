"""A share of the key-value cache as the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Lfm2Config, Lfm2ForCausalLM

from command import run, save_tiny
from fake_discovery import fake_llama
from families import fresh
from llm_pruner import Criterion, Selection, Target, allocate, discover, prune_, score
from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import count_work
from llm_pruner.planning import Cost, Numbering
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.types import Removal


def cache_of(model: Any) -> int:
    return count_work(model, prompt_tokens=4).cache_bytes_per_token


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cache") / "dense", num_hidden_layers=4)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("structures", [("heads",), ("layers",), ("heads", "layers")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_the_cache_is_as_much_smaller(family: str, structures: tuple[str, ...], scope: Any) -> None:
    model, discovery = fresh(family)
    if any(g.kind in structures and g.frozen for g in discovery.groups):
        pytest.skip("frozen in this family")
    selection = Selection(structures, scope=scope)
    cost = cache_cost(model, discovery, selection, Numbering.dense(discovery))
    assert cost.dense == cache_of(model)
    with pytest.raises(UserError, match="give its cost"):
        allocate(discovery, {}, selection, Target(kv_cache=0.5))
    scores = score(model, discovery, Criterion("random"), seed=0)
    layers = next(group.size for group in discovery.groups if group.kind == "layers")
    share = 1 / layers if structures == ("layers",) else 0.5
    removal = allocate(discovery, scores, selection, Target(kv_cache=share), cost=cost)
    prune_(model, discovery, removal, verify=False)
    assert cache_of(model) == pytest.approx((1 - share) * cost.dense, abs=0.005 * cost.dense)


def test_structures_that_leave_the_cache_alone_are_refused() -> None:
    for family, structures in (("llama", ("heads", "ffn")), ("deepseek_v3", ("heads",))):
        model, discovery = fresh(family)
        with pytest.raises(UserError, match=f"{structures[-1]}: the cache of this model is as"):
            cache_cost(model, discovery, Selection(structures), Numbering.dense(discovery))


@pytest.mark.slow
def test_what_cannot_be_is_one_line(dense: Path, tmp_path: Path) -> None:
    tries = {
        ("--kv-cache", 0.5, "--structures", "ffn"): "is as large without them",
        ("--kv-cache", 1.5): "kv_cache=1.5 is no share to remove",
        ("--kv-cache", 0.97): "cannot be reached",
        ("--kv-cache", 0.03): "bytes of cache per token",
    }
    for given, said in tries.items():
        result = run(
            *("prune", dense, "--out", tmp_path / "out", "--criterion", "l2", *given),
            *("--protect-first", 0, "--protect-last", 0),
        )
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert said in result.err
        assert not (tmp_path / "out").exists()


def test_prices_are_measured_anew_after_a_step() -> None:
    model, discovery = fresh("llama")
    numbering = Numbering.dense(discovery)
    first = cache_cost(model, discovery, Selection(("heads",)), numbering)
    removal = {"layers.0.heads": np.array([0])}
    prune_(model, discovery, removal, verify=False)
    second = cache_cost(
        model, discover(model), Selection(("heads",)), numbering.after(removal), first.dense
    )
    assert second.dense == first.dense
    assert second.total == first.left(removal)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_layers_that_keep_no_cache_have_no_price(scope: Any) -> None:
    config = Lfm2Config(
        **{"hidden_size": 32, "intermediate_size": 64, "block_multiple_of": 8, "vocab_size": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4},
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    model: Any = Lfm2ForCausalLM(config).eval()
    discovery = discover(model)
    selection = Selection(("layers",), scope=scope)
    cost = cache_cost(model, discovery, selection, Numbering.dense(discovery))
    alone = [cost.left({"layers": np.array([layer])}) for layer in range(4)]
    assert alone == [cost.total, cost.total // 2] * 2
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    scores["layers"] = np.array([1.0, 2.0, 3.0, 4.0])
    removal = allocate(discovery, scores, selection, Target(kv_cache=0.5), cost=cost)
    assert removal["layers"].tolist() == [1]  # the first, which keeps none, stays
    prune_(model, discovery, removal, verify=False)
    assert cache_of(model) == cost.total // 2


@pytest.mark.parametrize("scope", ["local", "global"])
def test_heads_that_keep_no_cache_stay(scope: Any) -> None:
    dense = fake_llama(4)
    names = [f"layers.{layer}.heads" for layer in range(4)]
    scores = {group.name: np.zeros(group.size) for group in dense.groups}

    def left(removal: Removal) -> int:
        return 80 - 10 * sum(len(removal.get(name, ())) for name in names[2:])

    cost, selection = Cost(80, left, 80), Selection(("heads",), scope=scope)
    removal = allocate(dense, scores, selection, Target(kv_cache=0.5), cost=cost)
    assert {*removal} <= {*names[2:]}
    assert left(removal) == 40
