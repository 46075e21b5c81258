"""Weights that are read block by block give the plan, weights and verdict of those in memory."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from command import save_tiny, write_text
from helpers import tiny_model, tiny_tokenizer
from llm_pruner import Model
from llm_pruner.commands.prune import PruneRun
from llm_pruner.discovery import groups
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, score, taylor
from llm_pruner.models import mapped_weights, streaming
from llm_pruner.models.blockwise import NotBlockwise
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import load_model
from llm_pruner.models.mapped_weights import Joined, element, leaf_tensors
from llm_pruner.models.streaming import (
    ends_of,
    is_streamed,
    stored,
    stream_,
    turn,
    values_of,
)
from llm_pruner.settings import common
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.cut import cut_copy
from llm_pruner.tracing.scenes import scenes_of

TINY = 1000
"""Bytes into which no weights fit."""


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.txt", 6000))


def save(
    folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16, layers: int = 3
) -> Path:
    tiny_model(model_type, num_hidden_layers=layers).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def pruned(model: Path, out: Path, text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    asked = {"samples": 8, "seq_len": 32, "protect_first": 0, "protect_last": 0} | options
    settings = PruneSettings(model=str(model), out=out, calibration=text, **asked)
    done = PruneRun(settings).carry_out()
    assert done.twin_difference is not None
    return (out / "plan.json").read_text(), weights(out)


def require_alike(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3_text", "gpt2"])
def test_a_streamed_model_gives_the_plan_and_the_weights_of_a_resident_one(
    tmp_path: Path, text: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_type == "llama":
        monkeypatch.setattr(groups, "scenes_of", scenes_of)  # all of them
    model = save(tmp_path / "model", model_type)
    options = {"preset": "paper", "ratio": 0.15}
    plan, kept = pruned(model, tmp_path / "a", text, **options)
    streamed, same = pruned(model, tmp_path / "b", text, memory=TINY, **options)
    assert plan == streamed
    require_alike(kept, same)


@pytest.mark.parametrize(
    ("options", "by_choice"),
    [
        ({"preset": "paper"}, True),
        ({"preset": "balanced"}, True),
        ({"preset": "best"}, False),  # a repair
        ({"preset": "paper", "memory": 4000}, False),
    ],
)
def test_weights_that_fit_stay_in_memory_where_their_files_are_slower(
    tmp_path: Path, text: str, options: dict[str, Any], by_choice: bool
) -> None:
    model = save(tmp_path / "model", "llama")
    settings = PruneSettings(
        **{"model": str(model), "out": tmp_path / "out", "calibration": text, **options}, ratio=0.1
    )
    run = PruneRun(settings)
    run.check()
    assert run.stays(4000) == (1000 if by_choice else 4000)


@pytest.mark.slow
def test_larger_weights_stay_in_their_files_though_they_fit_where_they_can(
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, options = save(tmp_path / "model", "llama"), {"preset": "paper", "ratio": 0.15}
    plan, kept = pruned(model, tmp_path / "a", text, **options)
    assert "block by block" not in caplog.text
    monkeypatch.setattr(common, "SHARE_RESIDENT", 10**9)
    streamed, same = pruned(model, tmp_path / "b", text, **options)
    assert "they are read block by block" in caplog.text
    assert plan == streamed
    require_alike(kept, same)

    def no_chain(*_: object, **__: object) -> None:
        raise NotBlockwise("block 1 depends on more than its hidden state")

    monkeypatch.setattr(taylor, "find_chain", no_chain)
    _, alike = pruned(model, tmp_path / "c", text, **options)
    assert "all weights are read into memory: the model is no chain of blocks" in caplog.text
    require_alike(kept, alike)
    with pytest.raises(UserError, match="give a --memory that holds all of them"):
        pruned(model, tmp_path / "d", text, memory=TINY, **options)
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "fast"},
        {"preset": "best", "repair_minutes": 0.0},
        {"preset": "balanced", "steps": 2},
        {"preset": "fast", "criterion": "l2", "structures": ("heads", "ffn", "hidden", "layers")},
        {"preset": "paper", "structures": ("hidden", "ffn")},
        {"preset": "paper", "uniform": True},
    ],
    ids=["fast", "best", "rounds", "l2", "ends", "uniform"],
)
def test_so_does_every_way_of_choosing_and_refitting(
    tmp_path: Path, text: str, options: dict[str, Any]
) -> None:
    model = save(tmp_path / "model", "llama")
    asked = {"ratio": 0.2} | options
    plan, kept = pruned(model, tmp_path / "a", text, **asked)
    streamed, same = pruned(model, tmp_path / "b", text, memory=TINY, **asked)
    assert plan == streamed
    require_alike(kept, same)
    code = [(tmp_path / name / "modeling_pruned.py").exists() for name in "ab"]
    assert code[0] == code[1]
    assert not (code[0] and "uniform" in options)


DEEPSEEK: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Return a folder in bfloat16 but for the biases of its router, which differ by less."""
    model = tiny_model("deepseek_v3", num_hidden_layers=2, **DEEPSEEK).to(torch.bfloat16)
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    bias.data = 5 + 0.001 * torch.arange(8)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("memory", [TINY, 10**9], ids=["streamed", "resident"])
def test_what_chooses_experts_stays_in_float32(
    tmp_path: Path, text: str, mixture: Path, memory: int
) -> None:
    options = {"criterion": "l2", "structures": ("ffn",), "ratio": 0.05, "memory": memory}
    pruned(mixture, tmp_path / "out", text, preset="paper", **options)
    before, after = weights(mixture), weights(tmp_path / "out")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert after[name].dtype == torch.float32
    assert torch.equal(after[name], before[name])
    assert after["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert after["lm_head.weight"].dtype == torch.bfloat16


def widened(folder: Path, part: str) -> Path:
    """Store some weights in float32, with values that bfloat16 cannot hold."""
    file = folder / "model.safetensors"
    found = weights(folder)
    wide = {name: torch.rand(value.shape) for name, value in found.items() if part in name}
    save_file(found | wide, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_a_wider_type_than_most_are_not_rounded(tmp_path: Path, dtype: str) -> None:
    folder = widened(save(tmp_path / "model", "llama"), "norm")
    resident = dict(load_model(str(folder), dtype=dtype).model.named_parameters())
    streamed = load_model(str(folder), dtype=dtype, memory=TINY).model
    for name, parameter in streamed.named_parameters():
        value = values_of(parameter)
        assert value.dtype == resident[name].dtype, name
        assert torch.equal(value, resident[name]), name


@pytest.mark.parametrize(("said", "there"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_of_another_type_than_the_config_says_stay_in_the_files(
    tmp_path: Path, said: str, there: str
) -> None:
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kind = getattr(torch, there)
    save_file({name: one.to(kind) for name, one in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said}))
    resident, streamed = (load_model(str(folder), dtype="auto", memory=n) for n in (10**9, TINY))
    assert streamed.stored_dtype == resident.stored_dtype == getattr(torch, said)
    for name, expected in resident.model.named_parameters():
        found = values_of(streamed.model.get_parameter(name), expected.dtype)
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_stay_in_the_files(
    tmp_path: Path, model_type: str
) -> None:
    folder = str(save(tmp_path / "model", model_type))
    resident, streamed = load_model(folder, dtype="auto"), load_model(folder, memory=TINY)
    experts = [
        (name, one) for name, one in streamed.model.named_parameters() if "experts.gate_up" in name
    ]
    assert experts
    for name, parameter in experts:
        assert parameter.isnan().all()
        with stored(parameter) as value:
            assert isinstance(value, Joined)
            assert all(one.ndim == 2 for one in leaf_tensors(value))
        expected = resident.model.get_parameter(name)
        assert torch.equal(values_of(parameter, expected.dtype), expected)
        assert parameter.isnan().all()
    assert streamed.fingerprint == resident.fingerprint


@pytest.fixture
def streamed(tmp_path: Path) -> Any:
    return load_model(str(save_tiny(tmp_path / "model", num_hidden_layers=3)), memory=TINY).model


def test_weights_are_there_in_their_turn_and_nan_out_of_it(streamed: Any) -> None:
    block = streamed.model.layers[1]
    weight = block.mlp.down_proj.weight
    assert is_streamed(weight)
    assert not is_streamed(streamed.model.norm.weight)
    assert weight.isnan().all()
    with turn(block):
        held = weight.detach().clone()
        with turn(block):
            pass
        assert torch.equal(weight, held)
    assert weight.isnan().all()
    assert torch.equal(values_of(weight), held)


def test_of_a_cut_embedding_a_few_rows_are_read(
    streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, tokens = load_model(str(tmp_path / "model")).model, torch.arange(3, 40)[None]
    discovery = discover(streamed)
    name = next(one.name for one in discovery.groups if one.kind == "hidden")
    cut, expected = (cut_copy(one, discovery, {name: [2, 5]}) for one in (streamed, resident))
    table = streaming._SOURCES[cut.get_input_embeddings().weight]
    assert table.changes
    read = mapped_weights.StoredWeight.read

    def watched(source: Any, *dtype: Any) -> torch.Tensor:
        assert source is not table
        return read(source, *dtype)

    with torch.no_grad():
        monkeypatch.setattr(mapped_weights.StoredWeight, "read", watched)
        assert torch.equal(cut(tokens).logits, expected(tokens).logits)
        monkeypatch.undo()
        again = cut_copy(cut, discover(cut), {name: [1]})  # a trace sees the table as it was cut
    assert again.get_input_embeddings().weight.shape[1] == table.stored.shape[1] - 3


def test_a_streamed_model_takes_no_memory_for_blocks_embedding_and_head(streamed: Any) -> None:
    inside = [*streamed.model.layers.parameters()]
    inside += [streamed.get_input_embeddings().weight, streamed.lm_head.weight]
    assert all(one.untyped_storage().nbytes() <= 8 for one in inside)


class Chained(nn.Module):
    """A model whose embedding is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return self.head(hidden)


def test_a_tied_embedding_is_read_for_each_call() -> None:
    torch.manual_seed(0)
    model, ids = Chained().to(torch.bfloat16), torch.tensor([[3, 1, 49]])
    expected = copy.deepcopy(model).float()(ids)
    stream_(model, torch.float32)
    assert is_streamed(model.embedding.weight)
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        assert model.embedding(ids).dtype == torch.float32
        assert torch.equal(model(ids), expected)
    assert model.embedding.weight.isnan().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_parts_are_joined_when_values_are_asked_for(dim: int) -> None:
    parts = tuple(torch.rand(2, 3, 4) for _ in range(3))
    for joined, plain in (
        (Joined(parts, dim, stacked=False), torch.cat(parts, dim)),
        (Joined(parts, dim, stacked=True), torch.stack(parts, dim)),
    ):
        assert joined.shape == plain.shape
        assert torch.equal(joined + 0, plain)
        for index in (0, 7, 71):
            assert torch.equal(element(joined, index), plain.reshape(-1)[index : index + 1])


def test_an_embedding_that_would_be_rounded_as_a_whole_stays_in_memory() -> None:
    model = Chained()
    stream_(model, torch.bfloat16)
    assert not is_streamed(model.embedding.weight)
    assert is_streamed(model.layers[0].weight)


def test_gradients_pass_the_ends_in_their_turn() -> None:
    torch.manual_seed(0)
    model, ids = Chained().to(torch.bfloat16), torch.tensor([[3, 1, 49]])
    wide = copy.deepcopy(model).float()
    wide(ids).square().sum().backward()
    stream_(model, torch.float32)
    with turn(*model.layers, *ends_of(model)):
        model(ids).square().sum().backward()
        assert torch.equal(model.embedding.weight.grad, wide.embedding.weight.grad)


def mapped_bytes(file: Path) -> int:
    """Return how much of a file this process has mapped pages of."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and first == "Rss:":
            found += 1024 * int(rest[0])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells what is mapped")
def test_weights_that_are_links_are_known_to_lie_in_files(tmp_path: Path) -> None:
    """In the cache of the hub, a file has a hash for a name."""
    place, blob = save(tmp_path / "snapshot", "llama"), tmp_path / "blobs/0a0a0a"
    blob.parent.mkdir(parents=True)
    (place / "model.safetensors").rename(blob)
    (place / "model.safetensors").symlink_to(blob)
    model = load_model(str(place), memory=TINY).model
    found = [streaming._SOURCES[weight] for weight in model.parameters() if is_streamed(weight)]
    assert found
    assert all(one.mapped for one in found)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells what is mapped")
def test_neither_loading_nor_a_turn_leaves_pages_of_the_files_in_memory(tmp_path: Path) -> None:
    """The fingerprint reads eight values of each weight, and the kernel maps much around each."""
    sizes = {"hidden_size": 240, "intermediate_size": 1024, "num_hidden_layers": 4}
    tiny_model(**sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model: Any = load_model(str(tmp_path), memory=TINY).model
    assert mapped_bytes(file) < file.stat().st_size / 4
    with turn(*model.model.layers, *ends_of(model)), torch.no_grad():
        model(torch.arange(3, 40)[None])
    assert mapped_bytes(file) < file.stat().st_size / 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others keep them in memory")
def test_a_weight_that_took_another_one_s_place_lies_on_the_disk(
    streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = streamed.model.layers
    for number, least in enumerate((1, 2**30)):
        monkeypatch.setattr(mapped_weights, "_FILED", least)
        module = layers[number].mlp.down_proj
        with turn(layers[number]):
            new = torch.randn_like(module.weight)
            module.weight = nn.Parameter(new, requires_grad=False)
        source = streaming._SOURCES[module.weight]
        assert source.mapped is (number == 0)
        source.forget()  # read again from the file
        with turn(layers[number]):
            assert torch.equal(module.weight, new.to(source.stored.dtype).to(new.dtype))


def test_copies_run_on_their_own_cuts(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model", num_hidden_layers=3))
    resident, streamed = load_model(folder).model, load_model(folder, memory=TINY).model
    discovery = discover(streamed)
    scores = score(streamed, discovery, Criterion("l2"), input_ids=None, seed=0)
    same = score(resident, discover(resident), Criterion("l2"), input_ids=None, seed=0)
    assert all((scores[name] == same[name]).all() for name in same)
    removal = {name: scores[name].argsort()[:2] for name in scores if "ffn" in name}
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = resident(tokens).logits
        cut = cut_copy(streamed, discovery, removal)
        expected = cut_copy(resident, discover(resident), removal)(tokens).logits
        assert torch.equal(cut(tokens).logits, expected)
        assert torch.equal(sharing_copy(streamed)(tokens).logits, before)
        assert torch.equal(streamed(tokens).logits, before)
        assert not torch.equal(expected, before)


def test_models_that_cannot_be_read_block_by_block_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

    with pytest.raises(UserError, match="Flat has no list of blocks"):
        stream_(Flat(), torch.float32)

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16), persistent=False)

    with pytest.raises(UserError, match="scale of Rounded is computed in the type"):
        stream_(Rounded(), torch.float32)


def test_a_streamed_model_is_saved_as_it_is_stored(tmp_path: Path) -> None:
    folder, ids = save(tmp_path / "dense", "llama"), torch.arange(3, 20)[None]
    loaded = load_model(str(folder), memory=TINY)
    before = loaded.model(ids).logits
    Model(loaded).save(tmp_path / "again")
    require_alike(weights(tmp_path / "again"), weights(folder))
    assert torch.equal(loaded.model(ids).logits, before)  # and still computes in float32
