"""llama.cpp's own quantiser, in a process of its own: a failed assertion there ends the process."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.runtime.processes import new_python
from llm_pruner.runtime.progress import track

_PROGRAM, _PACKAGE = "llama-quantize", "llama_cpp_py_sync"
_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")

_BY_LIBRARY = """
import sys
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
ffi, lib = get_ffi(), get_lib()
source, target, kind = sys.argv[1:]
asked = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
asked.ftype = getattr(lib, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(lib.llama_model_quantize(source.encode(), target.encode(), asked))
"""


def require_quantizer(kind: str) -> None:
    """Raise UserError if no llama.cpp is here that could make a type."""
    if shutil.which(_PROGRAM) is None and find_spec(_PACKAGE) is None:
        raise UserError(
            f"--type {kind} is made by llama.cpp, which is not here; pip install "
            f"'llm-pruner[gguf]', or put {_PROGRAM} on the PATH, or use --type q8_0"
        )


def quantize(source: Path, target: Path, kind: str, tensors: int) -> None:
    """Write a GGUF file of f32, f16 or bf16 in another type, such as ``q4_k_m``.

    ``tensors``: how many there are, for the bar. Raises LLMPrunerError with llama.cpp's last line.
    """
    program = shutil.which(_PROGRAM)
    command = [program] if program else new_python(_BY_LIBRARY)
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        [*command, source, target, kind.upper()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for _ in track(_tensors_of(process, last), f"quantizing to {kind}", tensors):
            pass
    if process.returncode:
        said = last[0] if last else f"code {process.returncode}"
        raise LLMPrunerError(f"llama.cpp could not write {kind} ({said}); use another --type")


def _tensors_of(process: subprocess.Popen[str], last: deque[str]) -> Iterator[int]:
    """Yield the number of each tensor that is begun."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            last.append(" ".join(line.split())[:200])
        if found := _LINE.search(line):
            yield int(found[1])
