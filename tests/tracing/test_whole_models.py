"""Models of ``transformers`` with a special need, and modules that score takes as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RwkvConfig,
    XLNetConfig,
)

from helpers import tiny_model
from llm_pruner import Criterion, score
from llm_pruner.checkpoints.save import save_checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.models.forward import logits_of
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference, prune_
from nets import HIDDEN, VOCABULARY, NanoGPT, Net
from removals import cut_as_twin_, pick


def free(discovery: Any) -> set[str]:
    return {group.kind for group in discovery.groups if group.frozen is None}


def test_state_that_the_config_sizes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    config = RwkvConfig(vocab_size=40, num_hidden_layers=2, context_length=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    dense_config = copy.deepcopy(model.config)
    discovery = discover(model)
    removal = pick(discovery, ("hidden",))
    expected = twin_logits(model, discovery, removal)
    edits = cut_(model, discovery, removal)
    assert largest_difference(expected, pruned_logits(model, discovery)) <= 1e-5
    save_checkpoint(model, tmp_path / "out", edits=edits, dense_config=dense_config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    out = loaded.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 6


def test_mask_embedding_that_generation_reads() -> None:
    config = XLNetConfig(vocab_size=40, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    discovery = discover(model)
    hidden = discovery.group("hidden")
    assert any(m.tensor.endswith("mask_emb") for m in hidden.members)
    prune_(copy.deepcopy(model), discovery, pick(discovery, ("hidden", "ffn")))
    # A bias for segments, which the run is given none of, follows the one for content.
    heads = discovery.group("layers.0.heads")
    assert any(m.tensor.endswith("r_s_bias") for m in heads.members)


def test_projector_of_images_keeps_the_hidden_size() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 8}
    heads = {"num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "num_key_value_heads": 4, **text, **heads},
        vision_config={"model_type": "clip_vision_model", "patch_size": 4, **vision, **heads},
        image_token_index=39,
    )
    discovery = discover(LlavaForConditionalGeneration(config).eval())
    assert "multi_modal_projector" in str(discovery.group("hidden").frozen)
    assert {"heads", "ffn"} <= free(discovery)


def test_loss_over_all_routers_keeps_them_equal() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    discovery = discover(model)
    experts = [group for group in discovery.groups if group.kind == "experts"]
    assert experts[0].frozen is None
    assert len(experts[0].companions) == 2
    removal = pick(discovery, ("experts",))
    cut_as_twin_(model, discovery, removal)
    tokens = torch.arange(20)[None]
    assert bool(model(tokens, labels=tokens).aux_loss.isfinite())
    assert model.num_experts == 4 - len(removal[experts[0].name])


def test_flex_attention_of_transformers() -> None:
    model = tiny_model("llama")
    usual = discover(model)
    model.set_attn_implementation("flex_attention")
    discovery = discover(model)
    assert model.config._attn_implementation == "flex_attention"
    assert {g.name: g.frozen for g in discovery.groups} == {g.name: g.frozen for g in usual.groups}


class Published(NanoGPT):
    """nanoGPT as it is used: a ``generate`` of its own, logits of the last position, a loss."""

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(0, idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx: torch.Tensor, count: int) -> torch.Tensor:
        raise NotImplementedError


class Named(nn.Module):
    """Calls linear modules by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(input=F.gelu(self.up(input=x)))


@pytest.mark.parametrize(
    ("make", "criteria"),
    [
        (Published, ["taylor", "fisher"]),
        (lambda: Net(Named()), ["taylor", "fisher-obs", "wanda"]),
    ],
)
def test_modules_that_are_scored_as_they_are(
    make: Callable[[], nn.Module], criteria: list[str]
) -> None:
    net = make().eval()
    discovery = discover(net)
    assert {"ffn", "hidden"} <= free(discovery)
    prune_(copy.deepcopy(net), discovery, pick(discovery))
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    for criterion in criteria:
        found = score(net, discovery, Criterion(criterion), ids, seed=0)
        assert all(np.isfinite(values).all() for values in found.values())


class Plain:
    def __init__(self, x: torch.Tensor) -> None:
        self.logits = x


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, None),
        lambda x: {"loss": x.sum(), "logits": x},
        lambda x: {"hidden_states": (x * 2,), "lm_scores": x},
        Plain,
        lambda x: (None, {"logits": x}),
    ],
)
def test_outputs_that_hold_logits(make: Callable[[torch.Tensor], object]) -> None:
    x = torch.randn(2, 3, VOCABULARY)
    assert logits_of(make(x)) is x
