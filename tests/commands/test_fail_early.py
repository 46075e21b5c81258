"""What options can tell is refused before weights are read, in one line, with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

import bad_commands
from bad_commands import BASES, LONG, TABLE, Bad
from command import contents, done, refused, run, save_tiny, write_text
from helpers import tiny_model
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.commands import compress, publish
from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.recover import check_run
from llm_pruner.commands.workdir import RECOVERING
from llm_pruner.errors import UserError
from llm_pruner.files import outputs
from llm_pruner.files.outputs import check_place, check_shard_size
from llm_pruner.models import load as sources
from llm_pruner.models.stored import stored_size
from llm_pruner.settings import limits
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import BenchSettings, PerplexitySettings
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.settings.recover import RecoverSettings, TrainingSettings
from llm_pruner.types import Edits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="messages name /proc")


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
    # Trackers may be installed where the tests run.
    monkeypatch.setattr(limits, "find_spec", lambda _: None)
    # And a user may be logged in there.
    monkeypatch.setattr(publish, "get_token", lambda: None)
    monkeypatch.setattr(publish.constants, "HF_HUB_OFFLINE", False)
    return place


CASES = [
    pytest.param(row, command, id=f"{command} {row.shown}")
    for rows in TABLE.values()
    for row in rows
    for command in row.commands
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "command"), CASES)
def test_refused_before_weights_are_read(row: Bad, command: str, early: Path) -> None:
    if "--tasks boolq" in row.options and find_spec("lm_eval") is None:
        pytest.skip("needs lm_eval")
    before = contents(early)
    result = run(*bad_commands.arguments(command, row.options))
    said = result.err.replace(f"{early}/", "")
    assert said.startswith("llm-pruner: ")
    assert said.count("\n") == 1
    message = said.removeprefix("llm-pruner: ").rstrip("\n")
    if row.message.endswith("…"):
        assert message.startswith(row.message[:-1])
    else:
        assert message == row.message
    assert result.code == 2
    assert result.out == ""
    assert contents(early) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compress", "curve", "vocab", "prune --estimate"])
def test_what_shares_no_work_is_for_one_process(
    command: str, early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = contents(early)
    name, _, options = command.partition(" ")
    result = run(*bad_commands.arguments(name, options))
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"llm-pruner: {command} runs in one process, and several were started; start it without "
        "torchrun or accelerate launch; prune and recover share their work\n"
    )
    assert contents(early) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(BASES.keys() - {"compare", "compress"}))
def test_the_commands_that_the_options_are_added_to_go_on(command: str, early: Path) -> None:
    before = contents(early)
    with pytest.raises(ReachedError):
        run(*bad_commands.arguments(command, ""))
    assert contents(early) == before


def test_the_page_says_what_the_commands_say() -> None:
    assert bad_commands.PAGE.read_text(encoding="utf-8") == bad_commands.page()


def pruned(out: Path, **changes: Any) -> Callable[[], object]:
    arguments: dict[str, Any] = {
        "ratio": 0.2,
        "structures": "ffn",
        "criterion": "random",
        "compensation": "none",
        "calibration": "t.txt",
    }
    return lambda: PruneRun(PruneSettings(model="m", out=out, **(arguments | changes))).carry_out()


def recovered(out: Path, **changes: Any) -> Callable[[], object]:
    settings = RecoverSettings(model="m", out=out, data="t.txt", **changes)
    return lambda: check_run(settings, RECOVERING.beside(out))


def saved(size: str) -> None:
    save_checkpoint(
        tiny_model(),
        Path("o"),
        edits=Edits({}, {}, {}, {}),
        max_shard_size=size,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (pruned(Path("o"), seed=-1), "--seed -1 is outside"),
        (pruned(Path("o"), max_shard_size="5XB"), "--max-shard-size '5XB' is no size"),
        (pruned(Path("o"), steps=10**6), "steps 1000000 is outside"),
        (pruned(Path(LONG)), "has 300 bytes"),
        (pruned(Path(LONG), dry_run=True), "has 300 bytes"),
        (recovered(Path("o"), max_shard_size="0"), "--max-shard-size '0' is no size"),
        (recovered(Path("file/o")), "file is not a folder"),
        (lambda: saved("1"), "--max-shard-size '1' is no size"),
        (lambda: TrainingSettings(seed=2**32).check(), "--seed 4294967296 is outside"),
        (lambda: BenchSettings(model="m", repeats=10**9).check(), "repeats 1000000000 is outside"),
        (lambda: PerplexitySettings(seq_len=1), "--seq-len 1 is outside"),
        (lambda: check_place(Path("a\0b"), "--out"), "has a zero byte"),
    ],
)
def test_refused_from_python_too(call: Callable[[], object], message: str, early: Path) -> None:
    before = contents(early)
    with pytest.raises(UserError) as refusal:
        call()
    assert message in str(refusal.value)
    assert contents(early) == before


@pytest.mark.parametrize("size", ["5GB", "50KB", "0.5GB", " 5 gb ", "1e3MB", "2TB"])
def test_sizes_that_a_weight_file_can_have(size: str) -> None:
    check_shard_size(size)


@pytest.mark.slow
def test_names_up_to_the_limit_are_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    longest = "n" * 223
    check_place(Path(longest), "--out")
    with pytest.raises(UserError, match="has 224 bytes, and the file system takes 223"):
        check_place(Path(f"{longest}n"), "--out")
    done("inspect", "m", "--json", longest)
    (place / longest).unlink()
    with pytest.raises(UserError, match="bytes, and the file system takes"):
        check_place(Path("/".join(["n" * 200] * 20)), "--out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("prune", 0.8),
        ("prune --dtype bfloat16", 0.4),
        ("prune --dtype auto", 0.8),
        ("recover", 1.0),
        ("compress", 1.6),
        ("compress --no-recover", 0.8),
    ],
)
def test_a_disk_that_is_too_full(
    command: str, needed: float, early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, options = command.partition(" ")
    if "--no-recover" in options:
        monkeypatch.setitem(BASES, name, "compress m --out o --calibration t.txt")
    words = bad_commands.arguments(name, options)
    parameters = sum(p.numel() for p in tiny_model(num_hidden_layers=6).parameters())
    bytes_ = needed * 4 * parameters
    monkeypatch.setattr(outputs, "free_bytes", lambda _: int(0.99 * bytes_))
    before = contents(early)
    result = run(*words)
    kind = " in bfloat16" if "bfloat16" in words else ""
    assert result.code == 2
    assert result.err == (
        f"llm-pruner: o needs about {bytes_ / 1e6:,.1f} MB for weights{kind}, and the disk of "
        f"{early} has {0.99 * bytes_ / 1e6:,.1f} MB free; free some, or give another --out\n"
    )
    assert contents(early) == before
    if name != "compress":  # which measures in a process of its own
        monkeypatch.setattr(outputs, "free_bytes", lambda _: int(1.01 * bytes_))
        with pytest.raises(ReachedError):
            run(*words)


def test_a_memory_that_recovery_does_not_fit_into(
    early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "free_bytes", lambda _: 100_000)
    size = stored_size("m", None, "auto")
    assert size is not None
    assert refused(*bad_commands.arguments("compress", ""), within=early) == (
        f"m takes {size[1] / 1e9:.1f} GB, where 0.0 GB of memory are free, and recovery has it "
        "there whole, as the teacher, beside the pruned model; add --no-recover, or run it where "
        "there is more memory"
    )
    given = {"model": "m", "out": Path("o"), "recover": False}
    compress.check_settings(CompressSettings(**given))


@pytest.mark.slow
def test_the_space_of_a_plan_that_is_only_written_is_not_asked_for(
    early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda _: 0)
    with pytest.raises(ReachedError):
        run(*bad_commands.arguments("prune", "--criterion l2 --dry-run"))


def test_what_is_known_of_a_size_without_reading_weights(place: Path, tmp_path: Path) -> None:
    parameters = sum(p.numel() for p in tiny_model(num_hidden_layers=6).parameters())
    model = str(place / "m")
    for dtype, width in (("float32", 4), ("bfloat16", 2), ("float64", 8), ("auto", 4)):
        assert stored_size(model, None, dtype) == (parameters, width * parameters)
    packed = tmp_path / "m.gguf"
    packed.write_bytes(b"GGUF" + b"x" * 396)
    assert stored_size(str(packed), None, "float32") == (None, 400)
    assert stored_size("nobody/nothing", None, "float32") is None
