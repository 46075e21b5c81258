"""Outputs appear whole or not at all, and nothing of a user's is lost on disk."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import llm_pruner.__main__ as entry
import llm_pruner.commands.evaluate as evaluating
import llm_pruner.commands.recover as recovering
from command import contents, done, refused, run, save_tiny, write_text
from llm_pruner.commands.workdir import COMPRESSING, RECOVERING, begun, move_result, opened
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.files.disk import new_folder, put
from llm_pruner.files.outputs import (
    MANIFEST,
    atomic_directory,
    check_file,
    check_output,
    not_ours,
    write_output,
)
from llm_pruner.recovery.distill import allocate
from llm_pruner.report.data import report_in
from llm_pruner.runtime.processes import new_python
from llm_pruner.runtime.signals import ended_alike
from llm_pruner.settings.evaluate import EvaluateSettings

pytestmark = pytest.mark.slow

QUICK = ("--ratio", 0.1, "--criterion", "l2", "--no-verify")
TRAIN = (
    "--seq-len",
    64,
    "--batch-size",
    4,
    "--samples",
    16,
    "--held-out",
    4,
    "--trainer",
    "max_steps=1",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in ``zoo/dense``, one pruned from it, and a text."""
    folder = tmp_path_factory.mktemp("nothing_lost")
    save_tiny(folder / "zoo/dense", num_hidden_layers=2)
    done("prune", folder / "zoo/dense", "--out", folder / "small", *QUICK)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, a copy of all that."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def written(out: Path, **files: str) -> Path:
    """Return a folder that this package wrote."""
    with atomic_directory(out, overwrite=False) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
    return out


# Whole or absent.


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    out = tmp_path / "a/b/out"
    with atomic_directory(out, overwrite=False) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "inner/file").read_text() == "x"
    assert out.stat().st_mode & 0o2055 == 0o2055  # not private, and of the group of its parent


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_changes_nothing(
    tmp_path: Path, kind: type[BaseException], overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        written(out, old="old")
    before = contents(tmp_path)
    with pytest.raises(kind), atomic_directory(out, overwrite):
        raise kind
    assert contents(tmp_path) == before


def test_overwrite_replaces_the_whole_folder_at_the_end(tmp_path: Path) -> None:
    out = written(tmp_path / "out", old="old")
    with pytest.raises(UserError, match=r"out exists and is not empty.*--overwrite"):
        check_output(out, False)
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a/plan.json"
    write_output(path, "ü\n")
    write_output(path, "two\n")
    with pytest.raises(UnicodeEncodeError):
        write_output(path, "\ud800")
    assert path.read_bytes() == b"two\n"
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


# What is replaced.


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("zoo", "zoo is not replaced, since this command reads zoo/dense; give another --out"),
        ("zoo/dense/in", "zoo/dense/in is not replaced, since this command reads zoo/dense; "),
        ("mixed", "mixed holds thesis.txt, which llm-pruner did not write, so it is not replaced"),
        ("..", ".. is the current folder or holds it; name another folder"),
        ("mounted", "mounted is a mount point and cannot be replaced; name a folder in it"),
        ("text.txt", "text.txt is a file, but the output is a folder; choose another name"),
        ("text.txt/in", "text.txt/in cannot be made, since .*text.txt is not a folder that may be"),
    ],
)
def test_what_is_never_replaced(
    work: Path, monkeypatch: pytest.MonkeyPatch, out: str, said: str
) -> None:
    written(Path("zoo/dense/in"), file="x")
    shutil.copytree("small", "mixed")
    Path("mixed/thesis.txt").write_text("mine")
    Path("mounted").mkdir()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p).name == "mounted" or ismount(p))
    with pytest.raises(UserError, match=said):
        check_output(Path(out), True, ["zoo/dense", "self", None])


def test_a_folder_of_ours_is_replaced_through_a_link(work: Path) -> None:
    Path("link").symlink_to("small")
    inode = Path("small").stat().st_ino
    done("prune", "zoo/dense", "--out", "link", "--overwrite", *QUICK)
    assert Path("link").is_symlink()
    assert Path("small").stat().st_ino != inode
    # What commands add later is ours, too.
    done("inspect", "small", "--json", "small/result.json")
    done("evaluate", "small", "--perplexity", "text.txt", "--seq-len", 64, "--report", "small")
    assert not_ours(Path("small")) is None


@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        ("zoo/dense/config.json", "results", "would replace a file of a model"),
        ("small/report.json", "results", "would replace a file of a model"),
        ("link", "results", "would replace a file of a model"),
        ("new/plan.json", "results", "would replace a file of a model"),
        ("small/plan.json", "plan", "would replace a file of a model"),
        ("small/model.safetensors", "results", "holds something else than results"),
        ("text.txt", "results", "exists and holds something else than results"),
        ("text.txt", "page", "exists and holds something else than page"),
        ("text.txt", "plan", "exists and holds something else than plan"),
        ("zoo", "results", "is a folder; name the file to write"),
        ("text.txt/a", "results", "cannot be made"),
        ("new", "results", "is used by this command otherwise"),
        ("data.json", "results", "is used by this command otherwise"),
    ],
)
def test_files_that_are_never_replaced(work: Path, file: str, kind: Any, said: str) -> None:
    Path("data.json").write_text('[{"text": "mine"}]')
    Path("link").symlink_to("small/plan.json")
    with pytest.raises(UserError, match=said):
        check_file(
            "--json", Path(file), kind, ["data.json"], Path("new/out" if file == "new" else "new")
        )


def test_results_are_replaced_and_streams_are_written_into(work: Path) -> None:
    Path("kept").mkdir()
    Path("kept/result.json").write_text('{"of": "an earlier run"}')
    Path("link.json").symlink_to("kept/result.json")
    done("compare", "small", "--json", "link.json")
    assert Path("link.json").is_symlink()
    assert "of" not in json.loads(Path("kept/result.json").read_text())
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)
    done("compare", "small", "--json", "pipe")
    assert json.loads(os.read(reader, 2**16))
    os.close(reader)
    shutil.copy("small/plan.json", "plan.json")
    done("prune", "zoo/dense", "--out", "plan.json", "--dry-run", "--overwrite", *QUICK)


# A full disk.


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, which is what a full disk is to who writes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line(work: Path) -> None:
    before = contents(work)
    with small_disk(60_000):
        result = run("prune", "zoo/dense", "--out", "new", *QUICK)
    assert result.code == 1
    assert result.err == "llm-pruner: File too large\n"
    assert contents(work) == before


def test_mapped_files_have_their_room(tmp_path: Path) -> None:
    file = tmp_path / "ids.bin"
    allocate(file, 3 * 2**19)
    assert file.read_bytes() == bytes(3 * 2**19)
    assert file.stat().st_blocks * 512 >= 3 * 2**19
    file.write_bytes(b"kept")
    allocate(file, 4)
    assert file.read_bytes() == b"kept"
    with small_disk(2**19), pytest.raises(OSError, match="too large"):
        allocate(file, 2**20)
    assert not file.exists()


# What a killed run leaves.


def test_what_dead_runs_left_goes_and_what_live_ones_make_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial-abcd_123", ".out.old-abcd_123", ".other.partial-abcd_123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".out.partial-of-mine").touch()
    with new_folder(tmp_path / "out") as live:
        check_output(out, overwrite=False)
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".other.partial-abcd_123", ".out.partial-of-mine", live.name}


def test_a_folder_that_stepped_aside_returns(tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / ".out.old-abcd_123"
    aside.mkdir()
    written(aside / "out", file="old")
    with pytest.raises(UserError, match="exists and is not empty"):
        check_output(out, overwrite=False)
    assert (out / "file").read_text() == "old"
    aside.mkdir()
    written(aside / "out", file="older")
    check_output(out, overwrite=True)
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_while_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, new = written(tmp_path / "out", file="old"), written(tmp_path / "new", file="new")
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(rename(path, target))
        if len(calls) == number:  # it is done, and the signal is heard right after it
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(new, out)
    assert (out / "file").read_text() == ("old" if number == 1 else "new")
    assert not list(tmp_path.glob(".*"))


# Folders of runs.


def test_compress_puts_its_result_in_place_like_any(work: Path) -> None:
    pruned = written(work / "out.compressing/pruned", file="new")
    written(work / ".out.old-abcd_123/out", file="old")  # killed between the two renames
    move_result(pruned, work / "out", True, ())
    assert (work / "out/file").read_text() == "new"
    assert not list(work.glob(".*"))


def test_two_recoveries_do_not_share_a_folder(work: Path, unloaded: None) -> None:
    command = ("recover", "small", "--out", "better", "--data", "text.txt", *TRAIN)
    with begun(work / "better.recovering"):
        said = refused(*command, "--overwrite")
    assert said == "another process is at work in better.recovering; wait for it, or end it"


def test_an_interrupted_recovery_that_did_nothing_leaves_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recovering, "recover_", interrupted)
    result = run("recover", "small", "--out", "better", "--data", "text.txt", *TRAIN)
    assert (result.code, result.err) == (130, "llm-pruner: interrupted; nothing was written\n")
    assert not Path("better.recovering").exists()


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path) -> None:
    folder = COMPRESSING.beside(tmp_path / "better")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UserError, match=r"better\.compressing is no folder of a run"),
        opened(folder, {"ratio": 0.2}, restart=True),
    ):
        pass
    assert contents(folder) == {"thesis.txt": b"mine"}


def test_the_folder_of_a_run_lies_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    assert RECOVERING.beside(tmp_path / "link") == tmp_path / "disk/out.recovering"


def test_what_was_measured_is_kept_though_nobody_reads_it(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("llm_pruner.cli.evaluate.show", closed)
    kept = ("--report", "small", "--json", "found.json")
    result = run("evaluate", "small", "--perplexity", "text.txt", "--seq-len", 64, *kept)
    assert (result.code, result.err) == (1, "")
    (found,) = json.loads(Path("found.json").read_text())["perplexity"]
    assert (
        found["perplexity"]
        == report_in(Path("small")).evaluations["pruned"].of("perplexity")[0].value
    )


def test_results_lie_in_the_home_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not read ``~`` behind the sign of ``--json=~/found.json``."""
    home = work / "home"
    monkeypatch.setenv("HOME", str(home))
    done("compare", "small", "--json=~/found.json")
    assert {path.name for path in home.iterdir()} == {"found.json"}
    assert not Path("~").exists()


# Signals and processes.

SLOW = """
import sys, time
from pathlib import Path
from llm_pruner.cli import build, main
from llm_pruner.files.disk import new_folder

def slow(*_):
    with new_folder(Path("made/out").resolve()):
        print("ready", flush=True)
        time.sleep(60)

build.check_json = slow
sys.argv = ["llm-pruner", "inspect", "any"]
main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_signals_end_a_run_in_one_line(tmp_path: Path, number: int, code: int) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SLOW], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, said = process.communicate()
    assert (process.returncode, said) == (code, "llm-pruner: interrupted; nothing was written\n")
    assert not list((tmp_path / "made").iterdir())


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_alike():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_process_that_is_interrupted_ends_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    for code in (130, 143, 2):
        monkeypatch.setattr(entry, "main", lambda code=code: sys.exit(code))
        monkeypatch.setattr(os, "_exit", ended.append)
        with suppress(SystemExit):
            entry.run()
    assert ended == [130, 143]


PARENT = """
import os, subprocess, sys, time
child = "import sys, time; from llm_pruner.runtime.signals import end_with_parent;"
child += "end_with_parent(int(sys.argv[1])); print('up', flush=True); time.sleep(60)"
command = [sys.executable, "-c", child, str(os.getpid())]
process = subprocess.Popen(command, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can")
def test_a_child_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        child = Path("/proc", parent.stdout.readline().decode().strip())
        assert child.exists()
        parent.kill()
    end = time.monotonic() + 300
    while child.exists() and "Z" not in (child / "stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_models_are_measured_in_such_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.MonkeyPatch)  # this process is to live on
    monkeypatch.setattr(pytest.MonkeyPatch, "prctl", lambda *_: 0, raising=False)
    sent = json.dumps({"parent": os.getpid(), "settings": {"model": "any"}, "window": None})
    monkeypatch.setattr(sys, "stdin", io.StringIO(sent))
    with pytest.raises(SystemExit):  # this process is not its own parent
        evaluating._measure_there()


def test_a_new_python_imports_nothing_of_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    subprocess.run(
        [*new_python("import random, sys; assert sys.argv[1:] == ['a']"), "a"], check=True
    )


def test_a_measurement_that_fails_elsewhere_is_told_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")  # not what torch imports
    with pytest.raises(UserError, match=r"absent\.txt does not exist"):
        evaluating.measure_apart(EvaluateSettings(model="any", perplexity="absent.txt"))
    # As if the system had killed it.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), 9)\n")
    said = r"^any could not be measured: its process ended with -9"
    with pytest.raises(LLMPrunerError, match=said):
        evaluating.measure_apart(EvaluateSettings(model="any", perplexity="absent.txt"))


# Inputs that change.
