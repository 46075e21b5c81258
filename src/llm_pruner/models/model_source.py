"""What is given for a model: the place that it is read from, its config, and what can be wrong.

What transformers and the code of a model raise becomes one line, in ``in_one_line``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file

from llm_pruner.errors import UserError, check_installed, in_short
from llm_pruner.models import checkpoint_files as on_disk
from llm_pruner.models.gguf_file import complete_from_gguf_
from llm_pruner.settings.options import near

_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("*.tiktoken", "tekken.json", "tokenizer_config.json"),
)
_PACKED_METHODS = ("torchao", "compressed-tensors")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from.

    Attributes:
        folder: what ``from_pretrained`` is given: a folder or a hub id.
        name: as ``LoadedModel.name``.
        shared: what config, weights and tokenizer are loaded with.
    """

    folder: str
    name: str
    shared: dict[str, Any]
    has_tokenizer: bool = True

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.shared

    @property
    def place(self) -> Path | None:
        """The folder on this machine, if it is there."""
        return on_disk.stored_at(self.folder, self.shared.get("revision"))


def find_source(
    source: str, revision: str | None, trust: bool, weights: bool = True
) -> ModelSource:
    """Return where a model is read from; UserError if nothing that can be one is there."""
    path = on_disk.local_path(source)
    shared = {"revision": revision, "trust_remote_code": trust}
    if path.is_dir():
        _check_folder(path, weights)
        there = any(next(path.glob(pattern), None) for pattern in _TOKENIZERS)
        return ModelSource(str(path), on_disk.name_of(path), shared, there)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path} does not exist; name a .gguf file, a folder or a hub id")
        # By its whole path: transformers takes a file of that name in the current folder first.
        gguf = {"gguf_file": str(path.absolute()), "revision": None}
        return ModelSource(str(path.parent), path.stem, gguf)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        what = "is a file that is no .gguf" if path.exists() else "does not exist"
        raise UserError(
            f"{source} {what}; name a folder with config.json and safetensors, a .gguf file, a "
            "hub id, or 'default'"
        )
    return ModelSource(source, source, shared)


def _check_folder(path: Path, weights: bool) -> None:
    """Raise UserError unless a folder has a config and, if asked, complete weights."""
    if not (path / on_disk.CONFIG).is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} has no config.json, so it is no checkpoint; name a folder that "
            "save_pretrained wrote"
        )
    if weights and (path / on_disk.CONFIG).is_file():
        on_disk.stored_tensors(path)


def read_config(source: str, found: ModelSource, packed: bool) -> Any:
    """Read the config of a model, and refuse adapters and packed weights."""
    # Transformers would load the adapter without a word.
    if find_adapter_config_file(found.folder, revision=found.shared["revision"]):
        raise UserError(
            f"{source} holds an adapter (adapter_config.json); merge it into its model with "
            "merge_and_unload of peft, and name what that saves"
        )
    config = AutoConfig.from_pretrained(found.folder, **found.shared)
    method = None if found.is_gguf else packing_of(config)
    if method in _PACKED_METHODS and packed:
        check_installed(f"{source} is packed by {method}, and", (method.replace("-", "_"),))
    elif method is not None:
        run = "can only be run, by evaluate and bench"
        raise UserError(
            f"{source} is quantized ({method}), and its packed weights "
            f"{run if method in _PACKED_METHODS else 'are not read'}; name the original checkpoint"
        )
    if found.is_gguf:
        complete_from_gguf_(config, Path(found.shared["gguf_file"]))
    return config


def packing_of(config: Any) -> str | None:
    """Return how weights are packed; None if they are not."""
    for one in (config, config.get_text_config(decoder=True)):
        quantization = getattr(one, "quantization_config", None)
        if quantization is not None:
            return str(dict(quantization).get("quant_method", ""))
    return None


def find_device(name: str) -> str:
    """Return the device of a name; ``auto`` is the first GPU, or else the CPU.

    The ``auto`` of accelerate may spread a model over GPUs and memory, with hooks that move the
    weights of a module as it is called; passes block by block do not see through them.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, dtype=torch.float64, device=name)  # sums are taken in float64
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({in_short(error)}); use cpu or one that is there"
        ) from error
    return name


def download_missing(source: str, found: ModelSource) -> None:
    """Fetch a model of the hub if it is not here, since its size decides how it is read."""
    if found.folder == source and not on_disk.local_path(source).exists():
        revision = found.shared["revision"]
        if on_disk.stored_size(source, revision, "auto") is None:
            on_disk.download(source, revision, found.shared["trust_remote_code"])


@contextmanager
def in_one_line(source: str) -> Iterator[None]:
    """Turn what transformers or the code of a model raises into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{source} does not fit into the free memory of the GPU; free some, or give another "
            "--dtype or --device cpu"
        ) from error
    except Exception as error:  # readers and code of models raise anything
        text = str(error)
        if "trust_remote_code" in text:
            raise UserError(
                f"{source} brings Python code of its own, which runs only with "
                "--trust-remote-code; read the code before you allow it"
            ) from error
        if "does not recognize this architecture" in text:
            advice = "install a newer transformers"
        elif "gated" in text or "restricted" in text:
            advice = "accept its licence on the hub, then log in with 'hf auth login'"
        elif on_disk.local_path(source).exists():
            advice = "copy or download it again, or name another model"
        else:
            advice = f"{near(source, [on_disk.DEFAULT])}check the name and the connection"
        raise UserError(f"{source} cannot be loaded ({in_short(error)}); {advice}") from error
