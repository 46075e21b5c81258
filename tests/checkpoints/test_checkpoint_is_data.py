"""A checkpoint is data: what its files say can cut a model, and reach nothing else."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2 import modeling_qwen2

from helpers import tiny_model
from llm_pruner.checkpoints import remote_code, save_checkpoint
from llm_pruner.commands import abilities, evaluate
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.models.load import load_model
from llm_pruner.report.data import read_report
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import EvaluateSettings
from llm_pruner.surgery.cut import cut_

TOKENS = torch.arange(3, 35).view(2, 16)
TYPES = ["full_attention", "sliding_attention"] * 2
Change = Callable[[dict[str, Any]], object]

WATCHED = (
    Qwen2ForCausalLM,
    Qwen2Config,
    PreTrainedModel,
    PreTrainedConfig,
    GenerationConfig,
    remote_code.Checked,
    AutoModelForCausalLM,
    nn.Module,
    nn.Linear,
    *(one for one in vars(modeling_qwen2).values() if isinstance(one, type)),
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose recipe has entries of every kind."""
    sizes = {"num_hidden_layers": 4, "layer_types": TYPES}
    windows = {"use_sliding_window": True, "sliding_window": 64}
    model = tiny_model("qwen2", tie_word_embeddings=True, **windows, **sizes)
    removal = {
        "layers": np.array([1]),
        "layers.0.ffn": np.arange(9),
        "layers.2.heads": np.array([1]),
        "head_dim": np.array([2]),
        **{f"layers.{layer}.value_dim": np.array([1, 5]) for layer in range(4)},
    }
    dense, found = copy.deepcopy(model.config), discover(model)
    edits = cut_(model, found, removal)
    out = tmp_path_factory.mktemp("data") / "out"
    saved = save_checkpoint(model, out, edits=edits, dense_config=dense)
    assert saved.kind == "remote_code"
    with torch.no_grad():
        torch.save(model(TOKENS).logits, out.parent / "logits.pt")
    return out


def recipe_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["pruned"]


def with_recipe(folder: Path, recipe: Any, out: Path) -> Path:
    """Make a folder with these weights and another recipe."""
    out.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "config.json" and not (out / file.name).exists():
            (out / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pruned": recipe}))
    return out


def snapshot() -> list[Any]:
    """Return what classes and functions of the process hold, by identity."""
    found: list[Any] = []
    for cls in dict.fromkeys(base for one in WATCHED for base in one.__mro__[:-1]):
        for name, value in sorted(vars(cls).items()):
            function = value.__func__ if isinstance(value, (classmethod, MethodType)) else value
            found.append((cls.__qualname__, name, id(value)))
            if isinstance(function, FunctionType):
                found.append(
                    (
                        repr(function.__defaults__),
                        repr(function.__kwdefaults__),
                        id(function.__code__),
                        sorted(vars(function)),
                    )
                )
    return found


def refused_in_one_line(call: Callable[[], object]) -> bool:
    """Say whether a call ends in a refusal, which has to be one short line."""
    try:
        call()
    except UserError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert len(message) < 600
    return True


def attribute(module: str, path: str, value: Any = 1) -> Change:
    return lambda recipe: recipe["attributes"].setdefault(module, {}).update({path: value})


def entry(section: str, name: str, value: Any) -> Change:
    return lambda recipe: recipe[section].update({name: value})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ATTENTION, NORM = "model.layers.0.self_attn", "model.norm"
Q = f"{ATTENTION}.q_proj.weight"

ATTACKS: dict[str, tuple[Change, str]] = {
    # Classes, functions and whatever else an attribute of an attribute reaches.
    "class": (attribute(ATTENTION, "__class__.forward"), "'__class__.forward'"),
    "upload": (
        attribute("", "save_pretrained.__defaults__", [True, "hub", "hf_token"]),
        "'save_pretrained.__defaults__'",
    ),
    "pickle": (
        attribute("", "from_pretrained.__func__.__kwdefaults__", {"use_safetensors": False}),
        "'from_pretrained.__func__.__kwdefaults__'",
    ),
    "parameters": (attribute(NORM, "_parameters.weight"), "'_parameters.weight'"),
    "forward": (attribute(ATTENTION, "forward"), "'forward'"),
    "flag": (attribute(NORM, "training"), "'training'"),
    "flag-value": (attribute(ATTENTION, "layer_idx", value=True), "True, which is no number"),
    "module": (attribute("model", "norm"), "'norm'"),
    "new": (attribute(NORM, "sizes"), "'sizes'"),
    "config": (attribute(ATTENTION, "config"), "'config'"),
    "config-own": (attribute(ATTENTION, "config._attn_implementation_internal"), "_internal"),
    "config-deeper": (attribute(ATTENTION, "config.rope_parameters.rope_theta"), "rope_theta"),
    "index-negative": (attribute(ATTENTION, "config.layer_types.-1"), "layer_types.-1"),
    "through-parent": (attribute(f"{ATTENTION}.q_proj.weight", "grad"), "q_proj.weight"),
    "module-property": (attribute("base_model", "padding_idx"), "'base_model'"),
    # Values.
    "nan": (attribute(ATTENTION, "layer_idx", float("nan")), "nan, which is no number"),
    "infinite": (attribute(ATTENTION, "scaling", float("inf")), "inf, which is no number"),
    "huge": (attribute(ATTENTION, "layer_idx", 10**400), "no such number"),
    "fraction": (attribute(ATTENTION, "layer_idx", 0.5), "0.5"),
    "lines": (attribute("a\nb", "x"), "'a\\nb'"),
    # Shapes.
    "shape-larger": (entry("shapes", Q, "49x48"), "(49, 48)"),
    "shape-empty": (entry("shapes", Q, "0x48"), "has the shape '0x48'"),
    "shape-absent": (entry("shapes", "model.nothing", "1"), "'model.nothing'"),
    "shape-of-buffer": (entry("shapes", "model.rotary_emb.inv_freq", "1"), "inv_freq"),
    "tied": (
        lambda recipe: recipe["shapes"].update(
            {"lm_head.weight": "259x40", "model.embed_tokens.weight": "259x41"}
        ),
        "which are one, different shapes",
    ),
    # Buffers.
    "buffer-modules": (entry("buffers", "model._modules", {"0": "0"}), "'model._modules'"),
    "buffer-dimension": (
        entry("buffers", "model.rotary_emb.inv_freq", {"-1": "0"}),
        "that its shape",
    ),
    "positions-bomb": (
        entry("buffers", "model.rotary_emb.inv_freq", {"0": "0-999999999"}),
        "out of range",
    ),
    # Layers.
    "layers-of-module": (entry("layers", NORM, "0"), "no module list"),
    "layers-beyond": (entry("layers", "model.layers", "0-7"), "which has 4"),
    # What the dense model is built with.
    "auto-map": (
        entry("dense_config", "auto_map", {"AutoModelForCausalLM": "evil--code.Model"}),
        "'auto_map'",
    ),
    "remote": (entry("dense_config", "trust_remote_code", 1), "'trust_remote_code'"),
    "architectures": (entry("dense_config", "architectures", ["Other"]), "'architectures'"),
    "attention": (entry("dense_config", "_attn_implementation", "hub/kernel"), "'hub/kernel'"),
    "flag-of-config": (entry("dense_config", "use_cache", 1), "'use_cache'"),
    "path-in-list": (entry("dense_config", "layer_types", ["../../x"]), "a list of 1"),
    # The frame.
    "unknown-key": (lambda recipe: recipe.update(hooks={}), "has the key 'hooks'"),
    "section-list": (lambda recipe: recipe.update(shapes=[1]), "'shapes' is no object"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_in_one_line_with_nothing_changed(name: str, pruned: Path, tmp_path: Path) -> None:
    change, words = ATTACKS[name]
    recipe = recipe_of(pruned)
    change(recipe)
    folder = with_recipe(pruned, recipe, tmp_path / "out")
    before = snapshot()
    with pytest.raises(UserError) as refusal:
        AutoModelForCausalLM.from_pretrained(folder)
    assert snapshot() == before
    message = str(refusal.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 600
    assert "; " in message  # and what to do


def test_what_saving_wrote_loads(pruned: Path) -> None:
    recipe = recipe_of(pruned)
    assert all(recipe[key] for key in ("shapes", "buffers", "attributes", "layers", "dense_config"))
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    wanted = torch.load(pruned.parent / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, wanted)


WILD = (
    *("", "x", "0", "-1", "1x1", "0-99999999999", "0-3", "3-0", "0,0", "²", "1e5", "__class__"),
    *("config", "config.hidden_size", "forward", "../x", "a\nb", "\0", "model.layers", "9" * 5000),
    *(0, 1, -1, 3, 4096, 10**6, 10**12, 2**63, -(2**63), 10**400),
    *(0.5, float("nan"), float("inf"), True, False, None),
    *([], {}, [1], [[1]], ["x"] * 9, {"0": "0"}, {"x": {"y": 1}}, [None] * 5, {"": ""}),
)


def mutate(value: Any, draw: random.Random) -> Any:
    """Return a recipe in which one place, anywhere, is something else."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        copied = dict(value)
        kind = draw.random()
        if kind < 0.75:
            copied[key] = mutate(value[key], draw)
        elif kind < 0.83:
            del copied[key]
        else:
            other = draw.choice([str(draw.choice(WILD))[:99], key + ".x", key[:-1], key + "0"])
            copied[other] = copied.pop(key) if draw.random() < 0.5 else copied[key]
        return copied
    if isinstance(value, str) and value and draw.random() < 0.4:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice("0123456789x-,. ") + value[at + draw.randrange(2) :]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice([-2, -1, 1, 2, 64])
    return draw.choice(WILD)


@pytest.mark.slow
def test_no_mutation_of_a_recipe_does_more_than_load_or_be_refused(
    pruned: Path, tmp_path: Path
) -> None:
    draw, recipe, before = random.Random(0), recipe_of(pruned), snapshot()
    refused = loaded = 0
    for _ in range(60):
        changed = mutate(recipe, draw)
        folder = str(with_recipe(pruned, changed, tmp_path / "out"))
        if refused_in_one_line(partial(load_model, folder, tokenizer_required=False)):
            refused += 1
        else:
            loaded += 1
        assert snapshot() == before, changed
    assert refused > 20
    assert loaded > 2


@pytest.mark.parametrize(
    "report",
    [
        {"format_version": 1, "source": {"name": "m"}, "settings": {"a\nb": {"c": nested(200)}}},
        {"format_version": 1, "source": {"name": "m"}, "sizes": {"dense": {"total": "a"}}},
        {"format_version": {"a": nested(50)}},
        [1],
    ],
)
def test_reports_are_read_or_refused_in_one_line(report: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert refused_in_one_line(lambda: read_report(file)) == ("settings" not in report)


# Which files are read, and whose code runs.


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_a_model_runs_in_another_process_only_if_it_was_allowed(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[bool] = []

    def load(asked: ModelSettings, **_: bool) -> None:
        requests.append(asked.trust_remote_code)
        raise UserError("seen")

    monkeypatch.setattr(abilities, "load", load)
    sent = pickle.dumps(EvaluateSettings(model="m", trust_remote_code=allowed, speed=True))
    with pytest.raises(UserError, match="seen"):
        evaluate.measure(pickle.loads(sent))
    assert requests == [allowed]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model.safetensors", "/tmp/model.safetensors", 3, "a\0.bin"]
)
def test_an_index_names_safetensors_of_its_folder(name: Any, pruned: Path, tmp_path: Path) -> None:
    folder = with_recipe(pruned, recipe_of(pruned), tmp_path / "out")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as refusal:
        load_model(str(folder), tokenizer_required=False)
    assert "index.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_adapter_beside_the_weights_is_not_loaded(pruned: Path, tmp_path: Path) -> None:
    folder = with_recipe(pruned, recipe_of(pruned), tmp_path / "out")
    adapter = {"base_model_name_or_path": "other/model", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="holds an adapter"):
        load_model(str(folder), tokenizer_required=False)
