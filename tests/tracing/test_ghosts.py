"""Discovery without weights finds what it finds with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import llm_pruner.tracing.ghosts
from command import done, run, save_tiny
from families import BASE, FAMILIES, discovered, llama_7b, make
from llm_pruner import Selection, Target, allocate, count_parameters, discover
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from llm_pruner.tracing.ghosts import ghosts_of, is_ghost
from llm_pruner.types import Discovery, Group


def without_weights(name: str, **options: Any) -> PreTrainedModel:
    """Return a family's model on the meta device."""
    family = FAMILIES[name]
    settings = {key: value for key, value in BASE.items() if key not in family.without}
    config = AutoConfig.for_model(family.model_type, **(settings | dict(family.config)))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()


def plain(group: Group) -> dict[str, Any]:
    """Return a group as values that compare; ``order`` counts operations, of which some differ."""
    members = [(m.tensor, m.dim, m.buffer, m.index.tolist()) for m in group.members]
    blocks = None if group.blocks is None else group.blocks.tolist()
    return {**vars(group), "members": members, "blocks": blocks}


def assert_same(one: Discovery, other: Discovery) -> None:
    assert [plain(group) for group in one.groups] == [plain(group) for group in other.groups]
    assert one.frozen == other.frozen
    assert (one.shapes, one.buffers) == (other.shapes, other.buffers)
    assert one.aliases == other.aliases


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("llama_mqa", "gemma3_text", "phi3", "gpt2", "mamba", "bloom", "mixtral", "deepseek_v3"),
    ],
)
def test_groups_are_those_of_a_real_trace(name: str) -> None:
    assert_same(discovered(name)[1], discover(without_weights(name)))


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_large_results_are_ghosts_too(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation of experts, with no room for the weights of all chosen experts."""
    monkeypatch.setattr(llm_pruner.tracing.ghosts, "LARGEST", 4096)
    real = make("qwen3_moe")
    real.set_experts_implementation(experts)
    meta = without_weights("qwen3_moe", experts_implementation=experts)
    assert_same(discover(real), discover(meta))


def test_the_model_stays_as_it_was() -> None:
    model = without_weights("llama_tied")
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    discover(model)
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == before
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_ghosts_take_no_memory_and_buffers_have_their_values() -> None:
    model, real = without_weights("llama_tied"), make("llama_tied")
    with ghosts_of(model):
        assert all(is_ghost(parameter) for parameter in model.parameters())
        assert all(p.untyped_storage().nbytes() == 4 for p in model.parameters())
        assert model.lm_head.weight is model.get_input_embeddings().weight
        frequencies = model.model.rotary_emb.inv_freq
        assert torch.equal(frequencies, real.model.rotary_emb.inv_freq)


class Rescaling(nn.Module):
    """A language model that is not of transformers and rescales a weight as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 20)
        self.register_buffer("offset", torch.zeros(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.down.weight.div_(2)
        x = self.embedding(tokens) + self.offset
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_writing_to_weights() -> None:
    with torch.device("meta"):
        model = Rescaling()
    assert_same(discover(Rescaling()), discover(model))


# ------------------------------------------------------------------------------ from a config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """A folder of the same name that holds the config of it alone."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    return folder


def test_a_config_loads_without_weights(whole: Path, bare: Path) -> None:
    loaded = load_model(str(bare), weights=False)
    assert loaded.name == "tiny"
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert_same(discover(load_model(str(whole)).model), discover(loaded.model))


@pytest.mark.slow
def test_weights_that_are_needed(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny has no weights \(model.safetensors or"):
        load_model(str(bare))
    for options in (["--criterion", "l2", "--dry-run"], ["--criterion", "random"]):
        result = run("prune", bare, "--out", tmp_path / "out", "--ratio", 0.2, *options)
        assert result.code == 2
        assert "tiny has no weights" in result.err
    (bare / "config.json").write_text("{")
    with pytest.raises(UserError, match="tiny cannot be loaded"):
        load_model(str(bare), weights=False)


@pytest.mark.slow
def test_a_plan_without_weights_replays_with_them(whole: Path, bare: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random = ("--criterion", "random", "--ratio", 0.2, "--steps", 2)
    done("prune", bare, "--out", plan, "--dry-run", *random)
    assert '"name": "layers.2.heads"' in plan.read_text()
    done("prune", whole, "--out", out, "--plan", plan)
    assert (out / "plan.json").read_bytes() == plan.read_bytes()


# ------------------------------------------------------------------------------ the paper's model


@pytest.mark.slow
def test_llama_7b_has_the_counts_of_the_paper() -> None:
    """Dense 6.74B; 25% of the units of layers 4 to 29 leave 5.42B, 60% of 3 to 30 leave 3.35B."""
    _, discovery = llama_7b()
    assert count_parameters(discovery) == 6_738_415_616
    generator = np.random.default_rng(0)
    scores = {group.name: generator.random(group.size) for group in discovery.groups}
    for first, last, ratio, left in ((4, 29, 0.25, 5.42e9), (3, 30, 0.6, 3.35e9)):
        selection = Selection(
            ("heads", "ffn"), layer_ranges={"heads": (first, last), "ffn": (first, last)}
        )
        removal = allocate(discovery, scores, selection, Target(unit_ratio=ratio))
        assert count_parameters(discovery, removal) == pytest.approx(left, abs=5e6)
        assert len(removal["layers.16.heads"]) == round(32 * ratio)
