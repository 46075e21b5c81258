"""``llm-pruner bench``: timing in turns, compiled models, tables, JSON, what is refused."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_pruner.commands.bench
import llm_pruner.models.checkpoint_files
import llm_pruner.models.load
from command import done, refused, save_tiny
from helpers import VOCABULARY, tiny_model
from llm_pruner.errors import UserError
from llm_pruner.evaluation.speed import device_name, measure_speed, speed_up
from llm_pruner.files.disk import folder_bytes
from llm_pruner.models.checkpoint_files import stored_at
from llm_pruner.settings.evaluate import BenchSettings

QUICK = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and channels gone from two layers of six."""
    folder = tmp_path_factory.mktemp("models") / "small"
    options = ("--unit-ratio", 0.5, "--criterion", "l2", "--layers", "heads=2-3,ffn=2-3")
    done("prune", dense, "--out", folder, *options)
    return folder


# Timing.


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny_model(num_hidden_layers=1).train(), tiny_model(num_hidden_layers=1)]
    steps: list[tuple[int, tuple[int, ...]]] = []

    class Stepper:
        def __init__(self, model: Any) -> None:
            self.number = models.index(model)

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            assert torch.is_inference_mode_enabled()
            steps.append((self.number, tuple(tokens.shape)))
            return torch.zeros(tokens.shape[0], VOCABULARY)

    monkeypatch.setattr("llm_pruner.evaluation.speed.Decoder", Stepper)
    found = measure_speed(models, prompt_tokens=5, new_tokens=2, repeats=3, batch_size=4)
    text = [(4, 5), (4, 1), (4, 1)]
    # A round to warm up, then three of which the second goes the other way.
    order = [0, 1, 0, 1, 1, 0, 0, 1]
    assert steps == [(model, shape) for model in order for shape in text]
    for speed in found:
        assert len(speed.prefill_seconds) == len(speed.decode_seconds) == 3
        middle = sorted(speed.decode_seconds)[1]
        assert speed.decode_tokens_per_second == pytest.approx(4 * 2 / middle)
        assert speed.prefill_tokens_per_second == pytest.approx(
            4 * 5 / sorted(speed.prefill_seconds)[1]
        )
    assert models[0].training
    assert not models[1].training


def test_a_speed_names_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores, processor = tmp_path / "cpuinfo", torch.device("cpu")
    monkeypatch.setattr("llm_pruner.evaluation.speed._PROCESSORS", cores)
    assert device_name(processor) == (platform.processor() or platform.machine())
    cores.write_text("processor\t: 0\nmodel name\t: Fast  CPU @ 2\nmodel name\t: another\n")
    (found,) = measure_speed([tiny_model()], prompt_tokens=2, new_tokens=1, repeats=1)
    assert found.device == "Fast CPU @ 2"


def test_speed_up_is_taken_round_by_round() -> None:
    # A machine that is twice as slow in the second round tells the same.
    found = speed_up([3.0, 6.0, 4.0], [1.0, 2.0, 2.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 3.0)


# The command.


@pytest.mark.slow
def test_bench_against_another_model(
    dense: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done("bench", small, "--against", dense, *QUICK, "--json", "found.json")
    assert result.err == ""
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert result.out.isprintable() or "\x1b" not in result.out
    found = json.loads(Path("found.json").read_text())
    model, against = found["model"], found["against"]
    assert found["format_version"] == 1
    assert (model["model"], against["model"]) == ("small", "dense")
    assert found["settings"]["batch_sizes"] == [1, 8]
    assert found["settings"]["dtype"] == "float32"
    # Two layers lose half of 80 channels, and one of three key-value heads with its two readers.
    block = 3 * 48 * 40 + 6 * 48 * 8
    assert against["parameters"] - model["parameters"] == 2 * block
    assert against["parameters_blocks"] - model["parameters_blocks"] == 2 * block
    assert against["macs"] - model["macs"] == 64 * 2 * block + 2 * 2 * 2 * 64 * 64 * 8
    assert against["kv_cache_bytes_per_token"] == 6 * 2 * 3 * 8 * 4
    assert model["kv_cache_bytes_per_token"] == (4 * 3 + 2 * 2) * 2 * 8 * 4
    assert model["bytes_on_disk"] == folder_bytes(small)
    for figures in (model, against):
        assert [memory["batch_size"] for memory in figures["memory"]] == [1, 8]
        assert figures["memory"][0]["prefill"] > figures["bytes_in_memory"]
        assert [len(speed["decode_seconds"]) for speed in figures["speed"]] == [2, 2]
    for compared, speed, other in zip(
        found["comparison"], model["speed"], against["speed"], strict=True
    ):
        ratios = [
            slow / fast
            for slow, fast in zip(other["decode_seconds"], speed["decode_seconds"], strict=True)
        ]
        assert compared["decode"]["low"] == min(ratios)
        assert compared["decode"]["high"] == max(ratios)
        assert 1 < compared["prefill_limit"] < against["parameters"] / model["parameters"] + 0.2
        assert 1 < compared["decode_limit"] < against["parameters"] / model["parameters"] + 0.2
    rows = {line[1:19].strip(): line.split() for line in lines if line.startswith(" ")}
    ratio = model["parameters"] / against["parameters"]
    assert rows["parameters"][-1] == f"{ratio:.3f}"
    assert rows["prefill, batch 8"][-1].endswith("%")
    assert lines[0] == "model: small"
    assert lines[1] == "against: dense"


@pytest.mark.slow
def test_bench_of_one_model(dense: Path) -> None:
    shown = done("bench", dense, *QUICK, "--batch-size", "2").out
    assert "against" not in shown
    assert "speed-up" not in shown
    assert "decode, batch 2" in shown
    assert "batch 1" not in shown
    row = next(line for line in shown.splitlines() if line.startswith(" prefill, batch 2   "))
    low, high = shown_range(shown, "decode, batch 2")
    assert row
    assert 0 < low <= high


def shown_range(shown: str, label: str) -> tuple[float, float]:
    line = [line for line in shown.splitlines() if label in line][-1]
    low, _, high = line.split()[-1].replace(",", "").partition("-")
    return float(low), float(high)


@pytest.mark.slow
def test_counts_need_a_config_alone(dense: Path, small: Path, tmp_path: Path) -> None:
    config = tmp_path / "bare"
    config.mkdir()
    (config / "config.json").write_bytes((dense / "config.json").read_bytes())
    found = json.loads(done("bench", config, "--counts-only", "--json", "-").out)
    real = json.loads(done("bench", dense, *QUICK, "--json", "-").out)
    for key in ("parameters", "macs", "macs_per_token", "bytes_read_per_token", "bytes_in_memory"):
        assert found["model"][key] == real["model"][key]
    assert found["model"]["speed"] == found["comparison"] == []
    assert "nothing was timed" in done("bench", small, "--against", config, "--counts-only").out


@pytest.mark.slow
def test_a_model_that_is_not_there(dense: Path, tmp_path: Path) -> None:
    said = refused("bench", dense, "--against", tmp_path / "absent", *QUICK, within=tmp_path)
    assert "absent does not exist; name a folder" in said


@pytest.mark.slow
def test_a_text_longer_than_the_model_reads(dense: Path) -> None:
    said = refused("bench", dense, "--prompt-tokens", 500, "--new-tokens", 13, within=dense)
    assert said == (
        "500 prompt tokens and 13 new ones are more than the 512 positions of dense; give fewer"
    )


def test_where_a_model_is_stored(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored_at(str(dense)) == dense
    assert stored_at(str(dense / "config.json")) == dense / "config.json"
    assert stored_at("nobody/no-such-model-here") is None
    monkeypatch.setattr(
        llm_pruner.models.checkpoint_files, "default_gguf", lambda: dense / "model.gguf"
    )
    assert stored_at("default") == dense / "model.gguf"


def test_settings_have_no_empty_batch() -> None:
    assert BenchSettings(model="m").batch_size == (1, 8)
    with pytest.raises(UserError, match="batch-size 0 should be greater than 0"):
        BenchSettings(model="m", batch_size=(4, 0))
