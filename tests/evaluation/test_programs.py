"""What a program that a model wrote may not do, and what counts as passing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llm_pruner.evaluation import programs
from llm_pruner.evaluation.programs import ProgramRun, run_program

REQUIRED = "LLM_PRUNER_NEEDS_NAMESPACES"
"""Set where a test that skips would hide a failure, as in CI."""


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skip where the system permits no namespaces, of which other programs than ours are asked."""
    asked = ("unshare", "-Urnmpi", "--fork", "mount", "-t", "tmpfs", "none", "/proc")
    found = subprocess.run(asked, capture_output=True, text=True)
    if found.returncode == 0:
        return
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and there are no namespaces: {found.stderr}")
    pytest.skip("this system permits no namespaces")


def without(monkeypatch: pytest.MonkeyPatch, folder: Path, part: str, other: str) -> None:
    """Run programs by a script in which a part is another one."""
    script = Path(programs.__file__).with_name("sandbox.py").read_text()
    assert part in script
    (folder / "sandbox.py").write_text(script.replace(part, other))
    monkeypatch.setattr(programs, "__file__", str(folder / "programs.py"))


@pytest.fixture(params=["namespaces", "hook alone"])
def shut_off(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Run programs as here, and as where the system permits no namespaces."""
    if request.param == "namespaces":
        request.getfixturevalue("namespaces")
        return True
    without(monkeypatch, tmp_path, "libc.unshare(_NAMESPACES)", "1")
    return False


def test_a_program_passes_if_its_end_is_reached(shut_off: bool) -> None:
    found = run_program("import math\nopen('note', 'w').write('x')\nassert math.gcd(4, 6) == 2")
    assert found == ProgramRun("passed", None, shut_off, shut_off)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("assert False", "AssertionError"),
        ("def (", "SyntaxError"),
        ("def f(x: Missing): pass\nf.__annotations__", "NameError"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
        ("import os\nos._exit(0)", None),
        ("input()", "EOFError"),
        ("x = bytearray(3 * 2**30)", "MemoryError"),
        ("while True:\n    __import__('os').fork()", "PermissionError"),
        ("open('large', 'w').write('x' * 2**25)", "OSError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "PermissionError"),
        ("__import__('subprocess').run(['true'])", "PermissionError"),
        ("import shutil\nshutil.rmtree('/tmp/nothing-here')", "PermissionError"),
    ],
)
def test_what_does_not_pass(source: str, error: str | None) -> None:
    found = run_program(source)
    assert (found.ending, found.error) == ("failed", error)


def test_nothing_outside_its_folder_is_written(shut_off: bool, tmp_path: Path) -> None:
    place = tmp_path / "outside"
    found = run_program(f"open({str(place)!r}, 'w').write('x')")
    assert (found.ending, found.error) == ("failed", "PermissionError")
    assert not place.exists()


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(("files", "size"), [(9, 15 * 2**20), (9999, 0)])
def test_its_folder_has_bounds(files: int, size: int) -> None:
    found = run_program(f"for n in range({files}): open(str(n), 'w').write('x' * {size})")
    assert (found.ending, found.error) == ("failed", "OSError")


@pytest.mark.usefixtures("namespaces")
def test_other_processes_are_not_seen() -> None:
    seen = "import os\nassert not [one for one in os.listdir('/proc') if one.isdecimal()]"
    assert run_program(seen).ending == "passed"


def test_an_endless_program_is_stopped_with_all_it_started() -> None:
    begun = time.monotonic()
    threads = (
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
    )
    assert run_program(f"{threads}while True: pass", seconds=0.7).ending == "timed out"
    assert time.monotonic() - begun < 10
    assert run_program("import time\ntime.sleep(99)", seconds=0.1).ending == "timed out"


@pytest.mark.usefixtures("shut_off")
def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    source = "import time\ntime.sleep(99)"
    script = str(Path(programs.__file__).with_name("sandbox.py"))
    run_it = (
        "from llm_pruner.evaluation import programs\n"
        f"programs.__file__ = {script!r}\n"
        f"programs.run_program({source!r}, seconds=60)"
    )
    place = {**os.environ, "TMPDIR": str(tmp_path)}  # of a folder that nobody removes
    runner = psutil.Popen([sys.executable, "-c", run_it], env=place)
    while len(started := runner.children(recursive=True)) < 2:  # the sandbox, and its child
        assert runner.poll() is None
        time.sleep(0.01)
    runner.kill()
    runner.wait()
    end = time.monotonic() + 30
    while any(map(lives, started)):
        assert time.monotonic() < end
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    """Whether a process does something; nobody may ask how one without a parent ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_waiting_is_not_computing() -> None:
    assert run_program("import time\ntime.sleep(1)", seconds=0.5).ending == "passed"


@pytest.mark.usefixtures("namespaces")
def test_namespaces_hold_where_the_hook_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What code in C would do, of which the hook does not hear."""
    without(monkeypatch, tmp_path, "    _watch(folder)\n", "")
    outside = run_program(f"open({str(tmp_path / 'x')!r}, 'w')")
    network = run_program("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)")
    others = run_program("import os\nassert os.getpid() == 1 and os.getppid() == 0")
    assert outside.error == "OSError"  # a file system that is read-only
    assert network.error == "OSError"  # unreachable
    assert others.ending == "passed"  # it sees no process above it
