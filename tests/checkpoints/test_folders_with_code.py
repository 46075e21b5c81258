"""Folders with modelling code: what loads them without the package, and what the package makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from helpers import modules_of_checkpoints_in, tiny_model, tiny_tokenizer
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.meta import sizes
from llm_pruner.checkpoints.save import SavedCheckpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from llm_pruner.surgery.cut import cut_
from llm_pruner.types import Edits
from new_processes import run_new

TOKENS = torch.arange(3, 35).view(2, 16)
CODE = "modeling_pruned.py"

UNEQUAL: dict[str, tuple[str, dict[str, Any], dict[str, list[int]]]] = {
    "heads, channels and layers": (
        "llama",
        {"num_hidden_layers": 4, "tie_word_embeddings": True},
        {"layers": [1], "layers.0.ffn": [0, 1, 2], "layers.2.heads": [1]},
    ),
    "rotary pairs": (
        "qwen3",
        {},
        {"head_dim": [2], **{f"layers.{layer}.value_dim": [1, 5] for layer in range(3)}},
    ),
    "experts": (
        "mixtral",
        {},
        {"layers.0.experts": [1], "layers.1.ffn": [*range(16)], "layers.2.heads": [0, 2]},
    ),
    "fused projections": ("phi3", {"head_dim": 8}, {"layers.1.heads": [0], "layers.2.ffn": [3]}),
}
"""Model type, settings, and units that are removed, with which layers come to differ."""


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_of_checkpoints_in(tmp_path_factory.mktemp("modules")):
        yield


def prune(
    model: PreTrainedModel, removal: Mapping[str, list[int]], out: Path, **options: Any
) -> SavedCheckpoint:
    dense = copy.deepcopy(model.config)
    units = {name: np.array(gone) for name, gone in removal.items()}
    edits = cut_(model, discover(model), units)
    options = {"dense_config": dense, **options}
    return save_checkpoint(model, out, edits=edits, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each entry of ``UNEQUAL``, and beside it the logits that it has to give."""
    made = {}
    for name, (model_type, settings, removal) in UNEQUAL.items():
        model = tiny_model(model_type, **settings)
        out = tmp_path_factory.mktemp("made") / "out"
        saved = prune(model, removal, out)
        assert (saved.kind, saved.needs) == ("remote_code", ("trust_remote_code=True",))
        torch.save(logits(model), out.parent / "logits.pt")
        made[name] = out
    return made


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def wanted(folder: Path) -> torch.Tensor:
    return torch.load(folder.parent / "logits.pt", weights_only=True)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


ALONE = """
import sys
sys.modules["llm_pruner"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = sys.argv[1]
tokens = torch.arange(3, 35).view(2, 16)
def run(folder, loader=AutoModelForCausalLM):
    model = loader.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model, model(tokens)[0]
for folder in sys.argv[2:]:
    model, logits = run(folder)
    wanted = torch.load(folder + "/../logits.pt", weights_only=True)
    assert torch.equal(logits, wanted), folder
    faster = "grouped_mm" if "Mixtral" in type(model).__name__ else "eager"
    assert (model.config._experts_implementation or "eager") == faster, folder
    kinds = {} if "moe" in folder else {"cache_implementation": "static"}
    texts = [model.generate(tokens, max_new_tokens=4, do_sample=False, **k) for k in ({}, kinds)]
    assert torch.equal(*texts), folder
    model.save_pretrained(folder + "/../again")
    assert torch.equal(run(folder + "/../again")[1], wanted), folder
    base, states = run(folder, AutoModel)
    assert torch.equal(states, model.base_model(tokens)[0]), folder
    base.save_pretrained(folder + "/../base")
    assert torch.equal(run(folder + "/../base", AutoModel)[1], states), folder
"""


@pytest.mark.slow
def test_without_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    run_new(ALONE, tmp_path / "modules", *folders.values(), said=tmp_path / "said.txt")
    # What it wrote is read by the package too.
    for folder in folders.values():
        assert (folder.parent / "again" / CODE).read_text() == (folder / CODE).read_text()
        assert config_of(folder.parent / "again") == config_of(folder)
        again = AutoModelForCausalLM.from_pretrained(folder.parent / "again")
        assert torch.equal(logits(again), wanted(folder))


@pytest.mark.parametrize("name", UNEQUAL)
def test_with_the_package(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(logits(model), wanted(folder))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE).read_text() == (folder / CODE).read_text()
    assert config_of(tmp_path / "again") == config_of(folder)
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], model.base_model(TOKENS)[0])


def test_attention_is_switched_in_layers_with_a_config_of_their_own(tmp_path: Path) -> None:
    # Phi-3 reads the number of heads from its config as it runs.
    model = tiny_model("phi3", **UNEQUAL["fused projections"][1])
    prune(model, {"layers.1.heads": [0]}, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    expected = logits(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(TOKENS, output_attentions=True)
    assert all(one is not None for one in found.attentions)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), expected)


def test_built_and_copied_without_weights_of_a_folder(folders: dict[str, Path]) -> None:
    """As servers build a model, and programs hand it to their other processes."""
    folder = folders["heads, channels and layers"]
    wanted = AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    for trust in (False, True):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        assert sizes(built) == sizes(wanted)
        assert built.lm_head.weight is built.model.embed_tokens.weight
        built.load_state_dict(wanted.state_dict())
        assert torch.equal(logits(built), logits(wanted))


def test_no_code_of_a_folder_runs_with_the_package(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folders["experts"])
    model.save_pretrained(out)
    (out / CODE).write_text("raise SystemExit('it ran')")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    # Not even where commands are allowed to run code, since there is no need.
    loaded = load_model(str(out), trust_remote_code=True, tokenizer_required=False).model
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(SystemExit, match="it ran"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_the_config_says_the_heads_of_each_layer(folders: dict[str, Path]) -> None:
    stated = config_of(folders["heads, channels and layers"])
    assert stated["per_layer_config"] == {"1": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    assert "quantization_config" not in stated
    config = AutoConfig.from_pretrained(folders["experts"])
    found = [one.num_key_value_heads for one in config.per_layer_config]
    assert found == [3, 3, 1]
    assert config.num_key_value_heads == 3  # of the model as it was, without a warning


def test_vllm_is_told_the_width_of_the_experts_of_each_layer(folders: dict[str, Path]) -> None:
    """It takes memory for experts by the config, which holds one width for all elsewhere."""
    AttentionInterface.register("vllm", AttentionInterface._global_mapping["sdpa"])
    try:
        found = []
        for where in ("sdpa", "vllm", "meta"):
            config = AutoConfig.from_pretrained(folders["experts"])
            with torch.device("meta" if where == "meta" else "cpu"):
                AutoModel.from_config(config, attn_implementation=where.replace("meta", "vllm"))
            found.append(config.intermediate_size)
    finally:
        del AttentionInterface._global_mapping["vllm"]
    assert found == [80, [80, 64, 80], 80]  # of what has no buffers yet, another is built


def test_layers_that_become_equal_are_plain_again(tmp_path: Path) -> None:
    gone = {f"layers.{layer}.ffn": [5, 7, 9] for layer in range(3)}
    first = {name: units for name, units in gone.items() if name != "layers.1.ffn"}
    prune(tiny_model("llama"), first, tmp_path / "once")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    saved = prune(model, {"layers.1.ffn": [0, 1, 2]}, tmp_path / "twice")
    assert saved.kind == "stock"
    assert type(model).__name__ == "PrunedLlamaForCausalLM"  # it comes back as it was
    config = config_of(tmp_path / "twice")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"pruned", "auto_map", "per_layer_config"} & config.keys()
    assert not (tmp_path / "twice" / CODE).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("trusted", [False, True])
def test_an_earlier_folder_is_pruned_again(trusted: bool, tmp_path: Path) -> None:
    prune(tiny_model("llama"), {"layers.0.ffn": [0, 1]}, tmp_path / "once")
    # A class of the folder's code is one of ours as well.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=trusted)
    saved = prune(model, {"layers.1.heads": [1], "layers.0.ffn": [4]}, tmp_path / "twice")
    assert saved.kind == "remote_code"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].mlp.down_proj.in_features == 77


def test_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["heads, channels and layers"]
    settings = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / CODE).exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(adapted))
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.equal(logits(again), logits(merged))


def test_quantized_while_it_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder = folders["heads, channels and layers"]
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, trust_remote_code=trust
        )
        assert model.is_quantized
        difference = (logits(model) - wanted(folder)).abs().max()
        assert 0 < difference < 0.1
        model.save_pretrained(tmp_path / "int8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", trust_remote_code=trust)
        assert torch.equal(logits(again), logits(model))
    with pytest.raises(UserError, match="quantized with torchao"):
        save_checkpoint(model, tmp_path / "out", edits=Edits(), tokenizer=tiny_tokenizer())
