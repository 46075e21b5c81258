"""Zero-shot tasks: numbers of lm-evaluation-harness itself, local data, results that are kept."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import llm_pruner
import llm_pruner.models.load
from command import contents, done, refused, run, save_tiny
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.data.files import LOCAL_TASKS, read_task
from llm_pruner.errors import UserError
from llm_pruner.evaluation import harness, result_cache, zero_shot
from llm_pruner.evaluation.zero_shot import (
    PAPER_METRICS,
    MetricResult,
    TaskResult,
    definition_file,
    means,
)
from llm_pruner.settings.common import ModelSettings
from task_data import write_own_task, write_records, write_tasks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense checkpoint, and a pruned one whose layers differ."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_tiny(folder / "dense", num_hidden_layers=4)
    pruned = folder / "pruned"
    done("prune", dense, "--out", pruned, "--ratio", 0.2, "--criterion", "l2")
    assert "pruned" in json.loads((pruned / "config.json").read_text())
    return {"dense": dense, "pruned": pruned}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded."""
    names: list[str] = []
    load_model = llm_pruner.models.load.load_model

    def counted(source: str, **settings: Any) -> Any:
        names.append(source)
        return load_model(source, **settings)

    monkeypatch.setattr(llm_pruner.models.load, "load_model", counted)
    return names


def evaluate(model: Path, *options: object) -> dict[str, Any]:
    result = done("evaluate", model, *options, "--json", "-")
    assert result.err == ""
    found = json.loads(result.out)
    found["zero_shot"]["by_name"] = {task["task"]: task for task in found["zero_shot"]["tasks"]}
    return found


# The same numbers as the harness itself.


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_numbers_are_those_of_the_harness(
    kind: str,
    models: dict[str, Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own class loads the checkpoint, and its own loop runs the definitions."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    with harness.quiet():
        wanted = lm_eval.evaluator.simple_evaluate(
            model="hf",
            model_args=f"pretrained={models[kind]},dtype=float32",
            tasks=[zero_shot.local_definition(one, read_task(data, one)) for one in LOCAL_TASKS],
            batch_size=3,
            device="cpu",
            task_manager=TaskManager(include_defaults=False),
        )
    found = evaluate(models[kind], "--tasks", "paper", "--tasks-data", data)["zero_shot"]
    compared = 0
    for task in LOCAL_TASKS:
        mine, theirs = found["by_name"][task], wanted["results"][task]
        for name, metric in mine["metrics"].items():
            assert metric["value"] == theirs[f"{name},none"], (task, name)
            assert metric["stderr"] == pytest.approx(theirs[f"{name}_stderr,none"], abs=1e-12)
            compared += 1
        assert mine["documents"] == wanted["n-samples"][task]["effective"] == 6
        metric = PAPER_METRICS[task]
        answers = sorted(wanted["samples"][task], key=lambda one: one["doc_id"])
        assert mine["right"] == "".join(str(int(one[metric])) for one in answers)
    assert compared == 2 * 7 - 2  # BoolQ and WinoGrande have no acc_norm
    assert found["by_name"]["boolq"]["truncated"] == 2


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_definitions_are_those_of_the_harness(task: str, data: Path) -> None:
    """All but the data is what the installed harness says."""
    own = load_yaml(definition_file(task), resolve_func=True)
    taken = {"dataset_path", "dataset_name", "dataset_kwargs", "tag"}
    splits = {"training_split", "validation_split", "test_split", "fewshot_split"}
    rest = {key: value for key, value in own.items() if key not in taken | splits}
    assert {"doc_to_text", "doc_to_target", "doc_to_choice", "metric_list"} <= rest.keys()
    definition = zero_shot.local_definition(task, read_task(data, task))
    assert definition.items() >= rest.items()
    assert definition.keys() - rest.keys() <= splits | {"custom_dataset"}
    split = own.get("test_split") or own["validation_split"]
    assert [definition[key] for key in splits & definition.keys()] == [split]
    assert definition["custom_dataset"]()[split].to_list() == read_task(data, task)


# What is reported.


def test_the_mean_is_that_of_the_paper(models: dict[str, Path], data: Path) -> None:
    found = evaluate(models["dense"], "--tasks", "paper", "--tasks-data", data)["zero_shot"]
    chosen = {
        task: found["by_name"][task]["metrics"][metric] for task, metric in PAPER_METRICS.items()
    }
    values = [each["value"] for each in chosen.values()]
    errors = [each["stderr"] for each in chosen.values()]
    assert found["mean"]["value"] == pytest.approx(sum(values) / 7)
    assert found["mean"]["stderr"] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 7)
    assert found["mean"]["metrics"] == PAPER_METRICS
    assert found["mean_without_boolq"]["value"] == pytest.approx(sum(values[1:]) / 6)
    assert "boolq" not in found["mean_without_boolq"]["metrics"]
    assert found["data"] == "local"
    assert found["versions"]["lm_eval"] == lm_eval.__version__


def test_a_mean_needs_all_its_tasks() -> None:
    def result(task: str) -> TaskResult:
        metrics = {name: MetricResult(0.5, 0.1, True) for name in ("acc", "acc_norm")}
        return TaskResult(task, metrics, PAPER_METRICS[task], 9, 9, 0, "1", 0)

    six = [result(task) for task in list(PAPER_METRICS)[1:]]
    without = means(six)
    assert without[0] is None
    assert without[1] is not None
    assert without[1].value == 0.5
    assert without[1].stderr == pytest.approx(0.1 / math.sqrt(6))
    assert means(six[:-1]) == (None, None)


def test_the_table_fits_and_says_what_it_took(models: dict[str, Path], data: Path) -> None:
    result = done(
        "evaluate", models["dense"], "--tasks", "boolq,piqa", "--tasks-data", data, "--limit", 4
    )
    assert result.err == ""
    assert max(map(len, result.out.splitlines())) <= 80
    assert re.search(r"boolq +4 +acc \* +[01]\.\d{4} ± 0\.\d{4}", result.out)
    assert re.search(r"acc_norm +[01]\.\d{4}", result.out)
    assert "the metric that LLM-Pruner reports" in result.out
    assert "their start was cut: 2 answers of boolq" in result.out
    assert "mean" not in result.out.replace("that a mean takes", "")


# Results that are kept.


def test_a_repeated_run_loads_no_model(
    models: dict[str, Path], data: Path, loads: list[str]
) -> None:
    options = ("--tasks", "piqa,hellaswag,winogrande", "--tasks-data", data)
    first = evaluate(models["dense"], *options)
    assert len(loads) == 1
    second = evaluate(models["dense"], *options, "--batch-size", 2)
    assert len(loads) == 1
    assert first["zero_shot"]["cached"] == []
    assert second["zero_shot"]["cached"] == ["piqa", "hellaswag", "winogrande"]
    first["zero_shot"]["cached"] = second["zero_shot"]["cached"]
    assert first == second


def test_only_what_is_new_is_run(
    models: dict[str, Path], data: Path, tmp_path: Path, loads: list[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for task in ("piqa", "boolq"):
        (own / f"{task}.jsonl").write_bytes((data / f"{task}.jsonl").read_bytes())
    model, options = models["dense"], ("--tasks", "piqa,boolq", "--tasks-data", own)
    before = evaluate(model, *options)["zero_shot"]["by_name"]
    records = read_task(own, "piqa")
    write_records(own / "piqa.jsonl", [*records[:-1], records[-1] | {"goal": "another"}])
    after = evaluate(model, *options)["zero_shot"]
    assert after["cached"] == ["boolq"]
    same = {task: one["digest"] == after["by_name"][task]["digest"] for task, one in before.items()}
    assert same == {"boolq": True, "piqa": False}
    # The first five records are the same, so the sixth does not matter below the limit.
    assert evaluate(model, *options, "--limit", 5)["zero_shot"]["cached"] == []
    write_records(own / "piqa.jsonl", records)
    assert evaluate(model, *options, "--limit", 5)["zero_shot"]["cached"] == ["piqa", "boolq"]
    assert evaluate(model, *options, "--dtype", "bfloat16")["zero_shot"]["cached"] == []
    assert evaluate(models["pruned"], *options)["zero_shot"]["cached"] == []
    assert len(loads) == 5


def test_results_are_of_one_kind_of_device_and_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(device: str) -> str:
        return result_cache.key(identity, ModelSettings(model="m", device=device))

    identity = result_cache.ModelIdentity("m", "m@1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = key("auto")
    assert key("cpu") == on_cpu != key("cuda") == key("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert key("auto") == key("cuda")
    monkeypatch.setattr(torch, "__version__", "0")
    assert key("cpu") != on_cpu


def test_what_lies_deeper_in_a_folder_is_a_part_of_the_model(tmp_path: Path) -> None:
    """And whether its code is run decides what a model is."""

    def key(**changes: Any) -> str:
        settings = ModelSettings(model=str(tmp_path), **changes)
        identity = result_cache.identify(settings)
        assert identity is not None
        return result_cache.key(identity, settings)

    weights = {"weight_map": {"a": "deep/a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    (tmp_path / "deep").mkdir()
    found = [key(), key(trust_remote_code=True)]
    for name in ("a.safetensors", "code.py", "report.txt"):
        (tmp_path / "deep" / name).write_text("1")
        found.append(key())
    assert len({*found}) == 4
    assert found[-1] == found[-2]


def test_without_a_cache_nothing_is_kept(
    models: dict[str, Path], data: Path, loads: list[str], cache: Path
) -> None:
    options = ("--tasks", "piqa", "--tasks-data", data, "--no-cache")
    for _ in range(2):
        assert evaluate(models["dense"], *options)["zero_shot"]["cached"] == []
    assert len(loads) == 2
    assert not cache.exists()


def test_a_broken_cache_is_no_obstacle(
    models: dict[str, Path],
    data: Path,
    cache: Path,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--tasks", "piqa", "--tasks-data", data)
    first = evaluate(models["dense"], *options)
    kept = [name for name, content in contents(cache).items() if content is not None]
    assert len(kept) == 2  # the result, and the model's size
    for text in ("{", "[]", '{"results": [{"task": 1}]}'):
        for name in kept:
            (cache / name).write_text(text)
        assert evaluate(models["dense"], *options) == first
    assert len(loads) == 4
    file = cache / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert evaluate(models["dense"], *options) == first


# Other tasks of the harness.


def only_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness know the tasks of a folder and no others; its own take long to index."""
    with harness.quiet():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "all_tasks", lambda: manager)


def test_any_kind_of_task_is_run(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group with a mean of its own, generated text, and the likelihood of whole texts."""
    folder = tmp_path / "more"
    for name in ("one", "two", "third"):
        write_own_task(folder, data, name, text=f"'{name} {{{{goal}}}}'")
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "group.yaml").write_text(f"group: both\ntask: [one, two]\n{mean}")
    (folder / "outer.yaml").write_text(f"group: outer\ntask: [both, third]\n{mean}")
    say = (
        "output_type: generate_until\ndoc_to_target: '{{sol1}}'\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    write_own_task(folder, data, "say", say)
    read = (
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{goal}}'\n"
        "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, "
        "higher_is_better: false}]\n"
    )
    write_own_task(folder, data, "read", read, "''")
    only_offline(folder, monkeypatch)
    found = evaluate(models["dense"], "--tasks", "both,say,read")["zero_shot"]
    assert found["data"] == "harness"
    by_name = found["by_name"]
    assert by_name.keys() == {"both", "one", "two", "say", "read"}
    parts = [by_name[name]["metrics"]["acc"]["value"] for name in ("one", "two")]
    assert by_name["both"]["metrics"]["acc"]["value"] == pytest.approx(sum(parts) / 2)
    assert by_name["both"]["documents"] == 12
    assert by_name["say"]["metrics"]["exact_match"]["value"] == 0
    perplexity = by_name["read"]["metrics"]["byte_perplexity"]
    assert perplexity["value"] > 50  # a random model of 259 tokens, one for each byte
    assert perplexity["higher_is_better"] is False
    assert found["mean"] is None
    again = evaluate(models["dense"], "--tasks", "both,say,read")["zero_shot"]
    assert again["cached"] == ["both", "say", "read"]
    assert again["tasks"] == found["tasks"]
    nested = evaluate(models["dense"], "--tasks", "outer", "--limit", 2)["zero_shot"]["by_name"]
    documents = {name: one["documents"] for name, one in nested.items()}
    assert documents == {"outer": 6, "both": 4, "one": 2, "two": 2, "third": 2}


def test_answers_that_leave_no_room_for_their_question(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "more"
    reads = json.loads((models["dense"] / "config.json").read_text())["max_position_embeddings"]
    for name, most in (("cut", reads - 8), ("never", reads)):
        say = (
            "output_type: generate_until\ndoc_to_target: '{{sol1}}'\n"
            f"generation_kwargs: {{until: [' '], max_gen_toks: {most}}}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
        write_own_task(folder, data, name, say)
    only_offline(folder, monkeypatch)
    found = evaluate(models["dense"], "--tasks", "cut", "--limit", 2)["zero_shot"]["by_name"]
    assert found["cut"]["truncated"] == 2
    result = run("evaluate", models["dense"], "--tasks", "never", "--limit", 2)
    assert result.code == 2
    assert "never cannot be run (" in result.err


def test_the_harness_ties_no_weights_that_differ() -> None:
    """As those of a checkpoint with a head of its own whose config says that it has none."""
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    own = model.lm_head.weight
    harness.LoadedLM(model, tiny_tokenizer(), None)
    assert model.lm_head.weight is own
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


# What is refused.


@pytest.mark.usefixtures("unloaded", "work")
def test_an_unknown_task_is_refused_with_the_nearest_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own_task(tmp_path / "own", data, "hellaswag")
    only_offline(tmp_path / "own", monkeypatch)
    said = refused("evaluate", "model", "--tasks", "hellaswagg")
    assert "has no task 'hellaswagg'; did you mean hellaswag?" in said


@pytest.mark.usefixtures("unloaded", "work")
def test_a_task_whose_data_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**settings: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    said = refused("evaluate", "model", "--tasks", "piqa")
    assert "task piqa cannot be prepared (ConnectionError: no network)" in said
    assert "or give tasks_data" in said


@pytest.mark.usefixtures("unloaded", "work")
def test_a_task_without_a_local_form_is_refused(data: Path) -> None:
    said = refused("evaluate", "model", "--tasks", "lambada", "--tasks-data", data)
    assert "task 'lambada' has no local form; off" in said


@pytest.mark.usefixtures("unloaded", "work")
def test_a_missing_harness_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    said = refused("evaluate", "model", "--tasks", "piqa", "--tasks-data", data)
    assert "not installed; run: pip install 'llm-pruner[eval]'" in said


def test_a_broken_record_is_named_by_its_line(data: Path, tmp_path: Path) -> None:
    records = read_task(data, "piqa")
    del records[3]["sol2"]
    write_records(tmp_path / "piqa.jsonl", records)
    with pytest.raises(UserError, match=r"piqa.jsonl: line 4 has no 'sol2'; a record has goal, so"):
        read_task(tmp_path, "piqa")


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"piqa\.jsonl does not exist; give the folder"):
        read_task(tmp_path, "piqa")
    (tmp_path / "piqa.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"piqa\.jsonl is empty; write one JSON object per line"):
        read_task(tmp_path, "piqa")
    (tmp_path / "piqa.jsonl").write_text('\n"text"\n')
    with pytest.raises(UserError, match="line 2 has no 'goal'"):
        read_task(tmp_path, "piqa")
