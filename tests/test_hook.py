"""The entry point that PyTorch runs: it costs nothing, breaks nothing, and fails late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig, PreTrainedModel

import llm_pruner
from llm_pruner import hook

PACKAGE = Path(llm_pruner.__file__).parent

ORDINARY = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=16, vocab_size=8,
    intermediate_size=16, num_attention_heads=2)
AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]]))
ours = sorted(name for name in sys.modules if name.startswith("llm_pruner"))
assert ours in (["llm_pruner", "llm_pruner.hook"], []), ours
assert not [one for one in sys.meta_path if type(one).__module__.startswith("llm_pruner")]
config.pruned = {"format_version": 2}
try:
    AutoModelForCausalLM.from_config(config)
except Exception as error:
    print(error)
else:
    print("dense")
"""


ONE_AFTER_THE_OTHER = f"""
import os, sys
import torch, torch._dynamo, torch.distributed.tensor
sys.stderr = sys.stdout
for site in sys.argv[1:]:
    if not os.fork():
        sys.path.insert(0, site)
        if not site.endswith("off"):
            torch._import_device_backends()  # as torch does last
        exec({ORDINARY!r})
        sys.exit()
    assert os.wait()[1] == 0
"""
"""Runs the program with each of several installations; to load PyTorch for each takes seconds."""


def installation(site: Path) -> Path:
    """Make a folder of installed packages, of which ``llm_pruner`` is to be one; return that."""
    installed = site / "entry-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: entry\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[torch.backends]\nus = llm_pruner.hook:register\n")
    return site / "llm_pruner"


def in_a_program(code: str, *args: Path, **environment: str) -> list[str]:
    """Run a program that does not know the package; return the lines that it prints."""
    ran = subprocess.run(
        [sys.executable, "-W", "error:::llm_pruner", "-c", code, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "llm_pruner" not in ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_a_program_imports_nothing_of_it_and_no_installation_breaks_one(tmp_path: Path) -> None:
    names = ("whole", "broken", "half", "off")
    whole, broken, half_removed, off = (installation(tmp_path / name) for name in names)
    for package in (broken, half_removed):
        package.mkdir()
        for name in ("__init__.py", "hook.py"):
            (package / name).write_bytes((PACKAGE / name).read_bytes())
    for room in ("checkpoints", "models", "version", "errors"):
        (broken / f"{room}.py").write_text("raise ImportError('llm_pruner is broken')")
    for package in (whole, off):
        package.symlink_to(PACKAGE)
    sites = [package.parent for package in (whole, broken, half_removed, off)]
    said = in_a_program(ONE_AFTER_THE_OTHER, *sites, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    *found, last = said
    assert found[0].startswith("config.json holds a pruning recipe of format version 2")
    assert found[1:] == ["llm_pruner is broken", "No module named 'llm_pruner.checkpoints'"]
    assert last == "dense"


def test_what_goes_wrong_is_kept_from_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "holds_no_class.py").write_text("VALUE = 3")
    added: list[str] = []

    def fail(module: ModuleType) -> None:
        added.append(module.__name__)
        raise AttributeError("no such class")

    monkeypatch.setattr(hook, "_AWAITED", "holds_no_class")
    monkeypatch.setattr(hook, "_add_pruned_models", fail)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    hook.register()
    hook.register()  # a second time is nothing
    before = len(sys.meta_path)
    import holds_no_class  # type: ignore[import-not-found]

    assert holds_no_class.VALUE == 3
    assert added == ["holds_no_class"]
    assert len(sys.meta_path) == before - 1
    hook.register()  # what is there already
    assert added == ["holds_no_class"] * 2
    assert len(sys.meta_path) == before - 1


def test_other_code_stays_what_it_is() -> None:
    class Wrapper(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, encoder: str, config: LlamaConfig) -> None:
            super().__init__(config)
            self.encoder = encoder

    assert Wrapper("encoder", config=LlamaConfig()).encoder == "encoder"
