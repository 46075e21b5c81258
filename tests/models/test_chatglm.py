"""ChatGLM-6B: masks, positions, cache, padding, tokenizer, checkpoint layout and pruning."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.models.chatglm import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMModel,
    ChatGLMTokenizer,
)
from llm_pruner.models.chatglm.modeling import Layout, positions, read_layout, visible
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference
from llm_pruner.types import Discovery
from removals import pick

PAD, MASK, GMASK, SOP, EOP = 3, 90, 91, 94, 95
TOKENS: dict[str, Any] = {
    "bos_token_id": SOP,
    "eos_token_id": EOP,
    "pad_token_id": PAD,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
}
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]


def tiny_config(**changes: Any) -> ChatGLMConfig:
    """Return a config of 3 layers with 6 heads of 8 channels."""
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 48,
        "num_layers": 3,
        "num_attention_heads": 6,
        "inner_hidden_size": 40,
        "max_sequence_length": 64,
    }
    return ChatGLMConfig(**(sizes | TOKENS | changes))


def tiny(attention: str = "sdpa", **changes: Any) -> ChatGLMForConditionalGeneration:
    """Return a random model; biases and norms are random too."""
    config = tiny_config(**changes)
    model = ChatGLMForConditionalGeneration._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval().requires_grad_(False)


def layout_of(rows: list[list[int]] | torch.Tensor, mask: list[list[int]] | None = None) -> Layout:
    """Read the layout of rows with the token ids of this file, or of embeddings."""
    return read_layout(
        torch.as_tensor(rows),
        None if mask is None else torch.tensor(mask),
        bos_token_id=SOP,
        mask_token_id=MASK,
        gmask_token_id=GMASK,
    )


def picture(mask: torch.Tensor) -> list[str]:
    """Return a mask (queries, keys) as one string for each query."""
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


# ------------------------------------------------------------------ positions and masks


def test_positions_of_context_and_answer() -> None:
    place, block = positions(layout_of([[5, 6, GMASK, SOP, 7, 8]]), 0, 6)
    assert place.tolist() == [[0, 1, 2, 2, 2, 2]]
    assert block.tolist() == [[0, 0, 0, 1, 2, 3]]


def test_plain_text_is_an_answer_to_nothing() -> None:
    layout = layout_of([[5, 6, 7, 8], [5, GMASK, 7, 8]])
    for place, block in zip(*positions(layout, 0, 4), strict=True):
        assert place.tolist() == [0, 0, 0, 0]
        assert block.tolist() == [1, 2, 3, 4]
    for row in range(2):
        assert picture(visible(layout, 0, 4, 4, None)[row, 0]) == ["x...", "xx..", "xxx.", "xxxx"]
    same = layout_of(torch.zeros(2, 4, 48))
    assert [same.context.tolist(), same.mask_position.tolist()] == [[0, 0], [0, 0]]


def test_context_is_seen_both_ways() -> None:
    layout = layout_of([[5, 6, GMASK, SOP, 7, 8]])
    assert picture(visible(layout, 0, 6, 6, None)[0, 0]) == [
        "xxx...",
        "xxx...",
        "xxx...",
        "xxxx..",
        "xxxxx.",
        "xxxxxx",
    ]


def reference_logits(model: ChatGLMForConditionalGeneration, row: list[int]) -> torch.Tensor:
    """Compute one row head by head with complex rotations, float64, shape (sequence, vocabulary).

    Written from the formulas alone, with none of the model's code.
    """
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    count, width = config.num_attention_heads, config.head_dim
    context, gap = row.index(SOP), row.index(GMASK)
    place = [i if i < context else gap for i in range(len(row))]
    block = [max(0, i - context + 1) for i in range(len(row))]
    alpha = math.sqrt(2 * config.num_layers)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turn(x: torch.Tensor, at: list[int]) -> torch.Tensor:
        half = x.shape[-1] // 2
        speed = [float(torch.tensor(10000.0 ** (-i / half)).half()) for i in range(half)]
        angle = torch.outer(torch.tensor(at).double(), torch.tensor(speed).double())
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([turned.real, turned.imag], -1)

    def turn_both(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([turn(x[:, : width // 2], place), turn(x[:, width // 2 :], block)], -1)

    x = weights["transformer.word_embeddings.weight"][row]
    for layer in range(config.num_layers):
        name = f"transformer.layers.{layer}"
        a = norm(x, f"{name}.input_layernorm")
        fused = linear(a, f"{name}.attention.query_key_value")
        heads = []
        for head in range(count):
            q, k, v = fused[:, 3 * width * head : 3 * width * (head + 1)].split(width, -1)
            scores = turn_both(q) @ turn_both(k).T / math.sqrt(width)
            for i in range(len(row)):
                for j in range(len(row)):
                    if j > i and j >= context:
                        scores[i, j] = -math.inf
            heads.append(scores.softmax(-1) @ v)
        y = alpha * a + linear(torch.cat(heads, -1), f"{name}.attention.dense")
        b = norm(y, f"{name}.post_attention_layernorm")
        inner = linear(b, f"{name}.mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
        x = alpha * b + linear(inner, f"{name}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_follow_the_formulas(attention: str) -> None:
    model = tiny(attention)
    row = [5, 17, 31, 44, 8, GMASK, SOP, 61, 7, 23]
    logits = model(torch.tensor([row])).logits[0]
    expected = reference_logits(model, row)
    assert float(expected.abs().max()) > 1
    assert float((logits - expected).abs().max()) < 1e-5


ROWS = [[5, 6, 7, 8, 9, GMASK, SOP, 11, 12], [15, GMASK, SOP, 21, 22, 23, 24, 25, 26]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS, [[5, 6, 7, 8, 9, 10, 11, 12, 13]]], ids=["answer", "plain"])
def test_cache_gives_what_running_again_gives(attention: str, rows: list[list[int]]) -> None:
    model = tiny(attention)
    tokens = torch.tensor(rows)
    whole = model(tokens, use_cache=False)
    first = model(tokens[:, :7], use_cache=True)
    second = model(tokens[:, 7:8], cache=first.cache, use_cache=True)
    third = model(tokens[:, 8:], cache=second.cache, use_cache=True)
    pieces = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert whole.cache is None
    assert float((whole.logits - pieces).abs().max()) < 1e-5


def test_earlier_name_of_the_cache() -> None:
    model = tiny()
    tokens = torch.tensor(ROWS)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :7], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 7
    step = model(tokens[:, 7:], past_key_values=cache, use_cache=True).logits
    assert float((step - model(tokens).logits[:, 7:]).abs().max()) < 1e-5


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and the mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


RAGGED = [[5, 6, 7, 8, 9, GMASK, SOP, 11, 12], [15, GMASK, SOP, 21], [31, 32, 33, 34, 35]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_no_logits(attention: str) -> None:
    model = tiny(attention)
    ids, mask = pad_left(RAGGED)
    padded = model(ids, attention_mask=mask, use_cache=True)
    assert bool(padded.logits.isfinite().all())
    step = torch.tensor([[41], [42], [43]])
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
    later = model(step, attention_mask=mask, cache=padded.cache, use_cache=True)
    for index, row in enumerate(RAGGED):
        alone = model(torch.tensor([[*row, int(step[index])]])).logits[0]
        assert float((padded.logits[index, -len(row) :] - alone[:-1]).abs().max()) < 1e-5
        assert float((later.logits[index, 0] - alone[-1]).abs().max()) < 1e-5


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_greedy_generation(options: dict[str, Any]) -> None:
    model = tiny(tie_word_embeddings=False)
    model.generation_config.eos_token_id = None
    ids, mask = pad_left(RAGGED[:2])
    expected, seen = ids, mask
    for _ in range(5):
        token = model(expected, attention_mask=seen).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
        seen = torch.cat([seen, torch.ones_like(token)], dim=1)
    assert len(expected[:, -5:].unique()) > 2
    given = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    assert given.tolist() == expected.tolist()


def test_loss_is_shifted_and_gradients_flow() -> None:
    model = tiny().train().requires_grad_(True)
    model.activation_checkpointing_enable()
    ids = torch.tensor(ROWS)
    labels = ids.masked_fill(ids < 20, -100)
    output = model(ids, labels=labels, use_cache=False)
    logits = output.logits[:, :-1].reshape(-1, 100)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kept = model(ids, logits_to_keep=2, use_cache=False).logits
    assert kept.shape == (2, 2, 100)
    assert float((kept - output.logits[:, -2:]).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_positions_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(hidden_size=192)
    exact = model.transformer.layers[0].attention.rotary_emb.inv_freq.clone()
    assert len(exact) == 8
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for smaller in (model.to(dtype), loaded):
        assert smaller(torch.tensor(ROWS)).logits.dtype == dtype
        for layer in smaller.transformer.layers:
            assert layer.attention.rotary_emb.inv_freq.dtype == torch.float32
            assert torch.equal(layer.attention.rotary_emb.inv_freq, exact)


def test_embeddings_are_plain_text() -> None:
    model = tiny()
    ids = torch.tensor([[5, 6, 7, 8]])
    by_embedding = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert by_embedding.tolist() == model(ids).logits.tolist()


def test_wrong_inputs() -> None:
    model = tiny()
    ids = torch.tensor(ROWS)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="finds positions from the tokens"):
        model(ids, position_ids=torch.arange(9)[None])
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="the cache is of other rows"):
        model(ids[:1, :1], cache=cache)


# ----------------------------------------------------------------- configuration, checkpoints


def test_full_size_on_meta() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("chatglm"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_173_286_400
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["lm_head.weight"] == shapes["transformer.word_embeddings.weight"]
    assert shapes["transformer.word_embeddings.weight"] == (130528, 4096)
    assert shapes["transformer.layers.27.attention.query_key_value.weight"] == (12288, 4096)
    assert shapes["transformer.layers.27.mlp.dense_h_to_4h.weight"] == (16384, 4096)


PUBLISHED: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "use_cache": True,
    "vocab_size": 100,
    "hidden_size": 48,
    "inner_hidden_size": 40,
    "num_attention_heads": 6,
    "num_layers": 3,
    "max_sequence_length": 64,
} | TOKENS


def test_published_checkpoint_loads(tmp_path: Path) -> None:
    """Both tied weights and the frequencies of every block are there, in half precision."""
    model = tiny()
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    for layer in range(3):
        name = f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"
        state[name] = torch.full((2,), 7.0, dtype=torch.float16)  # not what is used
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(loaded) is ChatGLMForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert not hasattr(loaded.config, "auto_map")
    rounded = model.half().float()
    for one, other in zip(loaded.transformer.layers, rounded.transformer.layers, strict=True):
        assert one.attention.rotary_emb.inv_freq.tolist() == pytest.approx([1.0, 0.01], rel=1e-3)
        assert one.residual_scale == other.residual_scale == pytest.approx(math.sqrt(6))
    ids = torch.tensor(ROWS)
    assert torch.equal(loaded(ids).logits, rounded(ids).logits)


def test_save_and_load_through_the_auto_classes(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    ids = torch.tensor(ROWS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ChatGLMModel
    hidden = model.transformer(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, hidden)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def test_fewer_layers_keep_the_residual_scale(tmp_path: Path) -> None:
    config = tiny_config(num_layers=28)
    config.num_layers = 20
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.num_hidden_layers == 20
    assert loaded.residual_scale == math.sqrt(56)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_bit": 4}, "another quantization_bit"),
        ({"pre_seq_len": 128}, "another pre_seq_len"),
        ({"multi_query_attention": True}, "another multi_query_attention"),
    ],
)
def test_configs_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**values)


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """Return a small SentencePiece model in which tokens stand as in the published one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    text = (" ".join(rng.choices(words, k=8)) for _ in range(200))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        vocab_size=200,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=[
            "<n>",
            *SPECIAL,
            "<|tab|>",
            *(f"<|blank_{length}|>" for length in range(2, 81)),
        ],
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def tokenizer(pieces: bytes, tmp_path: Path) -> ChatGLMTokenizer:
    path = tmp_path / "ice_text.model"
    path.write_bytes(pieces)
    return ChatGLMTokenizer(str(path))


def test_input_format(tokenizer: ChatGLMTokenizer) -> None:
    first, second = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd")
    )
    gmask, sop, eop = (
        tokenizer.convert_tokens_to_ids(name) for name in ("[gMASK]", "<sop>", "<eop>")
    )
    assert tokenizer("ab")["input_ids"] == [*first, gmask, sop]
    assert tokenizer("ab", "cd")["input_ids"] == [*first, gmask, sop, *second, eop]
    assert tokenizer.num_special_tokens_to_add() == 2


def test_batches_are_padded_on_the_left(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["ab cd ef", "a"], padding=True)
    long, short = batch["input_ids"]
    gap = len(long) - len(tokenizer("a")["input_ids"])
    assert gap > 0
    assert short[:gap] == [3] * gap
    assert batch["attention_mask"] == [[1] * len(long), [0] * gap + [1] * (len(long) - gap)]
    assert tokenizer.decode(short, skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
    "text",
    ["ab cd", "ab  cd", "a\n\tb\n", f"a{' ' * 79}b", f"a{' ' * 200}b", "a   b    c", "", "  a"],
)
def test_whitespace_survives(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_loads_through_the_auto_class(pieces: bytes, tmp_path: Path) -> None:
    """From the files of the published checkpoint, and again from what it saves."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "ice_text.model").write_bytes(pieces)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    settings = {
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "end_token": "</s>",
        "gmask_token": "[gMASK]",
        "mask_token": "[MASK]",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "num_image_tokens": 0,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is ChatGLMTokenizer
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    tiny_config().save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "ab  cd\n[MASK] ef"
    assert type(again) is ChatGLMTokenizer
    assert again(text, "gh")["input_ids"] == loaded(text, "gh")["input_ids"]
    assert (again.gmask_token_id, again.end_token, again.padding_side) == (6, "</s>", "left")


def test_tokenizers_that_cannot_be_used(pieces: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ice_text.model"
    path.write_bytes(pieces)
    with pytest.raises(UserError, match="is of another release"):
        ChatGLMTokenizer(str(path), num_image_tokens=20000)
    with pytest.raises(UserError, match="is of another release"):
        ChatGLMTokenizer(str(path), gmask_token="[gM]")


# ---------------------------------------------------------------------------------- pruning

KINDS = ("hidden", "heads", "head_dim", "ffn", "layers")


@cache
def discovered(attention: str) -> tuple[ChatGLMForConditionalGeneration, Discovery]:
    """Return a model and what can be removed from it; shared by tests, so leave it be."""
    model = tiny(attention)
    return model, discover(model)


@pytest.mark.parametrize(
    ("attention", "kind"), [("sdpa", "hidden"), ("sdpa", "all"), ("eager", "all")]
)
def test_pruned_equals_twin(attention: str, kind: str, record_property: Any) -> None:
    model, discovery = discovered(attention)
    for name in KINDS:
        groups = [group for group in discovery.groups if group.kind == name]
        assert len(groups) == (1 if name in ("hidden", "layers") else 3)
        assert all(group.frozen is None for group in groups)
    removal = pick(discovery, None if kind == "all" else (kind,))
    dense = pruned_logits(model, discovery)
    expected = twin_logits(model, discovery, removal)
    smaller = copy.deepcopy(model)
    cut_(smaller, discovery, removal)
    actual = pruned_logits(smaller, discovery)
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    assert parameters == count_parameters(discovery, removal) < count_parameters(discovery)
    assert largest_difference(dense, actual) > 0.1
    difference = largest_difference(expected, actual)
    record_property("twin", (f"chatglm {attention}", kind, difference))
    assert difference <= 1e-5


@pytest.mark.parametrize(("pruned", "kind"), [(3, "stock"), (1, "recipe")])
def test_checkpoints_need_the_package(pruned: int, kind: str, tmp_path: Path) -> None:
    model, discovery = discovered("sdpa")
    smaller = copy.deepcopy(model)
    groups = [group.name for group in discovery.groups if group.kind == "ffn"]
    edits = cut_(smaller, discovery, {name: np.arange(8) for name in groups[:pruned]})
    saved = save_checkpoint(smaller, tmp_path / "out", edits=edits, dense_config=model.config)
    assert (saved.kind, saved.needs) == (kind, ("import llm_pruner",))
    assert not [*saved.path.glob("*.py")]
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    ids = torch.tensor(ROWS)
    assert torch.equal(loaded(ids).logits, smaller(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, smaller(ids).logits)
