"""The command line: what it refuses and how, help, tables, JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command

from command import done, refused, run, save_tiny, write_text
from helpers import tiny_tokenizer
from llm_pruner.cli import app
from llm_pruner.commands.evaluate import measure
from llm_pruner.data.calibration import build_calibration
from llm_pruner.report.text import clean, count, megabytes
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.settings.evaluate import EvaluateSettings
from llm_pruner.version import __version__

pytestmark = pytest.mark.slow

COMMANDS = sorted(get_command(app).commands)


@pytest.fixture(scope="module")
def plan(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A sound plan for the tiny model."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    done("prune", tiny, "--out", file, "--ratio", 0.2, "--criterion", "l2", "--dry-run")
    return json.loads(file.read_text())


def copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


# What can be refused without the model.


def test_an_unknown_dataset_is_named_with_what_was_tried(
    work: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: object, **settings: object) -> None:
        raise FileNotFoundError("Dataset 'no-such-text' doesn't exist on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = ("--out", "out", "--ratio", 0.2, "--calibration", "no-such-text")
    said = refused("prune", "any/model", *options)
    assert said.startswith("dataset 'no-such-text': tried hub dataset no-such-text, split train")
    assert "check the name and the network, or give a local .txt, .jsonl" in said
    assert refused("evaluate", "any/model", "--perplexity", "no-such-text").startswith(
        "dataset 'no-such-text': tried hub dataset no-such-text, split test"
    )


def test_empty_calibration_files(work: Path, unloaded: None) -> None:
    options = ("--out", "out", "--ratio", 0.2, "--calibration")
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n")
    said = refused("prune", "any/model", *options, "empty.txt")
    assert said == "empty.txt holds no text; give a file or dataset with text in it"
    said = refused("prune", "any/model", *options, "blank.txt")
    assert said == "blank.txt holds no text; give a file or dataset with text in it"


def test_out_is_never_the_model(work: Path, tiny: Path, unloaded: None) -> None:
    model = copy(tiny, work / "model")
    said = refused("prune", model, "--out", "model", "--ratio", 0.2, "--overwrite")
    assert said.startswith("model is not replaced, since this command reads ")


def test_a_plan_that_is_no_plan(work: Path, unloaded: None) -> None:
    Path("plan.json").write_text("{")
    said = refused("prune", "any/model", "--out", "out", "--plan", "plan.json")
    assert said.startswith("plan plan.json cannot be read (Expecting property name enclosed in")


def test_a_plan_with_wrong_fields_names_each(
    work: Path, unloaded: None, plan: dict[str, object]
) -> None:
    broken = plan | {"format_version": 7, "colour": "red"}
    Path("plan.json").write_text(json.dumps(broken))
    said = refused("prune", "any/model", "--out", "out", "--plan", "plan.json", lines=3)
    assert said.splitlines()[0] == "2 problems in the plan"
    assert "  - format_version: Input should be 2" in said
    assert "  - colour: Extra inputs are not permitted" in said


def test_a_plan_and_an_amount(work: Path, unloaded: None) -> None:
    asked = ("prune", "any/model", "--out", "out", "--plan", "absent.json")
    said = refused(*asked, "--ratio", 0.2)
    assert said == "--ratio and --plan say different things; give one of them"
    said = refused(*asked)
    assert said.startswith("plan absent.json cannot be read (")


# Models that cannot be read.


def test_a_folder_without_config_weights_or_tokenizer(work: Path, tiny: Path) -> None:
    options = ("--out", "out", "--ratio", 0.2)
    for file, said in (
        ("config.json", "no-config.json has no config.json, so it is no checkpoint; name a folder"),
        ("model.safetensors", "no-model.safetensors has no weights (model.safetensors or model"),
        (
            "tokenizer.json",
            "no-tokenizer.json has no tokenizer (no tokenizer.json or the like), so",
        ),
    ):
        model = copy(tiny, work / f"no-{file}")
        (model / file).unlink()
        if file == "tokenizer.json":
            (model / "tokenizer_config.json").unlink()
        assert refused("prune", model.name, *options).startswith(said)
    shutil.rmtree(work / "no-config.json")
    assert refused("prune", "./nothing", *options) == (
        "./nothing does not exist; name a folder with config.json and safetensors, a .gguf file, "
        "a hub id, or 'default'"
    )


def test_truncated_weights(work: Path, tiny: Path) -> None:
    weights = copy(tiny, work / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = refused("prune", "cut", "--out", "out", "--ratio", 0.2)
    assert said.startswith("cut/model.safetensors is ")
    assert said.endswith("; copy or download it again")


# Refused with the model at hand.


def test_ratios_out_of_reach_name_the_nearest(work: Path, tiny: Path) -> None:
    options = ("prune", tiny, "--out", "out", "--criterion", "l2", "--ratio")
    assert refused(*options, 0.9) == (
        "ratio=0.9 cannot be reached: pruning heads, ffn to the last unit leaves "
        "72,144 parameters, ratio 0.4698; ask for less, protect fewer layers or add structures"
    )
    assert refused(*options, 0.3, "--structures", "layers") == (
        "ratio=0.3 cannot be reached within 0.5 points by pruning layers; the nearest that can: "
        "99,024 parameters, ratio 0.2723 (less) and 80,496 parameters, ratio 0.4085 (more); "
        "ask for one of these or add structures"
    )
    few = ("prune", tiny, "--out", "out", "--criterion", "l2", "--unit-ratio", 0.25)
    said = refused(*few, "--structures", "heads")
    assert said == (
        "unit_ratio=0.25 removes 0 of 3 heads in layers.1.heads; use at least 0.334, or leave "
        "heads out"
    )
    said = refused("prune", tiny, "--out", "out", "--params", "1M")
    assert said.startswith("params=1,000,000 is not below the 136,080 parameters of the model")


def test_an_unreachable_ratio_is_refused_before_text_is_written(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm_pruner.data.calibration

    def build_calibration(*args: object, **settings: object) -> None:
        raise AssertionError("the model wrote text")

    monkeypatch.setattr(llm_pruner.data.calibration, "build_calibration", build_calibration)
    assert "cannot be reached" in refused("prune", tiny, "--out", "out", "--ratio", 0.9)


def test_structures_that_the_model_lacks_and_layers_that_it_lacks(work: Path, tiny: Path) -> None:
    options = ("prune", tiny, "--out", "out", "--criterion", "l2", "--ratio", 0.2)
    said = refused(*options, "--structures", "experts")
    assert said == (
        "this model has no experts to prune; it has hidden, head_dim, heads, query_heads, ffn, "
        "layers (llm-pruner inspect lists what is frozen, and why)"
    )
    said = refused("inspect", tiny, "--layer", 6)
    assert said == "--layer 6: the model has layers 0 to 5"


def test_calibration_text_that_is_too_short(work: Path, tiny: Path) -> None:
    write_text(Path("short.txt"), characters=100)
    options = ("--ratio", 0.2, "--calibration", "short.txt", "--samples", 10, "--seq-len", 32)
    assert refused("prune", tiny, "--out", "out", *options) == (
        "short.txt gives 100 tokens; 10 samples of 32 tokens need 320; "
        "use a longer text, or fewer --samples or a smaller seq_len"
    )
    assert refused("evaluate", tiny, "--perplexity", "short.txt", "--seq-len", 512).startswith(
        "short.txt"
    )


def test_a_loss_that_is_not_finite_names_the_sample(work: Path, tiny: Path) -> None:
    model = copy(tiny, work / "broken")
    weights = load_file(model / "model.safetensors")
    # Infinite for one letter alone, which one sample holds.
    letter = 3 + ord("q") - ord("!")
    weights["model.embed_tokens.weight"][letter] = torch.inf
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    text = write_text(Path("text.txt"), characters=8 * 64 + 1).read_text()
    Path("text.txt").write_text(f"{text[:170]}q{text[171:]}")
    asked = CalibrationSettings(calibration="text.txt", samples=8, seq_len=64)
    samples = build_calibration(asked, tiny_tokenizer(), seed=3)
    number = int((samples.input_ids == letter).any(1).nonzero())
    options = ("--ratio", 0.2, "--calibration", "text.txt", "--samples", 8, "--seq-len", 64)
    for extra in ((), ("--criterion", "taylor", "--order", "mixed")):
        said = refused(
            *("prune", "broken", "--out", "out", "--seed", 3, *options, *extra),
        )
        assert said == (
            f"the loss of calibration sample {number} is nan, so nothing can be scored; look at "
            "this sample, or load the model in float32"
        )


def test_infinite_weights_are_refused_by_every_criterion(work: Path, tiny: Path) -> None:
    model = copy(tiny, work / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = ("prune", "broken", "--out", "out", "--ratio", 0.2, "--criterion")
    said = refused(*options, "l2")
    assert said.startswith("the weights of model.layers.2.mlp.down_proj.weight are not finite")
    said = refused(*options, "taylor", "--samples", 4, "--seq-len", 16)
    assert said.startswith("the model's logits are not finite while it writes calibration text")


# Plans that do not fit.


def test_a_plan_for_another_model(
    work: Path, tmp_path: Path, tiny: Path, plan: dict[str, object]
) -> None:
    Path("plan.json").write_text(json.dumps(plan))
    other = save_tiny(tmp_path / "other", intermediate_size=64)
    said = refused("prune", other, "--out", "out", "--plan", "plan.json", lines=10)
    assert said.splitlines()[0].endswith("problems in the plan")
    assert "- made for another model: tiny has 136,080 parameters, this one 122,256" in said
    assert "- layers.2.ffn: has 64 units, the plan says 80" in said


# Usage.


def test_help_is_plain_and_fits_in_80_columns() -> None:
    for args in ([], *([command] for command in COMMANDS)):
        shown = done(*args, "--help").out
        assert max(map(len, shown.splitlines())) <= 80
        assert shown.isascii()
        assert not args or "..." not in shown.replace("[ARGS]...", "").replace("{DIR}...", "")
    prune = done("prune", "-h").out
    headings = [line for line in prune.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[:2] == ["Arguments:", "How much (one of these):"]
    assert "\n    llm-pruner prune default --out small --ratio 0.2\n" in prune


def test_a_gpu_that_is_full_is_said_in_one_line(
    work: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")

    monkeypatch.setattr("llm_pruner.commands.inspect.inspect_model", full)
    result = run("inspect", tiny)
    assert result.code == 1
    assert result.err.startswith("llm-pruner: the memory of the GPU is full; free some, or use")
    assert result.err.count("\n") == 1


def test_slips_of_the_pen_exit_with_2_and_a_hint() -> None:
    for args, said in (
        (["prun"], "No such command 'prun'. Did you mean 'prune'?"),
        (["prune", "x", "--rato", "0.2"], "No such option: --rato"),
        (["prune", "x", "--ratio", "much", "--out", "y"], "--ratio much should be a valid number"),
        (["prune", "x"], "no --out given; add --out DIR"),
        (["inspect"], "no MODEL given; name one"),
        (["prune"], "no MODEL and no --out given; name one and add --out DIR"),
    ):
        result = run(*args)
        assert result.code == 2
        assert result.out == ""
        assert said in result.err
        assert result.err.isascii()
    assert run().code == 2
    assert "Commands:" in run().out + run().err


def test_the_version() -> None:
    result = done("--version")
    assert (result.out, result.err) == (f"llm-pruner {__version__}\n", "")


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; sys.argv = ['llm-pruner', 'prune', '--help']\n"
        "from llm_pruner.cli import main\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("set()\n")


# What is printed.


def test_inspect_table_fits_and_says_what_follows(work: Path, tiny: Path) -> None:
    shown = done("inspect", tiny).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "\x1b" not in shown
    assert shown.startswith("tiny: 136.1K parameters\nLayer 3 of 6\n")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "layers.3.ffn 80 gate_proj.weight[0] x1 8.47%" in lines
    assert "down_proj.weight[1] x1" in lines
    assert "layers.3.value_dim 8, with head_dim v_proj.weight[0] x3 2.54%" in lines
    assert "value_dim 6 follows head_dim 15.2%" in lines
    assert "ffn 6 480 50.8%" in lines
    assert any(line.startswith("the vocabulary 2 model.embed_tokens.weight[0]") for line in lines)
    assert "Layer 0 of 6" in done("inspect", tiny, "--layer", 0).out


def test_inspect_json(work: Path, tiny: Path) -> None:
    done("inspect", tiny, "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert " ".join(found) == (
        "format_version model parameters tokens embeddings kinds groups frozen"
    )
    assert found["parameters"] == 136_080
    ffn = next(group for group in found["groups"] if group["name"] == "layers.3.ffn")
    # Three matrices of 80 x 48.
    assert ffn["parameters"] == 3 * 80 * 48
    assert ffn["share"] == pytest.approx(3 * 80 * 48 / 136_080)
    assert ffn["kind"] == "ffn"
    assert ffn["units"] == 80
    assert ffn["frozen"] is None
    assert [member["dim"] for member in ffn["members"]] == [0, 0, 1]
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    assert kinds["ffn"]["parameters"] == 6 * 3 * 80 * 48
    assert kinds["hidden"]["share"] == 1
    # Queries (48 x 48) and keys (24 x 48) of six layers.
    assert kinds["head_dim"]["parameters"] == 6 * 72 * 48
    frozen = found["frozen"][0]
    assert (frozen["tensor"], frozen["dim"]) == ("model.embed_tokens.weight", 0)
    assert frozen["reason"] == "the vocabulary"


def test_json_alone_on_stdout(work: Path, tiny: Path) -> None:
    prune = ("prune", tiny, "--out", "out", "--ratio", 0.2, "--criterion", "l2", "--no-verify")
    evaluate = ("evaluate", tiny, "--perplexity", "demo", "--max-tokens", 600)
    for args in (("inspect", tiny), evaluate, prune):
        result = done(*args, "--json", "-")
        assert isinstance(json.loads(result.out), dict)
        assert result.err == ""


def test_evaluate_reads_block_by_block_what_does_not_fit(
    work: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(Path("text.txt"))
    how = ("evaluate", tiny, "--perplexity", "text.txt", "--seq-len", 100, "--against", tiny)
    said = [json.loads(done(*how, *room, "--json", "-").out) for room in ((), ("--memory", "1KB"))]
    assert said[0]["perplexity"] == said[1]["perplexity"]
    assert "they are read block by block" in caplog.text
    assert "each token that is written" not in caplog.text
    done("evaluate", tiny, "--speed", "--memory", "1KB")
    assert "the speed of tiny is not measured: its weights are read block by block" in caplog.text


def test_a_model_that_reads_too_little_is_not_timed(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(work / "short", num_hidden_layers=1, max_position_embeddings=95)
    assert measure(EvaluateSettings(model="short", speed=True)).speed is None
    assert "the speed of short is not measured: it reads 95 tokens" in caplog.text


def test_evaluate_says_what_was_measured(work: Path, tiny: Path) -> None:
    write_text(Path("text.txt"))
    options = ("--perplexity", "text.txt", "--seq-len", 100, "--prompt", "the old")
    shown = done("evaluate", tiny, *options, "--speed", "--json", "found.json").out
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "corpus split protocol window tokens perplexity bits per byte" in lines
    row = next(line for line in lines if line.startswith("text.txt")).split()
    # 2,000 bytes make 20 windows that predict 99 tokens each.
    assert row[1:5] == ["-", "standard", "100", "1,980"]
    found = json.loads(Path("found.json").read_text())
    result = found["perplexity"][0]
    assert row[5] == f"{result['perplexity']:.2f}"
    assert row[-1] == f"{result['bits_per_byte']:.4f}"
    assert (result["corpus"], result["tokens"], result["window"]) == ("text.txt", 1980, 100)
    assert found["speed"]["decode_tokens_per_second"] > 0
    assert list(found["samples"]) == ["the old"]
    assert any(line.startswith("> the old") for line in lines)
    paper = done("evaluate", tiny, "--perplexity", "text.txt", "--protocol", "paper").out
    assert " paper 128 1,905 " in " ".join(paper.split())


def test_names_cannot_steer_the_output(work: Path, tiny: Path) -> None:
    model, shown = copy(tiny, work / "a\x1b[31mb"), "a\N{REPLACEMENT CHARACTER}[31mb"
    options = ("--ratio", 0.2, "--criterion", "l1", "--dry-run")
    planned = done("prune", model, "--out", "plan", *options)
    assert f"{shown}: 136.1K -> " in planned.out
    (model / "config.json").unlink()
    failed = run("inspect", model)
    assert "\x1b" not in planned.out + failed.err
    assert shown in failed.err


def test_numbers_and_texts() -> None:
    assert [count(n) for n in (999, 136_080, 134_515_008, 6_740_000_000)] == [
        "999",
        "136.1K",
        "134.5M",
        "6.74B",
    ]
    assert megabytes(1_234_567_890) == "1,234.6 MB"
    assert clean("a\tb\x07\nc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}\nc"
