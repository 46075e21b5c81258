"""Code of checkpoints that was written for an earlier transformers: completed, then pruned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command import done, save_tiny
from helpers import modules_of_checkpoints_in
from homemade import MODELLING, checkpoint
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from new_processes import run_new

pytestmark = pytest.mark.slow

OLDER = (
    MODELLING.replace(
        "        self.post_init()",
        """        factors = torch.linspace(0.5, 1.5, 9)
        self.register_buffer("factors", factors, persistent=False)
        self.late = torch.arange(3) / 7
        self.register_buffer("unset", torch.empty(2), persistent=False)
        self.post_init()
        del config.older

    def _init_weights(self, module):
        if module is self:
            nn.init.constant_(self.unset, 3.0)""",
    )
    .replace("    _no_split", '    _tied_weights_keys = ["head.weight"]\n    _no_split')
    .replace("self.embed(input_ids)\n", "self.embed(input_ids) * self.factors[7] * self.late[2]\n")
)
"""As for transformers before version 5: buffers are computed once, and a value is taken out."""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from checkpoint(tmp_path_factory.mktemp("models"), OLDER)


def test_code_for_an_earlier_transformers_is_completed(older: Path) -> None:
    model: Any = load_model(str(older), trust_remote_code=True).model
    assert torch.equal(model.factors, torch.linspace(0.5, 1.5, 9))
    assert torch.equal(model.late, torch.arange(3) / 7)
    assert model.unset.tolist() == [3, 3]
    assert model.config.older


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (
            ("--unit-ratio", 0.5, "--structures", "ffn", "--protect-first", 0, "--protect-last", 0),
            "stock",
        ),
        (("--unit-ratio", 0.4, "--structures", "ffn", "--layers", "ffn=0-2"), "remote_code"),
    ],
)
def test_it_is_pruned(older: Path, tmp_path: Path, options: tuple[object, ...], kind: str) -> None:
    out, report = tmp_path / "smaller", tmp_path / "report.json"
    trusted = ("--trust-remote-code", "--criterion", "l2")
    done("prune", older, "--out", out, "--json", report, *trusted, *options)
    assert json.loads(report.read_text())["saved_as"] == kind
    model: Any = load_model(str(out), trust_remote_code=True).model
    assert torch.equal(model.factors, torch.linspace(0.5, 1.5, 9))


def test_code_that_does_not_run_says_so(older: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(older, folder)
    file = folder / "modeling_homemade.py"
    file.write_text(file.read_text().replace("self.post_init()", "self.gone()"))
    with pytest.raises(UserError, match=r"brings code that does not run here, .*'gone'"):
        load_model(str(folder), trust_remote_code=True)


ALONE = """
import sys
sys.modules["llm_pruner"] = None
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE, folder, again, said = sys.argv[1:]
sys.path.insert(0, sys.argv[1])  # before that of the process that started this one
for place in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.arange(3, 35).view(2, 16)).logits
    assert torch.equal(logits, torch.load(said, weights_only=True)), place
    model.save_pretrained(again)
"""


def test_without_the_package_and_pruned_again(older: Path, tmp_path: Path) -> None:
    def prune(dense: Path, name: str, structures: str, layers: str) -> Any:
        which = ("--structures", structures, "--layers", f"{structures}={layers}")
        ends = ("--protect-first", 0, "--protect-last", 0)
        size = ("--unit-ratio", 0.4, "--scope", "local", "--criterion", "l2")
        done("prune", dense, "--out", tmp_path / name, "--trust-remote-code", *which, *ends, *size)
        return load_model(str(tmp_path / name), trust_remote_code=True).model

    def config(folder: str) -> dict[str, Any]:
        return json.loads((tmp_path / folder / "config.json").read_text())

    model = prune(older, "once", "ffn", "0-2")
    with torch.no_grad():
        torch.save(model(torch.arange(3, 35).view(2, 16)).logits, tmp_path / "logits.pt")
    places = ("modules", "once", "again", "logits.pt")
    run_new(ALONE, *(tmp_path / name for name in places), said=tmp_path / "said.txt")
    prune(tmp_path / "once", "twice", "heads", "1")
    for name in ("again", "twice"):
        assert config(name)["older"]
        assert config(name)["auto_map"] == {
            "AutoConfig": "configuration_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_pruned.PrunedHomemadeForCausalLM",
        }
    for name in ("modeling_homemade.py", "configuration_homemade.py"):
        assert (tmp_path / "twice" / name).read_text() == (older / name).read_text()
    # Once the last layer is like the others, it is plain again.
    model = prune(tmp_path / "once", "plain", "ffn", "3")
    assert torch.equal(model.factors, torch.linspace(0.5, 1.5, 9))
    home = "modeling_homemade.HomemadeForCausalLM"
    assert config("plain")["auto_map"]["AutoModelForCausalLM"] == home
    assert not (tmp_path / "plain" / "modeling_pruned.py").exists()


SCALED = """
from transformers import LlamaForCausalLM


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **named):
        out = super().forward(*args, **named)
        out.logits = out.logits / 2
        return out
"""


def test_code_on_a_config_of_transformers_is_not_taken_for_the_model_of_that(
    tmp_path: Path,
) -> None:
    dense, out, report = (tmp_path / name for name in ("dense", "out", "report.json"))
    save_tiny(dense)
    (dense / "modeling_scaled.py").write_text(SCALED)
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_scaled.Scaled"}
    (dense / "config.json").write_text(json.dumps(config))
    options = ("--structures", "ffn", "--layers", "ffn=0", "--unit-ratio", 0.4, "--criterion", "l2")
    with modules_of_checkpoints_in(tmp_path / "modules"):
        trusted = ("--trust-remote-code", "--protect-first", 0, "--json", report)
        done("prune", dense, "--out", out, *trusted, *options)
        assert json.loads(report.read_text())["saved_as"] == "recipe"
        assert type(load_model(str(out), trust_remote_code=True).model).__name__ == "Scaled"
