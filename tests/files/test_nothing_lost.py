"""Nothing of a user's is lost on disk, and nothing of ours is left half."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import llm_pruner.__main__ as entry
import llm_pruner.commands.compress as compressing
import llm_pruner.commands.evaluate as evaluating
import llm_pruner.commands.prune as pruning
import llm_pruner.commands.recover as recovering
from command import contents, done, refused, run, save_tiny, write_text
from llm_pruner.commands import workdir
from llm_pruner.commands.workdir import RECOVERING, begun, opened, remove_run
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.files.disk import allocate, discard, new_file, new_folder, placed, put
from llm_pruner.files.outputs import (
    MANIFEST,
    atomic_directory,
    check_output,
    not_ours,
    write_output,
)
from llm_pruner.models.checkpoint_files import check_file_states, file_states
from llm_pruner.report.data import report_in
from llm_pruner.runtime.processes import new_python
from llm_pruner.runtime.signals import ended_alike
from llm_pruner.settings.evaluate import EvaluateSettings

pytestmark = pytest.mark.slow

QUICK = ("--ratio", 0.1, "--criterion", "l2", "--no-verify")
TRAIN = ("--seq-len", 64, "--batch-size", 4, "--samples", 16, "--held-out", 4, "--max-steps", 1)


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


# What --overwrite replaces.


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("zoo", "zoo holds zoo/dense, which is read by this command, so it is not replaced; "),
        ("zoo/dense", "zoo/dense is read by this command, so it is not replaced; give another"),
        ("zoo/dense/in", "zoo/dense/in lies in zoo/dense, which is read by this command, so "),
        ("mine", "mine holds thesis.txt, which llm-pruner did not write, so it is not replaced; "),
        ("mixed", "mixed holds thesis.txt, which llm-pruner did not write, so it is not replaced"),
        ("edited", "edited holds README.md, which was changed since llm-pruner wrote it, so it "),
        ("linked", "linked holds README.md, which llm-pruner did not write, so it is not replaced"),
        (".", ". is the current folder or holds it; name another folder"),
        ("..", ".. is the current folder or holds it; name another folder"),
        ("home", "home is your home folder, which is not replaced; name another folder"),
        ("mounted", "mounted is a mount point and cannot be replaced; name a folder in it"),
        ("nowhere", "nowhere is a link to something that is not there; choose another name"),
    ],
)
def test_what_is_never_replaced(
    work: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None, out: str, said: str
) -> None:
    written(Path("zoo/dense/in"))
    for name in ("mine", "home", "mounted"):
        Path(name).mkdir()
        Path(name, "thesis.txt").write_text("mine")
    for name in ("mixed", "edited"):
        shutil.copytree("small", name)
    Path("mixed/thesis.txt").write_text("mine")
    with Path("edited/README.md").open("a") as card:
        card.write("my own words")
    shutil.copytree("small", "linked")
    Path("linked/README.md").rename("card.md")
    Path("linked/README.md").symlink_to(work / "card.md")
    Path("nowhere").symlink_to("absent")
    monkeypatch.setenv("HOME", str(work / "home"))
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p).name == "mounted" or ismount(p))
    for command in (("prune", *QUICK), ("compress",), ("recover", "--data", "text.txt")):
        assert refused(
            command[0], "zoo/dense", "--out", out, "--overwrite", *command[1:]
        ).startswith(said)


def test_whatever_is_read_is_never_replaced(work: Path, unloaded: None) -> None:
    plan = Path("small/plan.json").read_text()
    texts = {"text.txt": "text", "plan.json": plan, "preset.yaml": "samples: 8\n"}
    written(Path("out"), **texts)
    shutil.copytree("small", "teacher")
    out = ("--out", "out", "--overwrite")
    text = "out/text.txt"
    for holds, command in (
        (text, ("prune", "zoo/dense", *out, *QUICK, "--calibration", f"{text},text.txt")),
        ("out/plan.json", ("prune", "zoo/dense", *out, "--plan", "out/plan.json")),
        (text, ("recover", "zoo/dense", *out, "--data", text)),
        (text, ("recover", "zoo/dense", *out, "--data", "text.txt", "--perplexity", text)),
        (text, ("compress", "zoo/dense", *out, "--data", text)),
        (text, ("compress", "zoo/dense", *out, "--calibration", text)),
        (text, ("compress", "zoo/dense", *out, "--perplexity", text)),
        ("out/preset.yaml", ("compress", "zoo/dense", *out, "--preset", "out/preset.yaml")),
        ("out/preset.yaml", ("prune", "zoo/dense", *out, *QUICK, "--preset", "out/preset.yaml")),
    ):
        assert refused(*command) == (
            f"out holds {holds}, which is read by this command, so it is not replaced; "
            "give another --out"
        )
    teacher = ("--data", "text.txt", "--teacher", "teacher")
    said = refused("recover", "zoo/dense", "--out", "teacher", "--overwrite", *teacher)
    assert said.startswith("teacher is read by this command")
    said = refused("tasks", "--tasks-data", "out", *out)
    assert said.startswith("out is read by this command")


def test_a_folder_of_ours_is_replaced_through_a_link(work: Path) -> None:
    Path("link").symlink_to("small")
    inode = Path("small").stat().st_ino
    done("prune", "zoo/dense", "--out", "link", "--overwrite", *QUICK)
    assert Path("link").is_symlink()
    assert Path("small").stat().st_ino != inode
    assert not_ours(Path("small")) is None


def test_folders_of_earlier_versions_are_known(work: Path) -> None:
    small = Path("small")
    (small / MANIFEST).unlink()
    check_output(small, overwrite=True)
    (small / "thesis.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.md, which llm-pruner did not write"):
        check_output(small, overwrite=True)
    (small / "thesis.md").unlink()
    with (small / "README.md").open("a") as card:
        card.write("my own words")
    with pytest.raises(UserError, match=r"holds README\.md, which was changed"):
        check_output(small, overwrite=True)
    # A plan beside a dense model does not make it one of ours.
    shutil.copy(small / "plan.json", "zoo/dense")
    with pytest.raises(UserError, match=r"holds config\.json, which llm-pruner did not write"):
        check_output(Path("zoo/dense"), overwrite=True)


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
        == report_in(Path("small")).evaluations["pruned"].perplexity[0].perplexity
    )


def test_what_is_added_to_a_folder_of_ours_is_ours(work: Path) -> None:
    result = ("--json", "small/result.json")
    done("inspect", "small", *result)
    done("evaluate", "small", "--perplexity", "text.txt", "--seq-len", 64, "--report", "small")
    assert not_ours(Path("small")) is None
    Path("small/result.json").write_text("{}")
    assert not_ours(Path("small")) == "result.json, which was changed since llm-pruner wrote it"


def test_weights_that_were_changed_are_noticed(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        (folder / "model.safetensors").write_bytes(bytes(2**25))
    assert not_ours(tmp_path / "out") is None
    with (tmp_path / "out/model.safetensors").open("r+b") as weights:
        weights.seek(2**20)
        weights.write(bytes([1]) * 2**20)  # as training would, of the same size
    assert not_ours(tmp_path / "out") == (
        "model.safetensors, which was changed since llm-pruner wrote it"
    )


# Files of results.


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("inspect", "zoo/dense", "--json", "zoo/dense/config.json"), "would replace a file of a"),
        (("inspect", "zoo/dense", "--json", "small/model.safetensors"), "would replace a file of"),
        (("inspect", "zoo/dense", "--json", "small/tokenizer.json"), "would replace a file of a"),
        (
            ("inspect", "zoo/dense", "--json", "small/report.json"),
            "would replace a file of a model",
        ),
        (("inspect", "zoo/dense", "--json", "link"), "would replace a file of a model"),
        (("inspect", "zoo/dense", "--json", "text.txt"), "exists and does not hold results, so it"),
        (("inspect", "zoo/dense", "--json", "zoo"), "is a folder; name the file to write"),
        (("inspect", "zoo/dense", "--json", "text.txt/a"), "cannot be made, since"),
        (("bench", "zoo/dense", "--json", "small/plan.json"), "would replace a file of a model"),
        (
            ("evaluate", "zoo/dense", "--perplexity", "data.json", "--json", "data.json"),
            "is used by",
        ),
        (("prune", "zoo/dense", "--out", "new", "--json", "new/plan.json"), "would replace a file"),
        (("prune", "zoo/dense", "--out", "new", "--json", "new"), "is used by this command"),
        (("prune", "zoo/dense", "--out", "new/x", "--json", "new"), "is used by this command"),
        (
            ("prune", "zoo/dense", "--out", "p", "--dry-run", "--json", "p"),
            "is used by this command",
        ),
        (("compare", "small", "--html", "text.txt"), "exists and does not hold a page, so it is"),
        (("compare", "small", "--html", "a", "--json", "a"), "is used by this command otherwise"),
    ],
)
def test_files_that_results_never_replace(
    work: Path, unloaded: None, command: tuple[object, ...], said: str
) -> None:
    Path("data.json").write_text('[{"text": "mine"}]')
    Path("link").symlink_to("small/plan.json")
    more = QUICK if command[0] == "prune" else ()
    assert said in refused(*command, *more)


def test_answers_of_chat_are_results(work: Path) -> None:
    file = Path("said.json")
    for said in ("[]", '[{"question": "a", "answers": {}}]'):
        file.write_text(said)
        done("compare", "small", "--json", file)
        assert isinstance(json.loads(file.read_text()), dict)
    for mine in ("[1]", '[{"question": "a"}]', "1", "[", "{}"):
        file.write_text(mine)
        assert "does not hold results" in refused("compare", "small", "--json", file)


def test_a_dry_run_replaces_a_plan_alone(work: Path, unloaded: None) -> None:
    dry = ("prune", "zoo/dense", "--dry-run", "--overwrite", *QUICK)
    said = refused(*dry, "--out", "small/plan.json")
    assert said == "--out small/plan.json would replace a file of a model; name another file"
    said = refused(*dry, "--out", "zoo/dense/plan.json")
    assert said.endswith("plan.json would be taken for a file of a model; name another file")
    said = refused(*dry, "--out", "text.txt")
    assert said.startswith("--out text.txt exists and does not hold a plan, so it is not replaced")
    said = refused(*dry, "--out", "zoo/dense/model.safetensors")
    assert "would replace a file of a model" in said


def test_what_is_no_file_is_written_into(work: Path) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)
    done("compare", "small", "--json", "pipe")
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)
    assert json.loads(os.read(reader, 2**16))
    os.close(reader)
    shown = done("compare", "small", "--json", "/dev/stdout").out
    assert json.loads(shown)
    opened_by_a_shell = os.open("log.txt", os.O_RDWR | os.O_CREAT)
    write_output(Path(f"/dev/fd/{opened_by_a_shell}"), "{}")
    assert os.read(opened_by_a_shell, 9) == b"{}"  # the file that is open, and no other
    os.close(opened_by_a_shell)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # files as any others
        file = Path(folder, "of.json")
        for text in ('{"groups": 1, "package_version": ""}', "{}"):
            write_output(file, text)
        assert file.read_text() == "{}"
        Path(folder, "mine.txt").write_text("mine")
        assert "mine.txt exists" in refused("compare", "small", "--json", f"{folder}/mine.txt")


def test_a_link_to_results_is_followed(work: Path) -> None:
    Path("kept").mkdir()
    Path("kept/result.json").write_text('{"of": "an earlier run"}')
    Path("link.json").symlink_to("kept/result.json")
    done("compare", "small", "--json", "link.json")
    assert Path("link.json").is_symlink()
    assert "of" not in json.loads(Path("kept/result.json").read_text())


def test_results_lie_in_the_home_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not read ``~`` behind the sign of ``--json=~/found.json``."""
    home, tasks = work / "home", []

    def write(out: Path, *_: object, **__: object) -> tuple[()]:
        tasks.append(out)
        return ()

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(evaluating, "write_task_files", write)
    done("compare", "small", "--json=~/found.json", "--html=~/found.html")
    done("tasks", "--out=~/tasks", "--tasks-data=data")
    assert {path.name for path in home.iterdir()} == {"found.json", "found.html"}
    assert tasks == [home / "tasks"]
    assert not Path("~").exists()
    assert "--json is empty" in refused("compare", "small", "--json=")


# Durability.


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def fsync(handle: int) -> None:
        seen.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")

    def moves(name: str) -> None:
        real = getattr(Path, name)

        def move(path: Path, target: Path) -> Path:
            seen.append(f"{name} {target.name}")
            return real(path, target)

        monkeypatch.setattr(Path, name, move)

    monkeypatch.setattr(os, "fsync", fsync)
    moves("rename")
    moves("replace")
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    *before, moved, after = seen
    assert {"flush file", "flush inner", f"flush {folder.name}"} == set(before)
    assert (moved, after) == ("rename out", f"flush {tmp_path.name}")
    seen.clear()
    with new_file(tmp_path / "text") as partial:
        partial.write_text("x")
    assert seen == [f"flush {partial.name}", "replace text", f"flush {tmp_path.name}"]


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
        result = run("prune", "zoo/dense", "--out", "new/out", *QUICK)
    assert result.code == 1
    assert result.err == (
        "llm-pruner: File too large; free space or give another place, then run again\n"
    )
    assert contents(work) == before


def test_mapped_files_have_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ids.bin"
    allocate(file, 2**20)
    assert file.read_bytes() == bytes(2**20)
    assert file.stat().st_blocks * 512 >= 2**20
    with file.open("r+b") as stream:
        stream.write(b"kept")
    allocate(file, 2**20)
    assert file.read_bytes()[:4] == b"kept"
    with monkeypatch.context() as patch:
        patch.delattr(os, "posix_fallocate")
        allocate(tmp_path / "elsewhere.bin", 3 * 2**19)
    assert (tmp_path / "elsewhere.bin").stat().st_blocks * 512 >= 3 * 2**19

    def cannot(handle: int, offset: int, size: int) -> None:
        assert not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_APPEND  # of which glibc says EBADF
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", cannot)
        allocate(tmp_path / "shared.bin", 3 * 2**19)
    assert (tmp_path / "shared.bin").read_bytes() == bytes(3 * 2**19)
    assert (tmp_path / "shared.bin").stat().st_blocks * 512 >= 3 * 2**19
    with small_disk(2**19), pytest.raises(OSError, match="too large"):
        allocate(tmp_path / "none.bin", 2**20)
    assert not (tmp_path / "none.bin").exists()


def test_the_teachers_memory_has_its_room(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(work)
    monkeypatch.setattr(os, "posix_fallocate", full)
    options = ("--data", "text.txt", "--teacher", "zoo/dense", *TRAIN)
    result = run("recover", "small", "--out", "better", *options)
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "No space left on device; free space or give another place" in result.err
    assert contents(work) == before


# What a killed run leaves.


def test_what_dead_runs_left_goes_and_what_live_ones_make_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial-abcd_123", ".out.old-abcd_123", ".other.partial-abcd_123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".out.partial-of-mine").touch()
    (tmp_path / ".out.partial-abcd_124").touch()
    with new_folder(tmp_path / "out") as live, new_folder(tmp_path / "another") as another:
        check_output(out, overwrite=False)
        left = {path.name for path in tmp_path.iterdir()}
    kept = {".other.partial-abcd_123", ".out.partial-of-mine"}
    assert left == kept | {live.name, another.name}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"out", "another"}


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


def test_a_folder_of_a_lower_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed, but an empty one is renamed over; a full one is refused at once."""
    old, empty = written(tmp_path / "old", file="old"), tmp_path / "empty"
    empty.mkdir()
    rename = Path.rename

    def on_an_overlay(path: Path, target: Path) -> Path:
        if path in (old, empty):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    check_output(old, overwrite=True)
    monkeypatch.setattr(Path, "rename", on_an_overlay)
    with pytest.raises(UserError, match=r"old is of a lower layer of an overlay and cannot be rep"):
        check_output(old, overwrite=True)
    written(empty, file="new")
    assert (empty / "file").read_text() == "new"
    assert (old / "file").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_a_result_is_in_place_before_the_old_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = written(tmp_path / "out", file="old"), written(tmp_path / "new", file="new")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    placed.clear()
    monkeypatch.setattr("llm_pruner.files.disk.remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(new, out)
    assert placed == [out]


def test_compress_puts_its_result_in_place_like_any(work: Path) -> None:
    run_folder = work / "out.compressing"
    pruned = written(run_folder / "pruned", file="new")
    written(work / ".out.old-abcd_123/out", file="old")  # killed between the two renames
    compressing.move_result(pruned, work / "out", True, ())
    assert (work / "out/file").read_text() == "new"
    assert not list(work.glob(".*"))
    discard(run_folder)
    assert not list(work.glob("out.*"))


# Folders of runs.


def test_two_recoveries_do_not_share_a_folder(work: Path, unloaded: None) -> None:
    command = ("recover", "small", "--out", "better", "--data", "text.txt", *TRAIN)
    with begun(work / "better.recovering", RECOVERING):
        for more in ((), ("--resume",), ("--restart",)):
            said = refused(*command, *more)
            assert said == (
                "another process is at work in better.recovering; wait for it, or end it"
            )


def test_a_recovery_holds_its_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("recover", "small", "--out", "better", "--data", "text.txt", *TRAIN)
    others = []

    def meanwhile(*_: object, **__: object) -> None:
        others.append(run(*command, "--resume"))
        raise KeyboardInterrupt

    monkeypatch.setattr(recovering, "recover_", meanwhile)
    result = run(*command)
    assert (result.code, result.err) == (130, "llm-pruner: interrupted; nothing was written\n")
    assert (others[0].code, len(others[0].err.splitlines())) == (2, 1)
    assert "another process is at work in better.recovering" in others[0].err
    assert not Path("better.recovering").exists()


@pytest.mark.parametrize("more", [(), ("--restart",), ("--resume",)])
@pytest.mark.parametrize("name", ["thesis.txt", "adapter"])
def test_a_folder_that_holds_no_run_is_left_alone(
    work: Path, unloaded: None, more: tuple[str, ...], name: str
) -> None:
    for folder in ("better.recovering", "better.compressing"):
        Path(folder).mkdir()
        Path(folder, name).write_text("mine")
    data = ("--data", "text.txt", *TRAIN)
    said = refused("recover", "small", "--out", "better", *data, *more)
    assert said == (
        f"better.recovering holds {name}, which no run wrote, and a run would keep its work there; "
        "move that away or give another --out"
    )
    if "--resume" not in more:
        said = refused("compress", "small", "--out", "better", *more)
        assert said.startswith(f"better.compressing holds {name}, which no run wrote")


def test_what_comes_to_lie_in_a_run_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out.compressing"
    with opened(folder, {"ratio": 0.2}, restart=False) as run_there:
        (folder / "thesis.txt").write_text("mine")
        run_there.remove()
    assert contents(folder) == {"thesis.txt": b"mine"}
    with begun(tmp_path / "out.recovering", RECOVERING):
        remove_run(tmp_path / "out.recovering", RECOVERING)
    assert [path.name for path in tmp_path.iterdir()] == ["out.compressing"]


def test_a_run_that_was_killed_after_its_result_was_in_place(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("recover", "small", "--out", "better", "--data", "text.txt", *TRAIN)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def killed_in_training(*_: object, work: Path, **__: object) -> None:
        (work / "step-000001").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir, "remove_run", killed)
        assert run(*command).code == 130
    assert Path("better.recovering/run.json").exists()
    result = run(*command, "--resume")
    assert (result.code, Path("better.recovering").exists()) == (2, False)
    assert "better exists and is not empty" in result.err
    # One that was to replace that result by the same options is not finished.
    with monkeypatch.context() as patch:
        patch.setattr(recovering, "recover_", killed_in_training)
        assert run(*command, "--overwrite").code == 130
    result = run(*command, "--resume")
    assert (result.code, Path("better.recovering/step-000001").exists()) == (2, True)
    assert "better exists and is not empty" in result.err


def test_the_folder_of_a_run_lies_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    assert RECOVERING.beside(tmp_path / "link") == tmp_path / "disk/out.recovering"


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
    assert not list(tmp_path.iterdir())


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_alike():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


DROPPED = """
import os, signal, sys, time
from llm_pruner.cli import build, main

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def slow(*_):
    if sys.argv[2] == "changed":
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("half imported") from error
    Dropping()
    time.sleep(900)

build.check_json = slow
sys.argv = ["llm-pruner", "inspect", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("what", ["dropped", "changed"])
def test_a_signal_of_which_a_library_makes_something_else(what: str) -> None:
    command = [sys.executable, "-c", DROPPED, what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (
        143,
        "llm-pruner: interrupted; nothing was written\n",
    )


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
    with pytest.raises(UserError, match=r"absent\.txt does not exist; check the path"):
        evaluating.measure_apart(EvaluateSettings(model="any", perplexity="absent.txt"))
    # As if the system had killed it.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), 9)\n")
    said = r"^any could not be measured: its process was ended by signal 9; if memory was short, u"
    with pytest.raises(LLMPrunerError, match=said):
        evaluating.measure_apart(EvaluateSettings(model="any", perplexity="absent.txt"))


# Inputs that change.


def test_weights_that_change_while_they_are_used(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(real: Any) -> Any:
        def change(*args: Any, **keywords: Any) -> Any:
            file = work / "zoo/dense/model.safetensors"
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
            return real(*args, **keywords)

        return change

    said = (
        "llm-pruner: zoo/dense/model.safetensors was changed while it was in use, so nothing was "
        "saved; run again when nothing else writes there"
    )
    before = contents(work)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "discover", changing(pruning.discover))
        result = run("prune", "zoo/dense", "--out", "new", *QUICK)
    assert (result.code, result.err) == (2, f"{said}\n")
    assert contents(work) == before
    with monkeypatch.context() as patch:
        patch.setattr(recovering, "recover_", changing(recovering.recover_))
        options = ("--data", "text.txt", "--teacher", "zoo/dense", *TRAIN)
        result = run("recover", "small", "--out", "better", *options)
    assert (result.code, result.err.splitlines()[-1]) == (2, said)
    assert not Path("better").exists()
    states = file_states("small")
    check_file_states(states)
    Path("small/config.json").unlink()
    with pytest.raises(UserError, match=r"small/config\.json was removed while it was in use"):
        check_file_states(states)
