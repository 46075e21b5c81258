"""``llm-pruner bench``: timing in turns, compiled models, tables, JSON, what is refused."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
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
from llm_pruner.evaluation.speed import compiled, compiling, device_name, measure_speed, speed_up
from llm_pruner.files.disk import folder_bytes
from llm_pruner.models.checkpoint_files import stored_at
from llm_pruner.models.forward import Decoder
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


class Recorder:
    """Notes which model takes a step on how many tokens."""

    steps: list[tuple[int, tuple[int, ...]]]

    def __init__(self, models: list[Any]) -> None:
        self.models = models
        self.steps = []

    def start(self, model: Any) -> Any:
        recorder = self

        class Stepper:
            def step(self, tokens: torch.Tensor) -> torch.Tensor:
                assert torch.is_inference_mode_enabled()
                recorder.steps.append((recorder.models.index(model), tuple(tokens.shape)))
                return torch.zeros(tokens.shape[0], VOCABULARY)

        return Stepper()


def test_models_take_turns() -> None:
    models = [tiny_model(num_hidden_layers=1).train(), tiny_model(num_hidden_layers=1)]
    recorder = Recorder(models)
    found = measure_speed(
        models, prompt_tokens=5, new_tokens=2, repeats=3, batch_size=4, start=recorder.start
    )
    text = [(4, 5), (4, 1), (4, 1)]
    # A round to warm up, then three of which the second goes the other way.
    order = [0, 1, 0, 1, 1, 0, 0, 1]
    assert recorder.steps == [(model, shape) for model in order for shape in text]
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


# Compiled models. The backend that compiles nothing needs no compiler and takes the same way.


def decoded(start: Callable[[Any], Decoder], model: Any, tokens: torch.Tensor) -> torch.Tensor:
    decoder = start(model)
    steps = (tokens[:, :9], *tokens[:, 9:].split(1, dim=1))
    return torch.stack([decoder.step(part) for part in steps])


@pytest.mark.slow
def test_a_compiled_model_decodes_alike() -> None:
    model = tiny_model(num_hidden_layers=1)
    tokens = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    with torch.inference_mode(), compiling():
        start = compiled(16, backend)
        first, again = (decoded(start, model, tokens) for _ in range(2))
        # One for the prompt and one for a step; none is added as the text grows.
        assert len(graphs) == 2
    torch.testing.assert_close(first, decoded(Decoder, model, tokens), atol=1e-5, rtol=1e-5)
    assert torch.equal(first, again)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_weights_that_are_compiled_in_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without vector instructions: to look for them and to compile with them takes twice as long.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    model, other = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    other.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), compiling(constant_weights=True):
        start = compiled(16)
        first = decoded(start, model, tokens)
        wanted = decoded(Decoder, model, tokens)
        torch.testing.assert_close(first, wanted, atol=1e-5, rtol=1e-5)
        # Another of the same class and shape, in turns. Its prompt alone, because the steps after
        # it are compiled for themselves, which takes seconds.
        prompt = tokens[:, :9]
        others = Decoder(other).step(prompt)
        assert not torch.allclose(others, wanted[0], atol=1e-2)
        torch.testing.assert_close(start(other).step(prompt), others, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoded(start, model, tokens), first, atol=0, rtol=0)
        # Compiled in, they do not follow the model, which is as it was.
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(decoded(start, model, tokens), first, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            decoded(Decoder, model, tokens), 2 * wanted, atol=1e-5, rtol=1e-5
        )
    # What is compiled afterwards starts from the weights as they are then.
    with torch.inference_mode(), compiling(constant_weights=True):
        found = compiled(16)(model).step(prompt)
        torch.testing.assert_close(found, 2 * wanted[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_compiled() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nfound")

    model = tiny_model(num_hidden_layers=1)
    said = r"cannot be compiled here \(BackendCompilerFailed: .*no compiler found.*leave out --comp"
    with pytest.raises(UserError, match=said), torch.inference_mode(), compiling():
        decoded(compiled(16, backend), model, torch.ones(1, 12, dtype=torch.int64))

    class NoCache(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(UserError, match="NoCache has no cache, so it cannot be compiled"):
        compiled(16)(NoCache())


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
    assert found["model"]["bytes_on_disk"] is None
    assert "nothing was timed" in done("bench", small, "--against", config, "--counts-only").out


@pytest.mark.slow
def test_compile_is_passed_on(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []

    def with_nothing_compiled(capacity: int) -> Callable[[Any], Decoder]:
        capacities.append(capacity)
        return Decoder

    monkeypatch.setattr(llm_pruner.commands.bench, "compiled", with_nothing_compiled)
    shown = done("bench", dense, *QUICK, "--batch-size", 1, "--compile").out
    assert capacities == [8 + 3]
    assert "median of 2 rounds; compiled" in shown


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
    with pytest.raises(UserError, match="batch_size 0 is outside"):
        BenchSettings(model="m", batch_size=(4, 0))
