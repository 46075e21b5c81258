"""Outputs are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import MANIFEST, atomic_directory, check_output, write_output


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with atomic_directory(out, overwrite=False) as folder:
        assert folder.parent == out.parent
        (folder / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o055 == 0o055  # not private, as temporary folders are


def test_a_folder_has_the_group_of_a_shared_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        (folder / "inner").mkdir()
    assert (tmp_path / "out").stat().st_mode & 0o2055 == 0o2055
    assert (tmp_path / "out/inner").stat().st_mode & 0o2000


def written(out: Path) -> Path:
    """Return a folder that this package wrote, with the file ``old``."""
    with atomic_directory(out, overwrite=False) as folder:
        (folder / "old").write_text("old")
    return out


def fill_and_fail(out: Path, *, overwrite: bool) -> None:
    with atomic_directory(out, overwrite) as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("on the way")


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on the way"):
        fill_and_fail(tmp_path / "a/out", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", overwrite=False):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_content_is_kept_without_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("old")
    for attempt in (check_output, lambda *args: atomic_directory(*args).__enter__()):
        with pytest.raises(UserError, match=r"out exists and is not empty.*--overwrite"):
            attempt(out, False)
    assert (out / "mine").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_the_whole_folder_at_the_end(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    with pytest.raises(RuntimeError, match="on the way"):
        fill_and_fail(out, overwrite=True)
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out/file").exists()


def test_a_folder_that_may_not_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the system, since nothing is forbidden to root."""
    folder = tmp_path / "out"
    folder.mkdir()
    check_output(folder, overwrite=False)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    with pytest.raises(UserError, match="out may not be written; name another folder"):
        check_output(folder, overwrite=False)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="out is a file"):
        check_output(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match=r"cannot be made, since .*out is not a folder"):
        check_output(tmp_path / "out/inner", overwrite=True)


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a/plan.json"
    write_output(path, "ü\n")
    write_output(path, "two\n")
    assert path.read_bytes() == b"two\n"
    with pytest.raises(UnicodeEncodeError):
        write_output(path, "\ud800")
    assert path.read_bytes() == b"two\n"
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
