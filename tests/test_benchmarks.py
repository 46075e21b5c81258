"""The scripts in ``benchmarks/``: what they keep in their files, and what they start."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from torch import nn

from command import WORDS, save_tiny, write_text
from llm_pruner.models.load import load
from llm_pruner.settings.common import ModelSettings
from trained_tokenizers import byte_level

FOLDER = Path(__file__).parents[1] / "benchmarks"


class Script:
    """A benchmark that runs in this process, and writes into a file of the test."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch, out: Path) -> None:
        self.module, self.patch, self.out = module, patch, out

    def put(self, **names: Any) -> None:
        """Put something in the place of what the script uses."""
        for name, value in names.items():
            self.patch.setattr(self.module, name, value)

    def __call__(self, *words: object) -> Any:
        """Run it; return what its file holds."""
        self.patch.setattr(sys, "argv", ["script", *map(str, words)])
        self.module.main()
        return json.loads(self.out.read_text())

    def refused(self, *words: object) -> None:
        """Run what must be refused and leave the file as it is."""
        before = self.out.read_text()
        with pytest.raises(SystemExit) as stopped:
            self(*words)
        assert stopped.value.code == 2
        assert self.out.read_text() == before


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Script]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: Script(importlib.import_module(name), monkeypatch, tmp_path / "out.json")


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer names code, and has a ``tokenizer.json`` as well."""
    folder = save_tiny(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (folder / "own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


# ----------------------------------------------------------------------------- rows in a file


def test_a_row_takes_the_place_of_its_like(script):
    put = script("commands").module.put
    rows = [{"name": "a", "seed": 0, "x": 1}, {"name": "a", "seed": 1, "x": 2}]
    put(rows, {"name": "a", "seed": 0, "x": 3}, "name", "seed")
    put(rows, {"name": "b", "seed": 0, "x": 4}, "name", "seed")
    assert [row["x"] for row in rows] == [3, 2, 4]


def test_rows_go_on_under_the_settings_that_a_file_holds(script, tmp_path):
    commands, file = script("commands").module, tmp_path / "new" / "file.json"
    parser = ArgumentParser()
    results = commands.results_in(file, {"lengths": (16, 41)}, parser, rows=[])
    results["rows"].append({"x": 1})
    commands.keep(file, results)
    assert [one.name for one in file.parent.iterdir()] == ["file.json"]
    again = commands.results_in(file, {"lengths": (16, 41)}, parser, rows=[], more={})
    assert (again["rows"], again["more"]) == ([{"x": 1}], {})
    with pytest.raises(SystemExit):
        commands.results_in(file, {"lengths": (16, 42)}, parser, rows=[])


def test_one_shape_that_is_inspected_again_leaves_the_others(script):
    inspect = script("inspect_scale")
    inspect.put(inspect=lambda name: {"model": name, "seconds": 1})
    inspect("--out", inspect.out)
    inspect.put(inspect=lambda name: {"model": name, "seconds": 2})
    rows = inspect("--out", inspect.out, "Llama-3.1-70B")["rows"]
    assert [row["model"] for row in rows] == [*inspect.module.CONFIGS]
    assert [row["seconds"] for row in rows] == [1, 2, 1]


def test_shapes_stay_where_losses_are_measured_again_without_them(script):
    losses = script("loss_positions")
    losses.put(
        lp=MagicMock(),
        scored=lambda *_: (np.arange(10.0), 1.0),
        AutoConfig=MagicMock(),
        AutoModelForCausalLM=MagicMock(),
    )
    words = ("model", "--calibration", "a.txt", "--out", losses.out)
    first = losses(*words, "--shape", "large.json")
    assert losses(*words) == first
    assert [row["stride"] for row in first["shapes"]] == [1, "chosen"]
    losses.refused("model", "--calibration", "b.txt", "--out", losses.out)


def test_rows_of_the_papers_setting_on_another_text_are_not_thrown_away(script):
    setting = script("paper_setting")
    dense = Namespace(loaded=Namespace(name="tiny"), network=nn.Linear(2, 2))
    setting.put(
        load=lambda _: dense,
        prune=lambda *_: dense,
        perplexity=lambda *_, **__: Namespace(perplexity=2.0),
    )
    words = ("--calibration", "a.txt", "--out", setting.out, "--text")
    rows = setting(*words, "b.txt")["rows"]
    assert len(rows) == 1 + len(setting.module.runs())
    assert setting(*words, "b.txt")["rows"] == rows
    setting.refused(*words, "c.txt")


def test_folders_of_another_run_stay_in_the_table_of_what_loads(script, tmp_path):
    loads = script("without_package")
    loads.out = tmp_path / "without_package.json"
    loads.put(
        RESULTS=tmp_path,
        folders=lambda work, only: [work / name for name in only.split(";")],
        environment=lambda work, release: work / release,
        check=lambda folder, python: {"class": python.name},
    )
    loads("--work", tmp_path / "one", "--only", "a;b", "--transformers", "5.5.4")
    rows = loads("--work", tmp_path / "two", "--only", "b;c", "--transformers", "5.5.4")["rows"]
    assert [*rows] == [f"{name}, transformers 5.5.4" for name in "abc"]


def test_each_packed_model_keeps_what_it_was_measured_with(script, tmp_path):
    quantize = script("quantize")
    quantize.put(
        _pruned=lambda name, options: options.work / name,
        _measured=lambda *_: {"bytes": 1},
        apart=lambda *_: True,
        machine=lambda: "old",
        BY_TORCHAO=("dense",),
    )
    words = ("--work", tmp_path / "work", "--calibration", "a.txt", "--out", quantize.out, "--text")
    quantize(*words, "b.txt")
    quantize.put(machine=lambda: "new", BY_TORCHAO=("dense", "unequal"))
    rows = quantize(*words, "b.txt")["rows"]
    assert {name: row["machine"] for name, row in rows.items()} == {
        **{"dense": "old", "dense-int8": "old"},
        **{"unequal": "new", "unequal-int8": "new"},
    }
    quantize.refused(*words, "c.txt")


def test_a_curve_that_lacks_a_size_is_refused_before_anything_is_pruned(script):
    drawn, cost = script("curve"), {"seconds": 1.0, "cpu_seconds": 1.0}
    there = {"points": {"0.1": {}, "0.2": {}}, "plans": {"0.1": "x", "0.2": "y"}}
    drawn.put(curve=lambda *_: {**cost, **there}, prune=lambda *_: {**cost, "plan": "x"})
    words = ("--out", drawn.out, "--calibration", "a.txt", "--ratios")
    (row,) = drawn(*words, "0.10,.2").values()
    assert {ratio: one["same_plan"] for ratio, one in row["prune"].items()} == {
        "0.1": True,
        "0.2": False,
    }
    drawn.refused(*words, "0.1,0.3")
    drawn.refused(*words, "0.1", "--calibration", "b.txt")


# ----------------------------------------------------------------------------- what they start


def test_what_is_read_block_by_block_is_drawn_so(script, tmp_path, caplog):
    large = script("large_models").module
    tiny = ModelSettings(model=str(save_tiny(tmp_path / "model")))
    load(tiny, memory=10**9)
    assert not large.reads_by_block(caplog.text)
    load(tiny, memory=1000)
    assert large.reads_by_block(caplog.text)
    row = {"parameters": 10**9, "seconds": 1, "peak_bytes": 1, "floor": {"a": 1}, "bytes_in": 1}
    axes = (MagicMock(), MagicMock())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.subplots", lambda *_, **__: (MagicMock(), axes))
        large.plot([{**row, "memory": None, "by_block": True}], tmp_path / "plot.png")
    lines = {call.kwargs["label"]: call.args[0] for call in axes[0].plot.call_args_list}
    assert lines == {"block by block": [1.0], "all in memory": [], "floor": [1.0]}


def test_tasks_are_measured_of_a_folder_with_code(script):
    shot = script("zero_shot")
    found = {"equal": True, "versions": {}}
    shot.put(save_dense=MagicMock(), llm_pruner=MagicMock(), compare=lambda *_: {**found})
    shot.put(found_by=lambda *_: {"saved_as": "remote_code"})
    assert shot("--data", "tasks", "--out", shot.out)["pruned"] == {"equal": True}
    shot.put(found_by=lambda *_: {"saved_as": "stock"})
    with pytest.raises(SystemExit, match="layers are equal"):
        shot("--data", "tasks", "--out", shot.out)


@pytest.mark.parametrize("rows", ["presets", "text", "uniform", "table"])
def test_nothing_is_trained_where_damage_is_measured(script, rows):
    damage = script("least_damage").module
    for one in damage.runs(rows):
        assert damage.settings_of("default", one, "a.txt", Path("out")).repair_minutes == 0


def test_nothing_is_trained_where_types_are_compared(script):
    kept, asked = script("kept_type"), []

    def found_by(*words: object) -> dict[str, Any]:
        asked.append([*map(str, words)])
        Path(words[3] if words[0] == "prune" else words[1]).mkdir(exist_ok=True)
        file = Path(words[3] if words[0] == "prune" else words[1]) / "model.safetensors"
        file.write_bytes(b"0")
        return {"parameters_after": 1, "seconds": {}, "perplexity": [{"perplexity": 2.0}]}

    kept.put(found_by=found_by, save_dense=lambda *_: None)
    kept("--calibration", "a.txt", "--text", "b.txt", "--out", kept.out)
    pruned = [words for words in asked if words[0] == "prune"]
    assert [words[words.index("--repair-minutes") + 1] for words in pruned] == ["0", "0"]


def test_bytes_of_a_token_are_those_of_text_alone(script, tmp_path):
    yardstick, folder = script("yardstick").module, save_tiny(tmp_path / "model")
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(WORDS)
    ids = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    options = Namespace(max_tokens=1000)
    found = yardstick.bytes_of_token(str(folder), str(tmp_path / "text.txt"), options)
    assert found == len(WORDS) / len(ids)


def test_other_packages_read_text_without_code_of_a_tokenizer(script, with_code, tmp_path):
    peers = script("peer_pruners")
    peers.out = tmp_path / "small" / "peer.json"
    peers.put(SAMPLES=4, LENGTH=32)
    write_text(tmp_path / "plain.txt", 2000)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": (tmp_path / "plain.txt").read_text()}) + "\n")
    wanted = 120_000
    said = peers("flap", with_code, text, peers.out.parent, wanted)
    assert abs(said["parameters"] - wanted) < 5_000


@pytest.mark.slow
def test_an_older_source_is_measured_by_what_makes_models_today(tmp_path):
    (tmp_path / "llm_pruner").mkdir()
    (tmp_path / "llm_pruner/__init__.py").write_text("import sys\nprint('older')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import critical\n"
        "from pathlib import Path\n"
        "print(critical.said('-c', 'import llm_pruner', cwd=Path())['said'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1:] == ["['older']"], ran.stderr


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.name)
def test_what_a_benchmark_imports_is_there(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_pruner"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), node.module
