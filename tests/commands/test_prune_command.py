"""From a saved model to a smaller saved model, through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llm_pruner.commands.demo
import llm_pruner.commands.forecast
import llm_pruner.commands.prune
import llm_pruner.files.outputs
import llm_pruner.models.checkpoint_files
import llm_pruner.surgery.pruner
import llm_pruner.surgery.verify
from command import contents, done, refused, run, save_tiny, write_text
from llm_pruner import discover, read_plan
from llm_pruner.evaluation.result_cache import shared_corpora
from llm_pruner.files.outputs import atomic_directory
from llm_pruner.report.data import read_report
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.cut import cut_
from llm_pruner.types import Discovery

pytestmark = pytest.mark.slow

TOKENS = torch.arange(3, 99).reshape(4, 24)
DENSE = 136_080
"""Parameters of the tiny model."""


def load(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def prune(tiny: Path, out: str, *options: object) -> dict[str, Any]:
    """Prune by l2 and unverified unless told otherwise, and return what ``--json`` says."""
    usual = () if "--criterion" in options or "--plan" in options else ("--criterion", "l2")
    usual += () if "--verify" in options else ("--no-verify",)
    return json.loads(done("prune", tiny, "--out", out, *usual, *options, "--json", "-").out)


def assert_same_weights(left: str, right: str) -> None:
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in (left, right))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def removed(folder: str) -> dict[str, str]:
    plan = json.loads((Path(folder) / "plan.json").read_text())
    return {group["name"]: group["removed"] for group in plan["groups"]}


@pytest.mark.parametrize(
    ("structures", "ratio"),
    [
        ("heads,ffn", 0.2),
        ("head_dim,ffn", 0.15),
        ("heads,query_heads,ffn,hidden,head_dim,layers", 0.4),
        ("layers,head_dim", 0.323),
    ],
)
def test_what_is_saved_is_what_was_pruned(
    work: Path, tiny: Path, structures: str, ratio: float
) -> None:
    found = prune(tiny, "out", "--ratio", ratio, "--structures", structures, "--verify")
    assert found["ratio"] == pytest.approx(ratio, abs=0.005)
    assert found["twin_difference"] <= 1e-5
    assert found["parameters_before"] == DENSE
    model = load("out")
    assert sum(p.numel() for p in model.parameters()) == found["parameters_after"]
    kinds = {name.rsplit(".", 1)[-1] for name in removed("out")}
    assert kinds - {"value_dim"} <= set(structures.split(","))
    assert kinds
    # The same surgery in memory gives the same numbers to the last bit.
    dense = load(tiny)
    discovery = discover(dense)
    cut_(dense, discovery, read_plan("out/plan.json").removal(discovery))
    assert torch.equal(logits(model), logits(dense))
    text = "the old bridge"
    ids = AutoTokenizer.from_pretrained("out")(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    assert found["bytes"] == sum(len(data or b"") for data in contents(Path("out")).values())


def test_equal_seeds_give_equal_bytes(work: Path, tiny: Path) -> None:
    write_text(Path("text.txt"))
    for source, order in (("self", "first"), ("text.txt", "mixed")):
        options = ("--ratio", 0.2, "--calibration", source, "--order", order)
        options += ("--samples", 6, "--seq-len", 24, "--criterion", "taylor", "--dry-run")
        for file, seed in (("a", 1), ("b", 1), ("c", 2)):
            prune(tiny, file, *options, "--seed", seed, "--overwrite")
        assert Path("a").read_bytes() == Path("b").read_bytes()
        first, other = (json.loads(Path(file).read_text()) for file in "ac")
        assert first["settings"]["calibration"] == source
        assert first["text"] != other["text"]
        assert first["settings"]["order"] == order


def test_a_dry_run_writes_the_plan_alone_and_the_plan_replays(work: Path, tiny: Path) -> None:
    options = ("--ratio", 0.2, "--criterion", "l1")
    shown = done("prune", tiny, "--out", "plan.json", *options, "--dry-run").out
    assert "plan written to plan.json; nothing was pruned" in shown
    assert list(contents(work)) == ["plan.json"]
    prune(tiny, "direct", *options)
    prune(tiny, "replayed", "--plan", "plan.json")
    plan = Path("plan.json").read_bytes()
    assert Path("direct/plan.json").read_bytes() == plan
    assert Path("replayed/plan.json").read_bytes() == plan
    assert_same_weights("direct", "replayed")


def test_what_a_replay_did_is_in_its_report(work: Path, tiny: Path) -> None:
    first, second = write_text(Path("first.txt"), 6000), write_text(Path("second.txt"), 7000)
    read = ("--samples", 16, "--seq-len", 16)
    done(
        "prune",
        tiny,
        "--out",
        "a",
        "--ratio",
        0.2,
        "--preset",
        "fast",
        "--calibration",
        first,
        *read,
    )
    done("prune", tiny, "--out", "cut", "--plan", "a/plan.json")
    report = read_report(Path("cut/report.json"))
    assert report.compensation is None
    assert report.settings["Importance"]["compensation"] == "none"
    refit = ("--compensation", "least-squares", "--calibration", second, "--samples", 12, *read[2:])
    done("prune", tiny, "--out", "refitted", "--plan", "a/plan.json", *refit)
    text = read_report(Path("refitted/report.json")).settings["Calibration text"]
    assert (text["calibration"], text["samples"]) == ("second.txt", 12)
    assert text["digest"] != report.settings["Calibration text"]["digest"]
    # Both texts were read on the way to this model.
    found = [warning.split(" and is")[0] for warning in shared_corpora("refitted", [first, second])]
    assert [one.split()[-1] for one in found] == ["first.txt", "second.txt"]
    # A request gives way to a plan that stands beside it.
    done("prune", "--config", "a/request.yaml", "--plan", "a/plan.json", "--out", "again")
    assert_same_weights("cut", "again")


def test_an_edited_plan_is_applied(work: Path, tiny: Path) -> None:
    prune(tiny, "plan.json", "--ratio", 0.2, "--dry-run")
    plan = json.loads(Path("plan.json").read_text())
    plan["groups"] = [
        {"name": "layers.2.ffn", "kind": "ffn", "size": 80, "removed": "7, 0-4"},
        {"name": "layers.4.heads", "kind": "heads", "size": 3, "removed": "1"},
    ]
    Path("plan.json").write_text(json.dumps(plan))
    prune(tiny, "out", "--plan", "plan.json")
    dense, pruned = (load_file(Path(f) / "model.safetensors") for f in (tiny, "out"))
    kept = [5, 6, *range(8, 80)]
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(pruned[name], dense[name][:, kept])
    name = "model.layers.4.self_attn.k_proj.weight"
    assert torch.equal(pruned[name], torch.cat([dense[name][:8], dense[name][16:]]))
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(pruned[name], dense[name])
    assert removed("out") == {"layers.2.ffn": "7, 0-4", "layers.4.heads": "1"}


def test_steps_meet_the_ratio_and_replay_in_one(work: Path, tiny: Path) -> None:
    write_text(Path("text.txt"))
    options = ("--criterion", "taylor", "--calibration", "text.txt", "--samples", 4)
    options += ("--seq-len", 24, "--ratio", 0.3, "--structures", "query_heads,ffn,hidden,layers")
    options += ("--split", "equal")
    found = prune(tiny, "stepwise", *options, "--steps", 3, "--verify")
    assert found["ratio"] == pytest.approx(0.3, abs=0.005)
    assert found["twin_difference"] <= 1e-5
    prune(tiny, "replayed", "--plan", "stepwise/plan.json")
    assert_same_weights("stepwise", "replayed")
    assert json.loads(Path("stepwise/plan.json").read_text())["settings"]["steps"] == 3
    # Later steps saw a pruned model, so the choice is another than in one step.
    prune(tiny, "at-once", *options, "--dry-run")
    at_once = {group.name: group.removed for group in read_plan("at-once").groups}
    assert at_once != removed("stepwise")


def planned(tiny: Path, *options: object) -> dict[int, dict[str, int]]:
    """Make a plan by l2 and return layer -> units kept, by short name of the group."""
    found = prune(tiny, "plan.json", *options, "--dry-run", "--overwrite")
    return {
        row["layer"]: {name: kept for name, (kept, _) in row["sizes"].items()}
        for row in found["layers"]
        if row["layer"] is not None
    }


def test_scope(work: Path, tiny: Path) -> None:
    pruned = range(1, 5)
    local = planned(tiny, "--ratio", 0.2)
    assert len({local[layer]["ffn"] for layer in pruned}) == 1
    ranked = planned(tiny, "--ratio", 0.2, "--scope", "global")
    assert len({ranked[layer]["ffn"] for layer in pruned}) > 1


def test_round_to_a_purpose(work: Path, tiny: Path) -> None:
    options = ("--ratio", 0.05, "--criterion", "l2", "--structures", "ffn", "--dry-run")
    found = prune(tiny, "plan.json", *options, "--round-to", "marlin")
    assert found["round_to"] == read_plan("plan.json").settings["round_to"] == 64
    said = refused("prune", tiny, "--out", "p.json", *options, "--round-to", "tp3")
    assert "layers.0.ffn has 80 units, which do not divide by 3" in said


def test_share_of_units_in_chosen_layers(work: Path, tiny: Path) -> None:
    sizes = planned(tiny, "--unit-ratio", 0.34, "--layers", "heads=1-2,ffn=3-4")
    assert [sizes[layer]["heads"] for layer in range(6)] == [3, 2, 2, 3, 3, 3]
    # floor(80 * 0.34) = 27
    assert [sizes[layer]["ffn"] for layer in range(6)] == [80, 80, 80, 53, 53, 80]


def test_equal_layers_are_saved_as_a_plain_checkpoint(work: Path, tiny: Path) -> None:
    whole = ("--protect-first", 0, "--protect-last", 0)
    options = ("--unit-ratio", 0.5, "--structures", "ffn", "--criterion", "l2", *whole)
    shown = done("prune", tiny, "--out", "out", *options)
    assert "loads with from_pretrained" in shown.out
    assert " 0-5     40 of 80" in shown.out
    config = json.loads(Path("out/config.json").read_text())
    assert config["intermediate_size"] == 40
    assert "quantization_config" not in config


def test_what_is_printed(work: Path, tiny: Path) -> None:
    result = done("prune", tiny, "--out", "out", "--ratio", 0.2, "--criterion", "l2")
    assert max(map(len, result.out.splitlines())) <= 80
    assert "\x1b" not in result.out
    assert result.err == ""
    rows = [line.split() for line in result.out.splitlines()]
    assert ["layer", "heads", "query_heads", "ffn"] in rows
    assert any(row[:1] == ["1-4"] and row[1:4] == ["2", "of", "3"] for row in rows)
    said = " ".join(result.out.split())
    assert "loads with from_pretrained and trust_remote_code=True" in said
    assert "tiny: 136.1K -> 109.0K parameters (19.9% removed)" in result.out
    assert "equal to its masked twin: largest difference " in result.out
    quiet = ("--ratio", 0.2, "--criterion", "l2", "--no-verify", "--overwrite")
    printed = done("prune", tiny, "--out", "out", *quiet).out
    assert "not compared with its masked twin" in printed


def test_pruned_models_can_be_pruned_and_evaluated_again(work: Path, tiny: Path) -> None:
    first = prune(tiny, "first", "--ratio", 0.2)
    second = prune("first", "second", "--ratio", 0.1)
    assert second["parameters_before"] == first["parameters_after"]
    assert second["ratio"] == pytest.approx(0.1, abs=0.005)
    found = json.loads(
        done("evaluate", "second", "--perplexity", "demo", "--max-tokens", 1024, "--json", "-").out
    )
    assert found["parameters"] == second["parameters_after"]
    assert found["perplexity"][0]["perplexity"] > 1


def test_overwrite_replaces_only_at_the_end(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(Path("out"), overwrite=False) as out:
        (out / "earlier").write_text("earlier")
    before = contents(work)
    options = ("prune", tiny, "--out", "out", "--ratio", 0.2, "--criterion", "l2", "--overwrite")
    options += ("--no-verify",)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", _raising(OSError("no space left")))
        failed = run(*options)
    assert failed.code == 1
    assert failed.err == ("llm-pruner: no space left\n")
    assert contents(work) == before
    done(*options)
    assert "earlier" not in contents(Path("out"))
    assert set(contents(work)) == {"out", *(f"out/{name}" for name in contents(Path("out")))}


def _raising(error: BaseException) -> Any:
    """Return a ``save_pretrained`` that raises once it has written everything."""
    save_pretrained = PreTrainedModel.save_pretrained

    def save(self: PreTrainedModel, *args: Any, **settings: Any) -> None:
        save_pretrained(self, *args, **settings)
        raise error

    return save


def test_a_plan_that_took_long_outlives_what_fails_after_it(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    asked = ("prune", tiny, "--out", "small", "--ratio", 0.2, "--criterion", "l2", "--no-verify")
    with monkeypatch.context() as patch:
        patch.setattr(llm_pruner.commands.prune, "save", full)
        assert run(*asked).code == 1
        assert not Path("small.plan.json").exists()  # it took seconds
        patch.setattr(llm_pruner.commands.prune, "KEPT_AFTER", 0.0)
        assert run(*asked).code == 1
    assert not Path("small").exists()
    done("prune", tiny, "--out", "small", "--plan", "small.plan.json")
    assert read_plan(Path("small/plan.json")).groups == read_plan(Path("small.plan.json")).groups


def test_surgery_that_goes_wrong_names_the_group_and_saves_nothing(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(model: Any, discovery: Any, removal: Any, *undo: Any) -> Any:
        edits = cut_(model, discovery, removal, *undo)
        if "layers.2.ffn" in removal:
            weight = model.model.layers[2].mlp.down_proj.weight
            weight.data = weight.data.roll(1, dims=1)
        return edits

    monkeypatch.setattr(llm_pruner.surgery.verify, "cut_", sabotaged)
    options = ("--ratio", 0.2, "--criterion", "l2", "--structures", "ffn")
    result = run("prune", tiny, "--out", "out", *options)
    assert result.code == 1
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert "the pruned model differs from its masked twin by" in result.err
    assert "; at fault: ffn; nothing was saved." in result.err
    assert contents(work) == {}


def test_a_folder_that_does_not_load_as_it_was_saved_is_not_kept(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained = PreTrainedModel.save_pretrained

    def save(self: PreTrainedModel, *args: Any, **settings: Any) -> None:
        weight = self.model.layers[0].mlp.down_proj.weight
        kept = weight.data
        weight.data = kept + 1
        save_pretrained(self, *args, **settings)
        weight.data = kept

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    result = run("prune", tiny, "--out", "out", "--ratio", 0.2, "--criterion", "l2")
    assert result.code == 1
    assert "the saved folder gives logits that differ by" in result.err
    assert contents(work) == {}


@pytest.fixture
def quick(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a demo of seconds: of a tiny model, with little text."""
    tiny = save_tiny(work.parent / "sharp", initializer_range=0.2)
    monkeypatch.setattr(llm_pruner.models.checkpoint_files, "default_gguf", lambda: tiny)
    whole = llm_pruner.commands.demo.settings_of

    def few(out: Path, *, overwrite: bool) -> PruneSettings:
        changes = {"preset": "fast", "samples": 8, "seq_len": 24, "repair_minutes": 0.05}
        return whole(out, overwrite=overwrite).but(**changes)

    monkeypatch.setattr(llm_pruner.commands.demo, "settings_of", few)


def test_demo(work: Path, quick: None) -> None:
    result = done("demo", "--json", "found.json")
    assert max(map(len, result.out.splitlines())) <= 80
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[0].startswith("dense: 136.1K parameters, perplexity ")
    for row in ("parameters", "size in float32", "decoding, tokens/s", "KL from dense"):
        assert any(line.startswith(row) for line in lines)
    assert any(line.startswith("Asked: What is the capital") for line in lines)
    assert "llm-pruner prune MODEL --out small" in lines[-1]
    found = json.loads(Path("found.json").read_text())
    assert found["pruned"]["path"] == "demo-out"
    assert list(found["measured"]) == ["dense", "pruned", "repaired"]
    assert found["measured"]["dense"]["parameters"] == DENSE
    size = load("demo-out").num_parameters()
    assert found["measured"]["repaired"]["parameters"] == size < DENSE
    report = read_report(Path("demo-out/report.json"))
    assert report.command == "llm-pruner demo --json found.json"
    assert {"dense", "pruned"} <= report.evaluations.keys()


def test_demo_replaces_its_own_folder_and_no_other(work: Path, tiny: Path, quick: None) -> None:
    with atomic_directory(Path("demo-out"), overwrite=False) as earlier:
        (earlier / "plan.json").write_text("earlier")
    done("demo")
    assert read_plan("demo-out/plan.json").model.name == "sharp"
    refusal = "exists and is not empty, so nothing was written; choose another folder or pass"
    other = run("demo", "--out", tiny)
    assert (other.code, refusal in other.err) == (2, True)
    Path("demo-out/plan.json").unlink()
    mine = run("demo")
    assert (mine.code, f"demo-out {refusal}" in mine.err) == (2, True)


def test_a_structure_that_nobody_named_and_that_cannot_go_is_left_out(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def frozen(model: Any) -> Discovery:
        found = discover(model)
        stay = {"heads": "the code cuts it", "query_heads": "as well"}
        groups = (replace(one, frozen=stay.get(one.kind)) for one in found.groups)
        return replace(found, groups=tuple(groups))

    monkeypatch.setattr(llm_pruner.commands.prune, "discover", frozen)
    write_text(Path("text.txt"), 6000)
    asked = ("prune", tiny, "--ratio", 0.1, "--calibration", "text.txt", "--preset", "fast")
    done(*asked, "--samples", 16, "--seq-len", 16, "--out", "out")
    said = "all heads of this model stay: heads cannot be pruned in this model: the code cuts it"
    assert said in caplog.text
    plan = read_plan(Path("out/plan.json"))
    assert {group.kind for group in plan.groups} == {"ffn"}
    named = refused(*asked, "--structures", "heads,ffn", "--out", "other")
    assert "heads cannot be pruned in this model: the code cuts it; leave heads out" in named
