"""llama.cpp's own server, which reads GGUF files: ``llama-server``, or the same in xllamacpp."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf

from llm_pruner.errors import UserError
from llm_pruner.evaluation.serving import HOST, Wanted, program_of
from llm_pruner.export.gguf_model import gguf_model

TITLE = "llama.cpp"
FORMAT = "gguf"
"""Format of `export` that it reads."""

_SPARE = 8
"""Tokens of a context that no text fills: at its very end a server stops."""

_XLLAMACPP = str(Path(__file__).with_name("_xllamacpp.py"))
_HAS_IT = "import sys, importlib.util as i; sys.exit(i.find_spec('xllamacpp') is None)"


def find(python: Path | None) -> list[str]:
    """Return the command that starts it; raise UserError if it is not here."""
    program = program_of("llama-server", python)
    if program is not None:
        return [program]
    beside = str(python or sys.executable)
    if subprocess.run([beside, "-I", "-c", _HAS_IT], check=False).returncode == 0:
        return [beside, "-I", _XLLAMACPP]
    raise UserError(
        f"there is no llama-server {'on the PATH' if python is None else f'beside {python}'}; put "
        "llama.cpp's there, or pip install xllamacpp and name its Python with --server-python if "
        "it is another one"
    )


_TYPES = {one.value: one.name.partition("_")[2].lower() for one in gguf.LlamaFileType}
"""Names of the types of files, as ``export --type`` has them."""


def counted(file: Path) -> tuple[int, int, str]:
    """Return the number of weights in a file, that of tokens, and the type; or raise UserError."""
    try:
        reader = gguf.GGUFReader(file)
        tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file} is no GGUF file of a model that can be read; name one") from error
    kind = reader.fields.get("general.file_type")
    said = "unknown type" if kind is None else _TYPES.get(kind.contents(), "unknown type")
    return sum(int(one.n_elements) for one in reader.tensors), tokens, said


def command(start: list[str], file: Path, wanted: Wanted) -> list[str]:
    """Return what serves a file."""
    if wanted.more and _XLLAMACPP in start:
        raise UserError(
            "--server-args are options of llama-server, and xllamacpp reads none; put llama-server "
            "on the PATH, or leave them out"
        )
    options: dict[str, object] = {
        "model": file,
        "host": HOST,
        "port": wanted.port,
        "ctx-size": wanted.texts * (wanted.tokens + _SPARE),
        "parallel": wanted.texts,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*start, *words, *wanted.more]


def how(model: Any, _config: Any, _saved_as: str) -> str:
    """Return how it serves a folder; see ``vllm.how``."""
    try:
        return f"exported as {gguf_model(model, 'it').architecture}"
    except UserError as error:
        raise UserError(re.split(r"; | \(", str(error))[0]) from error
