"""Folders whose weights another program packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command import run, save_tiny, write_text
from llm_pruner import errors
from llm_pruner.errors import UserError
from llm_pruner.models.load import check
from llm_pruner.settings.common import ModelSettings

pytestmark = pytest.mark.slow

PRUNE = ("--ratio", 0.2, "--criterion", "l2", "--structures", "ffn", "--no-verify")


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
