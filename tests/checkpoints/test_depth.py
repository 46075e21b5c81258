"""Removed layers: which config values change with them, and what loads then."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MllamaForCausalLM, MllamaTextConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import architectures
import tiny_configs

from helpers import tiny_model
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.save import SavedCheckpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.types import Discovery

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def shortened(
    model_type: str,
    settings: dict[str, Any],
    gone: list[int],
    out: Path,
    patch: pytest.MonkeyPatch,
) -> tuple[Any, Discovery, SavedCheckpoint]:
    """Remove layers of a tiny model and save it; return it, its discovery and what was saved."""
    old = tiny_configs.OVERRIDES.get(model_type, {})
    patch.setitem(tiny_configs.OVERRIDES, model_type, {**old, **settings})
    model: Any = architectures.tiny_model(model_type)
    discovery = discover(model)
    smaller = copy.deepcopy(model)
    edits = cut_(smaller, discovery, {"layers": np.array(gone)})
    saved = save_checkpoint(smaller, out, edits=edits, plan_json="{}", dense_config=model.config)
    return smaller, discovery, saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "settings", "gone", "expected"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}, [0], {"first_k_dense_replace": 1}),
        ("deepseek_v3", {"first_k_dense_replace": 1}, [0, 3], {"first_k_dense_replace": 0}),
        ("deepseek_v3", {"first_k_dense_replace": 1}, [2], {"first_k_dense_replace": 1}),
        (
            "ernie4_5_moe",
            {"moe_layer_start_index": 2, "moe_layer_end_index": 2},
            [0],
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}, [0], {"mlp_only_layers": [1]}),
        # Which layers look at a window shows in no shape, and not in a short text either.
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4096},
            [1],
            {"layer_types": [FULL, SLIDING, SLIDING]},
        ),
        (
            "lfm2",
            {"full_attn_idxs": [1, 3]},
            [0],
            {"full_attn_idxs": [0, 2], "layer_types": [FULL, "conv", FULL]},
        ),
        (
            "llama4_text",
            {},
            [0],
            {
                "moe_layers": [0, 1, 2],
                "no_rope_layers": [1, 1, 0],
                "layer_types": [CHUNKED, CHUNKED, FULL],
            },
        ),
    ],
)
def test_settings_of_single_layers_follow(
    model_type: str,
    settings: dict[str, Any],
    gone: list[int],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smaller, discovery, saved = shortened(
        model_type, {"num_hidden_layers": 4, **settings}, gone, tmp_path / "out", monkeypatch
    )
    assert (saved.kind, saved.needs) == ("stock", ())
    loaded = type(smaller).from_pretrained(saved.path, dtype=torch.float32)
    assert loaded.config.num_hidden_layers == 4 - len(gone)
    assert {key: getattr(loaded.config, key) for key in expected} == expected
    ours, theirs = pruned_logits(smaller, discovery), pruned_logits(loaded, discovery)
    # Weights that were read from a file lie elsewhere in memory, which moves the last bit.
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_pattern_that_no_setting_can_follow_needs_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second layer is sparse: without the first two of five, the wrong ones would be."""
    settings = {"num_hidden_layers": 5, "decoder_sparse_step": 2}
    smaller, discovery, saved = shortened("qwen3_moe", settings, [0], tmp_path / "out", monkeypatch)
    assert (saved.kind, saved.needs) == ("remote_code", ("trust_remote_code=True",))
    loaded = type(smaller).from_pretrained(saved.path, dtype=torch.float32)
    ours, theirs = pruned_logits(smaller, discovery), pruned_logits(loaded, discovery)
    # Weights that were read from a file lie elsewhere in memory, which moves the last bit.
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_layers_that_the_model_holds_follow(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # Layers 1 and 4 run on images alone; the first counts the tokens of the cache.
    depth = {"num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
    config = MllamaTextConfig(**sizes, **heads, **depth, bos_token_id=1, eos_token_id=2)
    dense = MllamaForCausalLM(config).eval()
    discovery = discover(dense)
    (layers,) = (group for group in discovery.groups if group.kind == "layers")
    assert [name[-1] for name in layers.modules] == ["2", "3", "5"]
    smaller: Any = copy.deepcopy(dense)
    edits = cut_(smaller, discovery, {"layers": np.array([0, 2])})
    saved = save_checkpoint(
        smaller, tmp_path / "out", edits=edits, plan_json="{}", dense_config=config
    )
    assert saved.kind == "stock"
    loaded = MllamaForCausalLM.from_pretrained(saved.path, dtype=torch.float32)
    for model in (smaller, loaded):
        assert [*model.model.cross_attention_layers] == [1, 3]
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        ours, theirs = ([model.eval()(ids).logits] for model in (smaller, loaded))
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_layers_that_the_config_class_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_hidden_layers": 3, "layer_types": ["linear_attention", FULL, FULL]}
    with pytest.raises(
        UserError, match=r"the layers that are left .*at least one 'linear_attention' layer.*; keep"
    ):
        shortened("olmo_hybrid", settings, [0], tmp_path / "out", monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("gone", "ffn", "kind"),
    [([0], [], None), ([3], [], "stock"), ([0], [5], "remote_code")],
)
def test_layers_that_would_silently_load_as_another_model(
    gone: list[int], ffn: list[int], kind: str | None, tmp_path: Path
) -> None:
    """Their scale follows from their number; without the folder's code they fit, or do not."""
    dense: Any = tiny_model("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    discovery, smaller = discover(dense), copy.deepcopy(dense)
    last = [group.name for group in discovery.groups if group.kind == "ffn"][-1]
    edits = cut_(smaller, discovery, {"layers": np.array(gone), last: np.array(ffn, int)})
    if kind is None:
        with pytest.raises(UserError, match=r"GPT2LMHeadModel computes by the places .* keep oth"):
            save_checkpoint(smaller, tmp_path / "out", edits=edits, dense_config=dense.config)
        assert not list(tmp_path.iterdir())
    else:
        saved = save_checkpoint(smaller, tmp_path / "out", edits=edits, dense_config=dense.config)
        assert saved.kind == kind
