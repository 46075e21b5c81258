"""The allocator setting of the command: it holds, and gives way to the user's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LINUX = sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION") is not None

SCRIPT = """
import resource, sys
import torch
from llm_pruner.runtime.memory import keep_all_blocks, keep_large_blocks
asked, size = sys.argv[1], int(sys.argv[2])
said = keep_large_blocks() if asked != "all" else False
print(keep_all_blocks() if asked != "large" else said)
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(size)
before = faults()
for _ in range(20):
    torch.ones(size)
print(faults() - before)
"""


def run(asked: str = "large", size: int = 2**20, **environment: str) -> list[str]:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    rest = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked, str(size)],
        env={**rest, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not LINUX, reason="glibc alone")
def test_memory_of_large_tensors_is_kept() -> None:
    said, faults = run()
    assert said == "True"
    # 4 MiB are 1,024 pages, of which every tensor would fault in its own.
    assert int(faults) < 2048


@pytest.mark.skipif(not LINUX, reason="glibc alone")
def test_memory_of_larger_ones_is_kept_where_that_of_large_ones_is() -> None:
    huge = {"THP_MEM_ALLOC_ENABLE": "0"}  # else 64 MiB are 32 pages
    said, faults = run("both", 2**24, **huge)
    assert said == "True"
    assert int(faults) < 16384
    said, faults = run("all", 2**24, **huge)  # in a process that is not the command's
    assert said == "False"
    assert int(faults) > 100_000


KERNELS = """
import os
from llm_pruner.runtime.memory import PRUNING, keep_kernels
keep_kernels(PRUNING)
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
"""


def test_few_kernels_are_kept_unless_the_user_says_otherwise() -> None:
    environment = {**os.environ, "LRU_CACHE_CAPACITY": "7"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["128", "7"]


RETURNED = """
import torch
from llm_pruner.runtime.memory import give_back, keep_large_blocks
keep_large_blocks()
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [torch.ones(2**20) for _ in range(64)]
del blocks[::2]
last = blocks[-1]
blocks.clear()
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not LINUX, reason="glibc alone")
def test_free_memory_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 200 * 2**20
