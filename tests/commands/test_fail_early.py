"""What users really meet is refused before weights are read: in one line, with exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from command import contents, direct, save_tiny, write_text
from helpers import tiny_model
from llm_pruner import errors
from llm_pruner.errors import UserError
from llm_pruner.files import outputs
from llm_pruner.models import load as sources
from llm_pruner.models.checkpoint_files import stored_size
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.settings.recover import TrainingSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="messages name /proc")

PRUNE = "prune m --out o --calibration t.txt"
RECOVER = "recover m --out o --data t.txt"
SMALL = f"{PRUNE} --ratio 0.2"


class ReachedError(BaseException):
    """Weights would have been loaded; nothing explains it away."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``m``, a text, a file and an empty folder."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "m")
    write_text(folder / "t.txt", 9000)
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def early(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the current one, in a process that must not load weights."""

    def load(*_: object) -> NoReturn:
        raise ReachedError

    monkeypatch.chdir(place)
    monkeypatch.setattr(sources, "_load_model", load)
    monkeypatch.setattr(errors, "find_spec", lambda _: None)  # packages may be installed here
    return place


REFUSED = {
    # Places.
    f"{SMALL} --out m": "m exists and is not empty, so nothing was written; choose another folder",
    f"{SMALL} --out file": "file is a file, but the output is a folder; choose another name",
    f"{SMALL} --out /proc/x/y": "/proc/x/y cannot be made, since /proc is not a folder that may",
    f"{SMALL} --json m": "--json m is a folder; name the file to write",
    f"{SMALL} --config no.yaml": "--config no.yaml cannot be read",
    f"{SMALL} --set max_shard_size=5XB": "'5XB' is no size; write such as 8GB",
    f"{SMALL} --push-to-hub me/small": "--push-to-hub went: write the folder, then run: hf",
    "export m --out file": "--out file exists; give another one, or --overwrite to replace it",
    # Models.
    "inspect nothing": "nothing ",
    "inspect ./nothing": "./nothing does not exist; name a folder with config.json",
    "inspect empty": "empty has no config.json, so it is no checkpoint; name a folder",
    "inspect m --dtype float8": "dtype 'float8' is unknown; use one of float32",
    "inspect m --device gpu": "device 'gpu' cannot be used here (RuntimeError: Expected one of",
    f"{RECOVER} --teacher empty": "empty has no config.json, so it is no checkpoint; name a",
    # How much, and how.
    PRUNE: "no target given; use one of --ratio, --params, --unit-ratio, --kv-cache, or --plan",
    f"{SMALL} --params 1K": "--ratio and --params say different things; give one of them",
    f"{PRUNE} --ratio 1.0": "ratio=1.0 is no share to remove, in (0, 1)",
    f"{PRUNE} --params many": "'many' is not a number of parameters; write such as 5.4B",
    f"{SMALL} --structures heads,fnn": "unknown structure 'fnn'; did you mean ffn? known are",
    f"{SMALL} --preset bets": "no preset 'bets'; did you mean best? known are balanced, best",
    f"{SMALL} --criterion tailor": "--criterion tailor is unknown; did you mean taylor? use one",
    f"{SMALL} --set spread=0.5": "spread 0.5 should be greater than or equal to 1; correct it",
    f"{SMALL} --set split=heads=0.3": "split heads=0.3: give each of heads, ffn, and",
    "curve m --out o --calibration t.txt --max-damage 1x": "--max-damage 1x is no damage; write",
    "compress m --out o --time-budget 0": "--time-budget 0 is no time; write such as 90s, 30m",
    # Text.
    f"{SMALL} --calibration no.txt": "no.txt does not exist or is no file; give one",
    f"{RECOVER} --data no.txt": "no.txt does not exist or is no file; give one",
    "evaluate m --perplexity no.txt": "no.txt does not exist or is no file; give one",
    # Training.
    f"{RECOVER} --method qlora": "--method qlora is unknown; did you mean lora? use one of blocks",
    f"{RECOVER} --trainer optin=x": "--trainer optin=x: TrainingArguments has no optin; did you",
    f"{RECOVER} --quantize int8": "--quantize int8 needs the package torchao, which is not",
    f"{RECOVER} --batch-size 0": "--batch-size 0",
    # Measuring.
    "evaluate m": "nothing to measure; give --perplexity SRC, --tasks NAMES, --skills NAMES",
    "evaluate m --skills humaneval": "humaneval runs programs that the model writes; add --run",
    "evaluate m --perplexity t.txt --report m": "m has no report.json; name a folder that",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refused_before_weights_are_read(command: str, early: Path) -> None:
    before = contents(early)
    result = direct(*command.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"llm-pruner: {REFUSED[command]}")
    assert result.err.count("\n") == 1
    assert contents(early) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", [SMALL, RECOVER, "evaluate m --perplexity t.txt", "bench m"])
def test_good_commands_go_on(command: str, early: Path) -> None:
    with pytest.raises(ReachedError):
        direct(*command.split())


def test_refused_from_python_too() -> None:
    with pytest.raises(UserError, match="--seed 4294967296"):
        TrainingSettings(seed=2**32)
    with pytest.raises(UserError, match="steps 0"):
        PruneSettings(model="m", out="o", steps=0)


@pytest.mark.parametrize("size", ["5GB", "50KB", "0.5GB", " 5 gb ", "1e3MB", "2TB"])
def test_sizes_that_a_weight_file_can_have(size: str) -> None:
    assert outputs.bytes_of(size) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (SMALL, 0.8),
        (f"{SMALL} --dtype bfloat16", 0.4),
        (RECOVER, 1.0),
        ("compress m --out o --calibration t.txt", 1.6),
    ],
)
def test_a_disk_that_is_too_full(
    command: str, needed: float, early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(p.numel() for p in tiny_model(num_hidden_layers=6).parameters())
    bytes_ = needed * 4 * parameters
    monkeypatch.setattr(outputs, "free_bytes", lambda _: int(0.99 * bytes_))
    result = direct(*command.split())
    assert result.code == 2
    assert result.err.startswith(f"llm-pruner: o needs about {bytes_ / 1e6:,.1f} MB for weights")


def test_what_is_known_of_a_size_without_reading_weights(place: Path, tmp_path: Path) -> None:
    parameters = sum(p.numel() for p in tiny_model(num_hidden_layers=6).parameters())
    for dtype, width in (("float32", 4), ("bfloat16", 2), ("float64", 8), ("auto", 4)):
        assert stored_size(str(place / "m"), None, dtype) == (parameters, width * parameters)
    packed = tmp_path / "m.gguf"
    packed.write_bytes(b"GGUF" + b"x" * 396)
    assert stored_size(str(packed), None, "float32") == (None, 400)
    assert stored_size("nobody/nothing", None, "float32") is None
