"""How much memory is free where a container or a job scheduler limits it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llm_pruner.runtime import memory


def group(folder: Path, names: tuple[str, str], numbers: tuple[str, int], cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in zip(names, numbers, strict=True):
        (folder / name).write_text(f"{number}\n")
    (folder / "memory.stat").write_text(f"anon 7\nactive_file {cached}\ninactive_file 1\n")


@pytest.fixture
def controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CONTROLS", tmp_path / "fs")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    return tmp_path


def test_the_least_limit_of_a_group_and_those_above_it_holds(controls: Path) -> None:
    names = ("memory.max", "memory.current")
    (controls / "cgroup").write_text("0::/jobs/one\n")
    assert memory.free_bytes("cpu") == 10**12
    group(controls / "fs", names, ("max", 5))
    group(controls / "fs/jobs/one", names, ("max", 900))
    assert memory.free_bytes("cpu") == 10**12
    group(controls / "fs/jobs", names, ("9000", 3000), cached=500)
    assert memory.free_bytes("cpu") == 6501  # files that it would give up are free
    group(controls / "fs/jobs/one", names, ("4000", 900))
    assert memory.free_bytes("cpu") == 3101
