"""``llm-pruner recover``: what it saves, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from command import WORDS, done, interrupt, refused, run, save_tiny, write_text
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands import recover as recovering
from llm_pruner.commands import recover_start, workdir
from llm_pruner.data.examples import Example, Examples
from llm_pruner.data.training import split_samples
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from llm_pruner.recovery.trainer import RecoveryTrainer
from llm_pruner.report.data import read_report
from llm_pruner.runtime import precision
from llm_pruner.runtime.processes import ALONE
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.version import __version__
from new_processes import run_new
from trained_tokenizers import with_bytes

pytestmark = pytest.mark.slow

QUICK = ("--seq-len", 64, "--batch-size", 8, "--trainer", "max_steps=4", "--evaluations", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, one pruned to layers of different sizes, and data."""
    folder = tmp_path_factory.mktemp("recover")
    save_tiny(folder / "dense", num_hidden_layers=4)
    options = ("--structures", "ffn", "--layers", "ffn=1-2", "--no-verify", "--criterion", "l2")
    done("prune", folder / "dense", "--out", folder / "small", "--ratio", 0.1, *options)
    rows = [{"instruction": WORDS[n:20], "output": WORDS[n:] + WORDS} for n in range(15)]
    rows += [{"instruction": WORDS[:n], "output": WORDS[::-1]} for n in range(1, 46)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_layers_that_differ_are_saved_as_they_came(work: Path, made: Path) -> None:
    small = made / "small"
    shown = done(
        *("recover", small, "--out", "better", "--data", made / "rows.jsonl", *QUICK),
        *("--perplexity", "demo", "--perplexity-seq-len", 512, "--json", "result.json"),
    )
    result = json.loads(Path("result.json").read_text())
    assert result["gained"]
    assert result["saved_as"] == "remote_code"
    assert result["loss"]["after"] < result["loss"]["before"]
    assert sorted(path.name for path in work.iterdir()) == ["better", "result.json"]
    assert Path("better/plan.json").read_bytes() == (small / "plan.json").read_bytes()
    assert json.loads(Path("better/config.json").read_text()) == json.loads(
        (small / "config.json").read_text()
    )
    before, after = (load_file(path / "model.safetensors") for path in (small, Path("better")))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    # The figures are those of the folder, loaded by nothing but transformers and the package.
    code = (
        "import llm_pruner, torch, sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained('better')\n"
        "print(m(input_ids=torch.arange(3, 40)[None]).logits.double().square().sum().item())"
    )
    printed = run_new(code, said=work / "said.txt").splitlines()[-1]
    logits = load_model("better").model(input_ids=torch.arange(3, 40)[None]).logits
    assert float(printed) == pytest.approx(logits.double().square().sum().item())
    # Its report carries on that of the pruned model.
    report = read_report(Path("better/report.json"))
    assert report.final == "recovered"
    assert list(report.sizes) == ["dense", "pruned", "recovered"]
    assert report.layers
    assert report.recovery is not None
    assert [one.step for one in report.recovery.loss] == [0, 1, 2, 3, 4]
    assert [one.validation is None for one in report.recovery.loss] == [False, True] * 2 + [False]
    before, after = (report.evaluations[name].of("perplexity")[0] for name in report.evaluations)
    assert (before.value, after.value) == tuple(
        result["perplexity"][0][name]["perplexity"] for name in ("before", "after")
    )
    assert report.command is not None
    assert [part.split()[1] for part in report.command.split(" && ")] == ["prune", "recover"]
    page = Path("better/report.html").read_text()
    assert "Then it was recovered by LoRA of rank 8 on 57 samples of rows.jsonl, 4" in page
    assert "Loss of the recovery training by step" in page
    assert result["report"] == "better/report.html"
    record = json.loads(Path("better/recovery.json").read_text())
    assert record["settings"]["method"] == "lora"
    assert record["sources"] == result["sources"]
    # What is printed.
    assert max(map(len, shown.out.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert lines[0].startswith("small: 4 steps, ")
    assert any(line.startswith("rows.jsonl held out, 3 samples ") for line in lines)
    assert any(line.startswith("demo text windows of 512 11,242 ") for line in lines)
    assert "loads with from_pretrained and trust_remote_code=True" in lines
    assert [line.split(",")[0] for line in shown.err.splitlines()] == [
        "step 2 of 4: loss " + shown.err.split("loss ")[1].split(",")[0],
        "step 4 of 4: loss " + shown.err.split("loss ")[2].split(",")[0],
    ]


def test_the_adapter_and_the_teacher(work: Path, made: Path) -> None:
    dense, small = made / "dense", made / "small"
    options = ("--data", made / "rows.jsonl", "--teacher", dense, "--teacher-cache", "cache")
    result = done(
        *("recover", small, "--out", "better", *options, *QUICK, "--keep-adapter", "--json", "-")
    )
    assert json.loads(result.out)["gained"]
    assert result.err == ""
    assert len(list(Path("cache").glob("*/ids.bin"))) == 2  # to train on, and held out
    assert json.loads(Path("better/adapter/adapter_config.json").read_text())["task_type"] == (
        "CAUSAL_LM"
    )
    adapted = PeftModel.from_pretrained(load_model(str(small)).model, "better/adapter")
    tokens = torch.arange(3, 60)[None]
    wanted = adapted.eval()(input_ids=tokens).logits
    found = load_model("better").model(input_ids=tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    # Another teacher says other things, and the student follows.
    plain = done("recover", small, "--out", "plain", *options[:2], *QUICK)
    assert plain.code == 0
    one, two = (load_file(f"{name}/model.safetensors") for name in ("better", "plain"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer", "gradient_checkpointing=true"),
        ("--dtype", "bfloat16"),
        ("--trainer", "bf16=true", "--method", "full"),
    ],
)
def test_other_ways_to_train(work: Path, made: Path, options: tuple[object, ...]) -> None:
    data = ("--data", made / "rows.jsonl")
    result = done(
        "recover", made / "small", "--out", "better", *data, *QUICK, *options, "--json", "-"
    )
    found = json.loads(result.out)
    assert found["gained"]
    # What is said of the merged model is true of the folder.
    dtype = "bfloat16" if "bfloat16" in options else "float32"
    model = load_model("better", dtype=dtype).model
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    weights = load_file(made / "small" / "model.safetensors")
    assert any(
        not torch.equal(one, weights[name].to(one.dtype)) for name, one in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("fast", "options", "wanted"),
    [
        (True, (), True),
        (False, (), False),
        (True, ("--trainer", "bf16=false"), False),
        (False, ("--trainer", "bf16=true"), True),
        (True, ("--dtype", "bfloat16"), False),
    ],
)
def test_bfloat16_where_the_processor_is_fast_at_it(
    work: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    options: tuple[object, ...],
    wanted: bool,
) -> None:
    monkeypatch.setattr(recovering, "multiplies_bfloat16", lambda _: fast)
    data = ("--data", made / "rows.jsonl", *QUICK, "--trainer", "max_steps=1")
    done("recover", made / "small", "--out", "better", *data, *options)
    assert (
        json.loads(Path("better/recovery.json").read_text())["settings"]["trainer"]["bf16"]
        is wanted
    )


@pytest.fixture(scope="module")
def halves(made: Path) -> Path:
    """A checkpoint in bfloat16."""
    folder = made / "half"
    tiny_model(num_hidden_layers=4, max_position_embeddings=512).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fast", "free", "options", "wanted"),
    [
        (True, 10**9, {}, ["bfloat16", "float32"]),
        (False, 10**9, {}, ["float32", "float32"]),
        (False, 700_000, {}, ["bfloat16", "float32"]),
        (True, 0, {"method": "blocks"}, ["float32", "float32"]),
        (True, 0, {"dtype": "float32"}, ["float32", "float32"]),
    ],
)
def test_beside_adapters_weights_have_the_type_of_the_checkpoint(
    made: Path,
    halves: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fast: bool,
    free: int,
    options: dict[str, str],
    wanted: list[str],
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: fast)
    monkeypatch.setattr(recover_start, "free_bytes", lambda _: free)
    settings = RecoverSettings(
        model=str(halves), teacher=str(made / "dense"), out=Path("o"), data="t.txt", **options
    )
    found = recovering.ways_to_load(settings.but(device="cpu"), ALONE)
    assert [found[of].dtype for of in ("model", "teacher")] == wanted
    assert "control" not in found
    said = ["do not fit into the free memory: the model is computed in bfloat16"]
    short = not fast and free < 10**9
    assert [text in one for one in caplog.messages for text in said] == [True] * short


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the weights of each model that is trained."""
    own, seen = recovering.recover_, list[torch.dtype]()

    def watched(model: torch.nn.Module, *args: Any, **others: Any) -> Any:
        seen.append(next(model.parameters()).dtype)
        return own(model, *args, **others)

    monkeypatch.setattr(recovering, "recover_", watched)
    return seen


def test_a_run_goes_on_in_its_types_and_with_less_memory(
    work: Path,
    made: Path,
    halves: Path,
    seen: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: False)
    data = ("--data", made / "rows.jsonl", *QUICK, "--trainer", "bf16=false")
    command = ("recover", halves, "--out", "better", *data)
    with monkeypatch.context() as patch:
        patch.setattr(recover_start, "free_bytes", lambda _: 0)
        interrupt(patch, RecoveryTrainer, "training_step", 4)
        assert run(*command).code == 130
    said = refused(*command, "--resume", "--dtype", "bfloat16")
    assert said.startswith("the interrupted run has dtype=auto and this one dtype=bfloat16; give")
    said = refused(*command, "--resume", "--samples", 9)
    assert said.startswith("the interrupted run has samples=None and this one samples=9; give")
    # The way out of a memory that was full; nothing else is changed by it.
    done(*command, "--resume", "--trainer", "gradient_checkpointing=true")
    assert seen == [torch.bfloat16] * 2


def test_an_interruption_says_how_to_go_on(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, RecoveryTrainer, "training_step", 4)
    command = ("recover", made / "small", "--out", "better", "--data", made / "rows.jsonl", *QUICK)
    result = run(*command)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "llm-pruner: interrupted; go on with --resume"
    monkeypatch.undo()
    monkeypatch.chdir(work)
    done(*command, "--resume")
    assert json.loads(Path("better/recovery.json").read_text())["steps"] == 4


def test_no_gain_gives_the_model_back_to_the_bit(work: Path, made: Path) -> None:
    small = made / "small"
    options = ("--data", made / "rows.jsonl", *QUICK, "--learning-rate", 50)
    poor = ("--keep-adapter", "--learning-rate", 1e-30)
    result = done("recover", small, "--out", "kept", *options, *poor)
    assert "so kept holds the model as it came and no adapter; use more data" in result.err
    assert not Path("kept/adapter").exists()
    result = done("recover", small, "--out", "same", *options, "--method", "full")
    assert "warning: training brought no gain (held-out loss 5." in result.err
    assert result.err.rstrip().endswith(
        "so same holds the model as it came; use more data, another --learning-rate or more steps"
    )
    before, after = (load_file(path / "model.safetensors") for path in (small, Path("same")))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()
    assert Path("same/plan.json").read_bytes() == (small / "plan.json").read_bytes()


def test_self_made_text_trains_a_student(work: Path, made: Path) -> None:
    options = ("--data", "self", "--teacher", made / "dense", "--samples", 30, "--seq-len", 24)
    result = done(
        *("recover", made / "small", "--out", "better", *options),
        *("--batch-size", 8, "--json", "-"),
    )
    (source,) = json.loads(result.out)["sources"]
    assert (source["name"], source["train_samples"], source["held_out_samples"]) == ("self", 29, 1)


def test_what_a_teacher_says_in_another_type_is_kept_apart(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--teacher", made / "dense", "--samples", 30, "--seq-len", 24, "--overwrite")
    command = ("recover", made / "small", "--out", "one", *options, "--teacher-cache", "cache")

    def kept(*how: object) -> list[int]:
        """Return how many texts and answers the cache has after one more run."""
        interrupt(monkeypatch, recovering, "recover_")
        assert run(*command, *how).code == 130
        names = [path.name.startswith("self-") for path in Path("cache").iterdir()]
        return [sum(names), len(names) - sum(names)]

    rows = ("--data", made / "rows.jsonl")
    assert kept(*rows, "--dtype", "float32", "--trainer", "bf16=false") == [0, 2]
    assert kept(*rows, "--dtype", "float32", "--trainer", "bf16=false") == [0, 2]
    assert kept(*rows, "--dtype", "float32", "--trainer", "bf16=true") == [0, 4]
    assert kept(*rows, "--dtype", "bfloat16", "--trainer", "bf16=false") == [0, 6]
    assert kept("--data", "self", "--dtype", "float32", "--trainer", "bf16=false")[0] == 1
    assert kept("--data", "self", "--dtype", "float32", "--trainer", "bf16=true")[0] == 1
    assert kept("--data", "self", "--dtype", "bfloat16", "--trainer", "bf16=false")[0] == 2


def test_an_interrupted_run_is_not_lost_by_accident(work: Path, made: Path) -> None:
    options = ["--data", made / "rows.jsonl", *QUICK, "--trainer", "save_steps=1"]
    Path("better.recovering").mkdir()
    said = refused("recover", made / "small", "--out", "better", *options)
    assert said == (
        "better.recovering holds a run that was interrupted; go on with --resume, or throw it "
        "away with --overwrite"
    )
    now = __version__
    for asked, differs in (
        ({"llm_pruner": now, "model": "other"}, "model=other and this one model=small"),
        ({"llm_pruner": "0.0", "model": "small"}, f"llm_pruner=0.0 and this one llm_pruner={now}"),
    ):
        Path("better.recovering/lock").touch()
        Path("better.recovering/run.json").write_text(json.dumps(asked))
        said = refused("recover", made / "small", "--out", "better", *options, "--resume")
        assert said == (
            f"the interrupted run has {differs}; give the same options and files, or begin anew "
            "(--set restart=true; recover: --overwrite)"
        )
    done("recover", made / "small", "--out", "better", *options, "--overwrite")
    assert not Path("better.recovering").exists()


def test_an_interrupted_run_goes_on_with_its_own_samples(tmp_path: Path) -> None:
    loaded: Any = SimpleNamespace(name="small", fingerprint="x")
    settings = RecoverSettings(model="small", out=tmp_path / "out", data=("text.txt",))

    def begin(text: str, held_out: int, resume: bool = True) -> None:
        examples = {"text.txt": Examples((Example(text=text),), "text.txt", None)}
        asked = settings.but(held_out=held_out, seq_len=64)
        made = split_samples(examples["text.txt"], tiny_tokenizer(), seq_len=64, held_out=held_out)
        facts = recover_start.facts_of(asked, loaded, None, [made])
        workdir.begin_or_go_on(tmp_path, facts, resume=resume, writes=True)

    begin(WORDS * 20, 2, resume=False)
    begin(WORDS * 20, 2)
    said = "the interrupted run has held_out_samples=2 and this one held_out_samples=5; give the"
    with pytest.raises(UserError, match=said):
        begin(WORDS * 20, 5)
    said = "the interrupted run has data_fingerprint="
    with pytest.raises(UserError, match=said):
        begin(WORDS.upper() * 20, 2)


def test_what_does_not_fit_the_model_is_refused(work: Path, made: Path) -> None:
    data = ("--data", made / "rows.jsonl")
    small = made / "small"
    said = refused("recover", small, "--out", "out", *data, "--seq-len", 513)
    assert said == "seq_len 513 is longer than the model's maximum; use 512 or less"
    said = refused("recover", small, "--out", "out", *data, "--template", "chat")
    assert said == "the tokenizer has no chat template; use --set template=alpaca"
    short = write_text(work / "short.txt", 60)
    said = refused("recover", small, "--out", "out", *data, "--perplexity", short)
    assert said.startswith("short.txt gives ")
    assert "use perplexity_seq_len " in said
    other = save_tiny(work / "other", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(other)
    said = refused("recover", other, "--out", "out", *data)
    assert said == (
        "the tokenizer gives token 259 and the model has 259 tokens; use the tokenizer that "
        "belongs to the model"
    )
    full = ("recover", small, "--out", "out", *data, "--method", "full", "--dtype")
    said = refused(*full, "bfloat16")
    assert said.startswith("method full on half-precision weights loses most of its small steps;")
    said = refused(*full, "bf16")
    assert said.startswith("dtype 'bf16' is unknown; use one of float32")
    said = refused("recover", small, "--out", small, *data, "--overwrite")
    assert "is not replaced, since this command reads" in said


def test_a_teacher_of_another_vocabulary_is_refused(work: Path, made: Path) -> None:
    other = save_tiny(work / "other", num_hidden_layers=1, vocab_size=500)
    with_bytes().save_pretrained(other)
    options = ("--data", made / "rows.jsonl", "--teacher", other)
    said = refused("recover", made / "small", "--out", "out", *options)
    assert said == (
        "other has another vocabulary (500 tokens) than small (259); name the dense model that "
        "the student was cut from"
    )


def test_a_model_that_was_not_pruned_says_so(work: Path, made: Path) -> None:
    options = ("--data", made / "rows.jsonl", *QUICK, "--perplexity", "demo")
    done("recover", made / "dense", "--out", "better", *options, "--perplexity-seq-len", 512)
    report = read_report(Path("better/report.json"))
    assert list(report.evaluations) == ["dense", "recovered"]
    page = Path("better/report.html").read_text()
    assert "<h1>dense, recovered</h1>" in page
    assert "dense was recovered by LoRA of rank 8 on 57 samples of rows.jsonl, 4 steps." in page
    assert "pruned" not in page.split("<footer>")[0].split("<body>")[1]
