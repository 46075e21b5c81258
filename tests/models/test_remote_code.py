"""Checkpoints that bring Python code of their own: refused unless allowed, then pruned."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from command import contents, done, run
from homemade import CONFIGURATION, MODELLING, checkpoint
from llm_pruner.discovery.groups import discover
from llm_pruner.models.load import load_model
from llm_pruner.planning.plan import read_plan
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits
from llm_pruner.surgery.verify import largest_difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def homemade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from checkpoint(tmp_path_factory.mktemp("models"), MODELLING)


def test_refused_unless_allowed(
    homemade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("prune", homemade, "--out", "out", "--ratio", 0.2, "--criterion", "l2")
    assert result.code == 2
    assert (result.out, contents(tmp_path)) == ("", {})
    assert result.err == (
        f"llm-pruner: {homemade} brings Python code of its own, which runs only with "
        "--trust-remote-code; read the code before you allow it\n"
    )


WHOLE = ("--protect-first", 0, "--protect-last", 0)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (
            ("--unit-ratio", 0.5, "--structures", "ffn", *WHOLE),
            "stock",
            "loads with from_pretrained and trust_remote_code=True",
        ),
        (
            ("--unit-ratio", 0.4, "--structures", "heads,ffn", "--layers", "heads=1-2,ffn=0-2"),
            "remote_code",
            "loads with from_pretrained and trust_remote_code=True",
        ),
        (
            ("--ratio", 0.337, "--structures", "layers", *WHOLE),
            "stock",
            "loads with from_pretrained and trust_remote_code=True",
        ),
    ],
    ids=["equal layers", "layers that differ", "fewer layers"],
)
def test_pruned_saved_and_loaded(
    homemade: Path, tmp_path: Path, options: tuple[object, ...], kind: str, said: str
) -> None:
    out, report = tmp_path / "smaller", tmp_path / "report.json"
    shown = done(
        *("prune", homemade, "--out", out, "--trust-remote-code", "--criterion", "l2"),
        *("--json", report, *options),
    )
    assert said in " ".join(shown.out.split())
    found = json.loads(report.read_text())
    assert found["saved_as"] == kind
    assert "trust_remote_code=True" in found["needs"]
    assert found["twin_difference"] <= 1e-5
    # The code goes along, so that the folder stands alone.
    assert (out / "modeling_homemade.py").read_text() == MODELLING
    assert (out / "configuration_homemade.py").read_text() == CONFIGURATION

    dense = load_model(str(homemade), trust_remote_code=True).model
    discovery = discover(dense)
    expected = copy.deepcopy(dense)
    cut_(expected, discovery, read_plan(out / "plan.json").removal(discovery))
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (expected, loaded)]
    assert sizes[0] == sizes[1] == found["parameters_after"] < found["parameters_before"]
    for ours, theirs in zip(
        pruned_logits(expected, discovery), pruned_logits(loaded, discovery), strict=True
    ):
        # Weights that were read from a file lie elsewhere in memory, which moves the last bit.
        assert largest_difference([ours], [theirs]) <= 1e-5
    prompt = torch.tensor([[5, 9, 77, 120]])
    one, other = (
        model.eval().generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (expected, loaded)
    )
    assert torch.equal(one, other)
