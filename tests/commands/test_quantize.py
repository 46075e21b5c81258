"""``compress --quantize``: the stage, and folders with packed weights. Packing needs torchao."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import llm_pruner.commands.compress as stages
from command import figures, measured_here, run, save_tiny, write_text
from llm_pruner import errors
from llm_pruner.checkpoints import packed
from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.models.load import check, load_model
from llm_pruner.report.data import read_report
from llm_pruner.report.records import Measured
from llm_pruner.settings import compress as settings
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import EvaluateSettings

pytestmark = pytest.mark.slow

PRUNE = ("--ratio", 0.2, "--criterion", "l2", "--structures", "ffn", "--no-verify")
COMPRESS = ("--no-recover", "--quantize", "int8", "--preset", "l2.yaml", "--perplexity", "text.txt")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    save_tiny(folder / "dense", num_hidden_layers=3)
    write_text(folder / "text.txt", 600)
    (folder / "l2.yaml").write_text("criterion: l2\nstructures: [ffn]\nprotect_first: 0\n")
    return folder


@pytest.fixture
def work(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_the_last_stage(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluateSettings] = []

    def save_packed(source: Path, out: Path, *, beside: Any, max_shard_size: str) -> None:
        shutil.copytree(source, out)
        (out / "packed").touch()
        beside(out, load_model(str(out), dtype="bfloat16").model)  # half as many bytes

    def measure(one: EvaluateSettings, *_: object, **__: object) -> Measured:
        asked.append(one)
        return figures()

    monkeypatch.setattr(packed, "save_packed", save_packed)
    monkeypatch.setattr(stages, "measure_apart", measure)
    monkeypatch.setattr(settings, "check_installed", lambda *_, **__: None)
    result = run("compress", "dense", "--out", "small", *COMPRESS)
    assert result.code == 0, result.err
    assert [Path(one.model).name for one in asked] == ["dense", "pruned", "quantized"]
    assert [one.against for one in asked] == [None, "dense", "dense"]
    assert "quantized" in next(line for line in result.out.splitlines() if "  dense" in line)
    assert Path("small/packed").is_file()
    assert not Path("small.compressing").exists()
    report = read_report(Path("small/report.json"))
    assert report.final == "quantized"
    assert list(report.evaluations) == list(report.sizes) == ["dense", "pruned", "quantized"]
    assert report.sizes["quantized"].bytes == report.sizes["pruned"].bytes // 2
    card = Path("small/README.md").read_text()
    assert "# the weights are packed: pip install torchao" in card
    assert "the weights of its linear layers were packed in int8" in card
    assert "need the package torchao" in Path("small/report.html").read_text()


@pytest.mark.parametrize(
    ("method", "package"),
    [("torchao", "torchao"), ("compressed-tensors", "compressed_tensors")],
)
def test_packed_weights_are_run_and_never_pruned(
    method: str, package: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree("dense", tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "quant_type": {"default": {}}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    said = f"{folder} is packed by {method}, and needs the package {package}, which is not "
    said += f"installed; run 'pip install {package}'"
    for command in (
        ("evaluate", folder, "--perplexity", "text.txt"),
        ("bench", folder),
        ("bench", "dense", "--against", folder),
    ):
        result = run(*command)
        assert (result.code, result.err) == (2, f"llm-pruner: {said}\n")
    said = f"({method}), and its packed weights can only be run, by evaluate and"
    assert said in run("prune", folder, "--out", "o", *PRUNE).err
    with pytest.raises(UserError, match="can only be run"):
        check(ModelSettings(model=str(folder)))
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantized \(gptq\), and its packed weights are not read"):
        check(ModelSettings(model=str(folder)), packed=True)


def test_a_model_that_is_not_packed_is_the_result(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, *_: object, **__: object) -> None:
        raise UserError(f"{source.name} is saved as a recipe")

    monkeypatch.setattr(packed, "save_packed", refuse)
    monkeypatch.setattr(stages, "measure_apart", lambda *_, **__: figures())
    monkeypatch.setattr(settings, "check_installed", lambda *_, **__: None)
    result = run("compress", "dense", "--out", "unpacked", *COMPRESS)
    assert result.code == 0, result.err
    assert "weights were not packed, so they are as they were: pruned is saved as" in result.err
    assert read_report(Path("unpacked/report.json")).final == "pruned"
    assert load_model("unpacked").model is not None


@needs_torchao
@pytest.mark.parametrize("sizes", ["unequal", "equal"])
def test_packed_folders_load(work: Path, tmp_path: Path, sizes: str) -> None:
    how = ("--uniform",) if sizes == "equal" else ("--scope", "global", "--dtype", "bfloat16")
    assert run("prune", "dense", "--out", tmp_path / "small", *PRUNE, *how).code == 0
    out = tmp_path / "int8"
    model = packed.save_packed(tmp_path / "small", out, max_shard_size="5GB")
    ids = torch.arange(3, 60)[None]
    again = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(again(ids).logits, wanted)
        plain = load_model(str(tmp_path / "small")).model(ids).logits
        loaded = load_model(str(out), packed=True)
        assert 0 < (loaded.model(ids).logits - plain).abs().max() < 0.05
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert model_size(model).bytes == stored
    assert stored < 0.6 * model_size(load_model(str(tmp_path / "small")).model).bytes
    assert loaded.fingerprint == load_model(str(out), packed=True).fingerprint
    left = {"plan.json", "tokenizer.json", "report.json", "request.yaml", "README.md"}
    assert left <= {file.name for file in out.iterdir()}
    with pytest.raises(UserError, match="can only be run"):
        load_model(str(out))


@needs_torchao
def test_compress_with_torchao(work: Path) -> None:
    with measured_here():
        result = run("compress", "dense", "--out", "int8", *COMPRESS)
    assert result.code == 0, result.err
    found = read_report(Path("int8/report.json")).evaluations
    for name in ("pruned", "quantized"):
        assert "KL against dense, text.txt" in [one.name for one in found[name].of("measured")]
