"""What ``pip install`` takes of the source tree."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_every_file_of_the_package() -> None:
    """Hatchling leaves out what ``.gitignore`` names, and says nothing."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="pip install -e '.[dev]'")
    held = {one.distribution_path for one in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    files = [path for path in (ROOT / "src/llm_pruner").rglob("*") if path.is_file()]
    wanted = [path.relative_to(ROOT / "src") for path in files if path.suffix != ".pyc"]
    assert held == {str(path) for path in wanted}
