"""Saving and loading pruned models: plain configs, recipes, and what both must keep."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helpers import modules_of_checkpoints_in, tiny_model, tiny_tokenizer
from llm_pruner.checkpoints import save_checkpoint, stock_config
from llm_pruner.checkpoints.meta import sizes
from llm_pruner.checkpoints.recipe import Recipe, compose, from_json, to_json
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.surgery.cut import cut_
from llm_pruner.types import Edits
from new_processes import run_new

TOKENS = torch.arange(3, 35).view(2, 16)
PLAN = '{"format_version": 1}\n'
HEAD_DIM = 8


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_of_checkpoints_in(tmp_path_factory.mktemp("modules")):
        yield


class Knife:
    """Prunes by hand, and records what it did as surgery would."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.dense_config = copy.deepcopy(model.config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, dict[int, tuple[int, ...]]] = {}
        self.attributes: dict[str, dict[str, int]] = {}
        self.layers: dict[str, tuple[int, ...]] = {}

    @property
    def edits(self) -> Edits:
        return Edits(self.shapes, self.buffers, self.attributes, self.layers)

    def tensor(self, name: str, dim: int, kept: Sequence[int]) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        old = getattr(module, attribute)
        new = old.detach().index_select(dim, torch.tensor(kept))
        setattr(module, attribute, nn.Parameter(new))
        self.shapes[name] = tuple(new.shape)

    def buffer(self, name: str, kept: Sequence[int]) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        setattr(module, attribute, getattr(module, attribute)[torch.tensor(kept)])
        self.buffers[name] = {0: tuple(kept)}

    def attribute(self, name: str, path: str, value: Any) -> None:
        module = self.model.get_submodule(name)
        owner, _, attribute = path.rpartition(".")
        if owner:
            setattr(module, owner, copy.copy(getattr(module, owner)))
            module = getattr(module, owner)
        setattr(module, attribute, value)
        self.attributes.setdefault(name, {})[path] = value

    def linear(self, name: str, *, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> None:
        if rows:
            self.tensor(f"{name}.weight", 0, rows)
            if self.model.get_submodule(name).bias is not None:
                self.tensor(f"{name}.bias", 0, rows)
            self.attribute(name, "out_features", len(rows))
        if columns:
            self.tensor(f"{name}.weight", 1, columns)
            self.attribute(name, "in_features", len(columns))

    def ffn(self, layer: int, kept: Sequence[int]) -> None:
        for name in ("gate_proj", "up_proj"):
            self.linear(f"model.layers.{layer}.mlp.{name}", rows=kept)
        self.linear(f"model.layers.{layer}.mlp.down_proj", columns=kept)

    def kv_heads(self, layer: int, kept: Sequence[int], shared: int = 2) -> None:
        attention = f"model.layers.{layer}.self_attn"
        narrow = [head * HEAD_DIM + i for head in kept for i in range(HEAD_DIM)]
        width = HEAD_DIM * shared
        wide = [head * width + i for head in kept for i in range(width)]
        self.linear(f"{attention}.q_proj", rows=wide)
        self.linear(f"{attention}.k_proj", rows=narrow)
        self.linear(f"{attention}.v_proj", rows=narrow)
        self.linear(f"{attention}.o_proj", columns=wide)

    def hidden(self, kept: Sequence[int]) -> None:
        tied = self.model.config.tie_word_embeddings
        self.tensor("model.embed_tokens.weight", 1, kept)
        self.attribute("model.embed_tokens", "embedding_dim", len(kept))
        if tied:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
            self.attribute("lm_head", "in_features", len(kept))
        else:
            self.linear("lm_head", columns=kept)
        self.tensor("model.norm.weight", 0, kept)
        for name, _ in list(self.model.model.layers.named_modules(prefix="model.layers")):
            leaf = name.rpartition(".")[2]
            if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                self.linear(name, columns=kept)
            elif leaf in ("o_proj", "down_proj"):
                self.linear(name, rows=kept)
            elif leaf.endswith("layernorm"):
                self.tensor(f"{name}.weight", 0, kept)

    def drop_layers(self, kept: Sequence[int]) -> None:
        layers = self.model.model.layers
        self.model.model.layers = nn.ModuleList(layers[index] for index in kept)
        self.layers["model.layers"] = tuple(kept)
        for new in range(len(kept)):
            self.attribute(f"model.layers.{new}.self_attn", "layer_idx", new)
        # All submodels share this object.
        self.model.config.num_hidden_layers = len(kept)
        if getattr(self.model.config, "layer_types", None):
            types = self.model.config.layer_types
            self.model.config.layer_types = [types[index] for index in kept]

    def save(self, out: Path, **options: Any) -> str:
        saved = save_checkpoint(
            self.model,
            out,
            edits=self.edits,
            plan_json=PLAN,
            dense_config=self.dense_config,
            **options,
        )
        assert saved.path == out
        assert saved.bytes == sum(file.stat().st_size for file in out.iterdir())
        return saved.kind


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(path: Path, **options: Any) -> PreTrainedModel:
    """Load a folder as its reader does who has the package; its own code has to give the same."""
    model, *others = (
        AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **{"dtype": torch.float32, **options, **trust}
        )
        for trust in ({}, {"trust_remote_code": True})
        if not trust or (path / "modeling_pruned.py").is_file()
    )
    for other, info in (model, *others):
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(logits(other), logits(model[0]))
        assert sizes(other) == sizes(model[0])
        assert type(other).__module__.startswith("transformers_modules.") is (other is not model[0])
    return model[0]


def equal_layers(model: PreTrainedModel) -> Knife:
    knife = Knife(model)
    for layer, heads in enumerate([(0, 2), (1, 2), (0, 1)]):
        knife.ffn(layer, range(layer, 79, 2)[:37])
        knife.kv_heads(layer, heads)
    return knife


def differing_layers(model: PreTrainedModel) -> Knife:
    knife = Knife(model)
    knife.ffn(0, range(0, 80, 3))
    knife.ffn(2, range(5, 70))
    knife.kv_heads(1, (0, 2))
    return knife


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_equal_layers_need_only_config_values(model_type: str, tmp_path: Path) -> None:
    knife = equal_layers(tiny_model(model_type))
    assert knife.save(tmp_path / "out") == "stock"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == 37
    assert config["num_attention_heads"] == 4
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == HEAD_DIM
    assert torch.equal(logits(load(tmp_path / "out")), logits(knife.model))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_channels_in_config_values(tied: bool, tmp_path: Path) -> None:
    knife = Knife(tiny_model("llama", tie_word_embeddings=tied))
    knife.hidden([index for index in range(48) if index % 4])
    knife.ffn(0, range(40))
    knife.ffn(1, range(40))
    knife.ffn(2, range(40))
    assert knife.save(tmp_path / "out") == "stock"
    loaded = load(tmp_path / "out")
    assert loaded.config.hidden_size == 36
    assert loaded.config.head_dim == HEAD_DIM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits(loaded), logits(knife.model))


def test_key_that_the_config_leaves_open_is_set(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    assert model.config.n_inner is None
    knife = Knife(model)
    kept = list(range(0, 192, 2))
    for layer in range(3):
        mlp = f"transformer.h.{layer}.mlp"
        knife.tensor(f"{mlp}.c_fc.weight", 1, kept)
        knife.tensor(f"{mlp}.c_fc.bias", 0, kept)
        knife.attribute(f"{mlp}.c_fc", "nf", len(kept))
        knife.tensor(f"{mlp}.c_proj.weight", 0, kept)
        knife.attribute(f"{mlp}.c_proj", "nx", len(kept))
    assert knife.save(tmp_path / "out") == "stock"
    loaded = load(tmp_path / "out")
    assert loaded.config.n_inner == 96
    assert torch.equal(logits(loaded), logits(model))


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM}


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {"intermediate_size": 56, **HEADS}),
        ("qwen3", {"hidden_size": 40, "intermediate_size": 56, **HEADS}),
        ("gemma3_text", {"intermediate_size": 56, **HEADS}),
        ("phi3", {"intermediate_size": 56, **HEADS}),
        ("gpt2", {"n_inner": 100}),
        ("gpt2", {"n_embd": 40, "n_head": 5, "n_inner": 192}),
        ("gpt_neox", {"intermediate_size": 56}),
        ("bloom", {"hidden_size": 40, "n_head": 5}),
        ("falcon", {"ffn_hidden_size": 100}),
        ("opt", {"ffn_dim": 44}),
        ("mixtral", {"num_local_experts": 3, "intermediate_size": 56, **HEADS}),
    ],
)
def test_config_values_are_found_in_every_family(model_type: str, values: dict[str, int]) -> None:
    dense = tiny_model(model_type).config
    config = stock_config(dense, tiny_model(model_type, **values), Edits({}, {}, {}, {}))
    assert config is not None
    found = config.to_dict()
    assert {key: found[key] for key in values} == values
    assert {key for key, value in dense.to_dict().items() if found[key] != value} <= set(values)


def test_layers_in_config_values_with_their_lists(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    knife = Knife(model)
    knife.drop_layers([1, 2])
    assert knife.save(tmp_path / "out") == "stock"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["layer_types"] == types[1:]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_factor_that_config_values_would_change_needs_a_recipe(tmp_path: Path) -> None:
    # Channels go, the factor 1 / sqrt(8) stays; a plain config would give 1 / sqrt(6).
    knife = Knife(tiny_model("llama"))
    kept = [head * 8 + i for head in range(6) for i in (0, 1, 2, 4, 5, 6)]
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        for name, heads in (("q_proj", 6), ("k_proj", 3), ("v_proj", 3)):
            knife.linear(f"{attention}.{name}", rows=kept[: heads * 6])
        knife.linear(f"{attention}.o_proj", columns=kept)
        knife.attribute(attention, "head_dim", 6)
    for name in ("inv_freq", "original_inv_freq"):
        knife.buffer(f"model.rotary_emb.{name}", (0, 1, 2))
    assert knife.save(tmp_path / "out") == "remote_code"
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, knife.model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(loaded), logits(knife.model))
    # The same without the buffers in the edits: the factor alone must rule a plain config out.
    edits = Edits(knife.shapes, {}, knife.attributes, {})
    assert stock_config(knife.dense_config, knife.model, edits) is None


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}])
def test_differing_layers(options: dict[str, Any], tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("qwen2"))
    assert knife.save(tmp_path / "out", max_shard_size="50KB") == "remote_code"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    loaded = load(tmp_path / "out", **options)
    assert torch.equal(logits(loaded), logits(knife.model))
    assert loaded.model.layers[0].mlp.down_proj.in_features == 27


@pytest.mark.parametrize("cut", [equal_layers, differing_layers])
def test_bfloat16(cut: Callable[[PreTrainedModel], Knife], tmp_path: Path) -> None:
    # Loading keeps the rotary table in float32, which a cast of the whole model would not.
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    knife = cut(load(tmp_path / "dense", dtype=torch.bfloat16))
    knife.save(tmp_path / "out")
    for dtype in (torch.bfloat16, "auto"):
        loaded = load(tmp_path / "out", dtype=dtype)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(knife.model))


def test_tied_weights_stay_tied_in_a_recipe(tmp_path: Path) -> None:
    knife = Knife(tiny_model("llama", tie_word_embeddings=True))
    knife.hidden(range(32))
    knife.ffn(0, range(20))
    assert knife.save(tmp_path / "out") == "remote_code"
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(knife.model))


def test_layers_that_differ_and_go(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    knife = Knife(model)
    knife.drop_layers([1, 2])
    knife.ffn(0, range(30))
    assert knife.save(tmp_path / "out") == "remote_code"
    loaded = load(tmp_path / "out")
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 2
    assert loaded.config.layer_types == types[1:]
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        kept = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = loaded.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(kept, again)
    # config.json tells the truth, so what only reads the config counts the right layers.
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 2


def test_dotted_attribute_belongs_to_one_module(tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("llama"))
    knife.attribute("model.layers.1.self_attn", "config.num_key_value_heads", 2)
    knife.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.model.layers[1].self_attn.config.num_key_value_heads == 2
    assert loaded.model.layers[0].self_attn.config.num_key_value_heads == 3
    assert loaded.config.num_key_value_heads == 3


def test_number_that_code_reads_rules_a_plain_config_out(tmp_path: Path) -> None:
    knife = equal_layers(tiny_model("llama"))
    # Nobody reads the size that the MLP remembers, so a plain config may change it.
    assert knife.model.model.layers[0].mlp.intermediate_size == 80
    assert stock_config(knife.dense_config, knife.model, knife.edits) is not None
    for layer in knife.model.model.layers:
        layer.self_attn.scaling *= 2
    assert stock_config(knife.dense_config, knife.model, knife.edits) is None
    # The recipe takes along what the edits do not tell.
    assert knife.save(tmp_path / "out") == "remote_code"
    assert torch.equal(logits(load(tmp_path / "out")), logits(knife.model))


def test_config_value_of_the_outermost_module(tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("llama"))
    knife.attribute("", "config.num_attention_heads", 4)
    knife.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for name in ("once", "twice"):  # what is saved again builds the same dense model again
        assert loaded.config.num_attention_heads == 4
        assert loaded.model.config.num_attention_heads == 6
        assert torch.equal(logits(loaded), logits(knife.model))
        loaded.save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name)


def test_saved_again_by_transformers(tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("llama"))
    knife.drop_layers([0, 2])
    knife.shapes = _renamed(knife.shapes)
    knife.attributes = _renamed(knife.attributes)
    knife.attribute("model.layers.1.self_attn", "layer_idx", 1)
    knife.save(tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / name / "config.json").read_text() for name in ("out", "again"))
    assert first == second
    assert torch.equal(logits(load(tmp_path / "again")), logits(knife.model))


def test_embeddings_that_were_resized_load_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dense, discovery = copy.deepcopy(model.config), discover(model)
    edits = cut_(model, discovery, {"hidden": np.array([1, 2]), "layers.0.ffn": np.array([0])})
    how = {"edits": edits, "dense_config": dense}
    save_checkpoint(model, tmp_path / "out", **how)
    loaded = load(tmp_path / "out")
    loaded.resize_token_embeddings(loaded.config.vocab_size + 6)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    # What a push sends are the files that are new.
    assert "modeling_pruned.py" not in loaded._get_files_timestamps(str(tmp_path / "again"))
    # It can be pruned again, too.
    dense = copy.deepcopy(loaded.config)
    edits = cut_(loaded, discover(loaded), {"layers.1.ffn": np.array([2])})
    saved = save_checkpoint(loaded, tmp_path / "twice", edits=edits, dense_config=dense)
    assert saved.kind == "remote_code"
    assert torch.equal(logits(load(tmp_path / "twice")), logits(loaded))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Rename layer 2 to 1, for a knife that cut before it dropped layer 1."""
    return {
        name.replace("layers.2.", "layers.1."): value
        for name, value in values.items()
        if "layers.1." not in name or name.endswith("self_attn")
    }


def test_pruned_again(tmp_path: Path) -> None:
    differing_layers(tiny_model("llama")).save(tmp_path / "once")
    knife = Knife(load(tmp_path / "once"))
    knife.drop_layers([1, 2])
    knife.ffn(1, range(50))
    assert knife.save(tmp_path / "twice") == "remote_code"
    loaded = load(tmp_path / "twice")
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(logits(loaded), logits(knife.model))


@pytest.mark.parametrize("cut", [equal_layers, differing_layers])
def test_code_of_the_source_is_not_named_where_it_is_not_written(
    cut: Callable[[PreTrainedModel], Knife], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.config.auto_map = {"AutoConfig": "its.Config", "AutoModelForCausalLM": "its.Model"}
    kind = cut(model).save(tmp_path / "out")
    written = {file.stem for file in (tmp_path / "out").glob("*.py")}
    assert bool(written) is (kind == "remote_code")
    named = json.loads((tmp_path / "out" / "config.json").read_text()).get("auto_map", {})
    assert {name.partition(".")[0] for name in named.values()} == written
    load(tmp_path / "out")


def test_the_folder_holds_plan_and_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.max_length = 77
    knife = differing_layers(model)
    before = model.config.to_dict()
    saved = save_checkpoint(
        model, tmp_path / "out", edits=knife.edits, plan_json=PLAN, tokenizer=tokenizer
    )
    assert saved.kind == "remote_code"
    assert (saved.path / "plan.json").read_text() == PLAN
    assert AutoTokenizer.from_pretrained(saved.path)("abc") == tokenizer("abc")
    assert load(saved.path).generation_config.max_length == 77
    assert {**model.config.to_dict(), "architectures": None} == {**before, "architectures": None}
    assert not list(saved.path.glob("*.bin"))
    modes = {file.name: file.stat().st_mode & 0o044 for file in saved.path.iterdir()}
    assert set(modes.values()) == {0o044}, modes


def test_experts_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    knife = Knife(model)
    for layer in range(3):
        moe = f"model.layers.{layer}.mlp"
        knife.tensor(f"{moe}.experts.gate_up_proj", 0, (0, 2, 3))
        knife.tensor(f"{moe}.experts.down_proj", 0, (0, 2, 3))
        knife.tensor(f"{moe}.gate.weight", 0, (0, 2, 3))
        knife.attribute(f"{moe}.experts", "num_experts", 3)
        knife.attribute(f"{moe}.gate", "num_experts", 3)
    knife.attribute("", "num_experts", 3)
    assert knife.save(tmp_path / "out") == "stock"
    loaded = load(tmp_path / "out")
    assert loaded.config.num_local_experts == 3
    assert torch.equal(logits(loaded), logits(model))


LOAD = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 35).view(2, 16)).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "first"),
    [
        (differing_layers, "import llm_pruner.checkpoints"),
        (equal_layers, "sys.modules['llm_pruner'] = None"),
    ],
    ids=["recipe", "stock-without-the-package"],
)
def test_in_a_new_process(
    cut: Callable[[PreTrainedModel], Knife], first: str, tmp_path: Path
) -> None:
    knife = cut(tiny_model("llama"))
    knife.save(tmp_path / "out")
    result = tmp_path / "logits.pt"
    run_new(LOAD.format(first=first), tmp_path / "out", result, said=tmp_path / "said.txt")
    assert torch.equal(torch.load(result, weights_only=True), logits(knife.model))


def broken(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    differing_layers(tiny_model("llama")).save(path)
    config = json.loads((path / "config.json").read_text())
    change(config["pruned"])
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=7), "format version 7.*reads version 1"),
        (lambda q: q["shapes"].update({"model.nothing.weight": "2x2"}), "'model.nothing.weight'"),
        (
            lambda q: q["shapes"].update({"model.layers.0.mlp.up_proj.weight": "81x48"}),
            r"the shape \(81, 48\), and the dense model has \(80, 48\)",
        ),
        (lambda q: q["shapes"].update({"model.norm.weight": "many"}), "cannot be read"),
        (lambda q: q["layers"].update({"model.layers": "0-7"}), "which has 3"),
        (lambda q: q["layers"].update({"model.blocks": "0"}), "no module list"),
        (lambda q: q["buffers"].update({"model.rotary_emb.inv_freq": {"0": "9"}}), "lacks"),
        (lambda q: q["attributes"].update({"model.norm": {"sizes": 3}}), "sets 'sizes'"),
    ],
)
def test_broken_recipes(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = broken(tmp_path / "out", change)
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


def test_edits_that_do_not_give_the_model_leave_nothing(tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("llama"))
    knife.shapes.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(LLMPrunerError, match=r"up_proj\.weight dimension 0: 80 for 27"):
        knife.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    knife = differing_layers(tiny_model("llama"))
    knife.dense_config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match="quantized with gptq"):
        knife.save(tmp_path / "out")


def test_recipe_round_trip() -> None:
    recipe = Recipe(
        shapes={"a.weight": (3, 4)},
        buffers={"b": {1: (0, 1, 5)}},
        attributes={"c": {"n": 3, "config.m": 2, "shape": (3,)}},
        layers={"h": (0, 2)},
        dense_config={"num_hidden_layers": 3},
    )
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def test_composition_counts_in_the_first_result() -> None:
    first = Recipe(
        shapes={"h.0.w": (5, 5), "h.2.w": (4, 4)},
        buffers={"b": {0: (1, 3, 5)}},
        attributes={"h.2": {"n": 1, "m": 1}},
        layers={"h": (0, 2, 3, 5)},
    )
    second = Recipe(
        shapes={"h.1.w": (2, 4)},
        buffers={"b": {0: (0, 2)}},
        attributes={"h.1": {"n": 2}},
        layers={"h": (1, 2)},
    )
    both = compose(first, second)
    assert both.shapes == {"h.1.w": (2, 4)}
    assert both.buffers == {"b": {0: (1, 5)}}
    assert both.attributes == {"h.1": {"n": 2, "m": 1}}
    assert both.layers == {"h": (2, 3)}
