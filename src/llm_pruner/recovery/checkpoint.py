"""Everything a run needs to go on, as safetensors and JSON: nothing is pickled or unpickled.

And how the weights that are trained come off the model and on it.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_pruner.errors import UserError
from llm_pruner.files.disk import read_json

Folder = Callable[[Path], AbstractContextManager[Path]]
"""Gives a folder that appears under its name once it is complete and on the disk."""

_STEP = re.compile(r"step-(\d+)")
_RANDOM, _VALUES = "random.safetensors", "state.json"
_MALFORMED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What values that are not as they were written raise where they are used."""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Refuse a file that is missing or damaged."""
    try:
        yield
    except (OSError, SafetensorError, *_MALFORMED) as error:
        raise UserError(
            f"{file} is missing or damaged ({type(error).__name__}); begin anew with "
            "--set restart=true"
        ) from error


def step_folder(work: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return work / f"step-{step:06d}"


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint, None if there is none; clears away what was never completed."""
    if not work.is_dir():
        return None
    for path in work.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    found = {int(m[1]): path for path in work.iterdir() if (m := _STEP.fullmatch(path.name))}
    return found[max(found)] if found else None


def drop_older(work: Path, newest: Path) -> None:
    """Remove all checkpoints but the newest."""
    for path in work.iterdir():
        if _STEP.fullmatch(path.name) and path != newest:
            shutil.rmtree(path)


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, which may share memory."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    save_file(apart, file)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read what ``write_tensors`` wrote; UserError if it is not there or damaged."""
    with _reading(file):
        return load_file(file)


def write_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Write plain values."""
    (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")


def read_values(folder: Path) -> dict[str, Any]:
    """Read what ``write_values`` wrote; UserError if it is not there or damaged."""
    with _reading(folder / _VALUES):
        return dict(read_json(folder / _VALUES))


def optimizer_values(
    optimizer: Any, keep: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimizer's tensors by name, and the rest of its state, plain values, or UserError.

    ``keep``: whether tensors are wanted here; processes that hold parts of them must all ask.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for path, value in _flat("", state["state"]):
        if isinstance(value, torch.Tensor):
            one = whole(value)
            if keep:
                tensors[path] = one.cpu()
        elif isinstance(value, int | float | bool | None):
            plain[path] = value
        else:
            raise UserError(
                f"the optimizer keeps a {type(value).__name__}, which no checkpoint holds; "
                "give --trainer another optim"
            )
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def _flat(path: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a dictionary of dictionaries holds, with the keys that lead there."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{path}{key}.", value)
        else:
            yield f"{path}{key}", value


def read_optimizer_(folder: Path, rest: Mapping[str, Any], optimizer: Any) -> None:
    """Put back what ``optimizer_values`` gave; the tensors come from ``optimizer.safetensors``."""
    tensors = read_tensors(folder / "optimizer.safetensors")
    with _reading(folder / _VALUES):
        state: dict[int, dict[str, Any]] = {}
        weights = [one for group in optimizer.param_groups for one in group["params"]]
        for path, value in {**tensors, **dict(_flat("", rest["plain"]))}.items():
            index, *inner, key = path.split(".")
            if isinstance(value, torch.Tensor) and value.shape == weights[int(index)].shape:
                value = spread_like(value, weights[int(index)])
            place = state.setdefault(int(index), {})
            for one in inner:
                place = place.setdefault(one, {})
            place[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def write_random(folder: Path) -> dict[str, Any]:
    """Write the states of all random generators; return those of Python and numpy."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
    legacy: Any = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(legacy[1].astype(np.int64))
    write_tensors(folder / _RANDOM, tensors)
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [int(legacy[2]), int(legacy[3]), float(legacy[4])],
    }


def read_random(folder: Path, rest: Mapping[str, Any]) -> None:
    """Put back what ``write_random`` wrote and returned."""
    tensors = read_tensors(folder / _RANDOM)
    with _reading(folder / _VALUES):
        torch.random.set_rng_state(tensors["cpu"])
        devices = [tensors[name] for name in sorted(tensors) if name.startswith("cuda.")]
        if devices and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
        position, has_gauss, gauss = rest["numpy"]
        words = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, position, has_gauss, gauss))
        version, own_words, own_gauss = rest["python"]
        random.setstate((version, tuple(own_words), own_gauss))


def merge_(trained: Any) -> Any:
    """Add adapters to the weights and return the plain model, in eval mode."""
    plain = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    plain.requires_grad_(True)
    # PEFT leaves marks that a later save would act upon.
    for mark in ("_hf_peft_config_loaded", "peft_config"):
        vars(plain).pop(mark, None)
    return plain.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are trained."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose parts lie with several processes; each must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, if ``other`` has such parts; else the tensor."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of the weights that are trained."""
    return {
        name: whole(weight.detach()).to("cpu", copy=True)
        for name, weight in trainable(model).items()
    }


@torch.no_grad()
def set_weights_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what ``trained_weights`` gave; UserError if names or shapes are other ones."""
    own = trainable(model)
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise UserError(
            "the checkpoint holds other weights than this run trains; begin anew with "
            "--set restart=true"
        )
    for name, weight in own.items():
        weight.copy_(spread_like(weights[name], weight))
