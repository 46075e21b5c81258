"""Settings that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator

from llm_pruner.runtime.memory import free_bytes, on_gpu
from llm_pruner.settings.options import Settings, option, written
from llm_pruner.settings.words import LOCAL_TASKS, parse_bytes

LOADING, OUTPUT, CALIBRATION = "Loading", "Output", "Calibration text"
TASKS = "Zero-shot tasks"
"""Headings in the help."""

_loading, _output, _text, _task = (
    partial(option, panel=panel) for panel in (LOADING, OUTPUT, CALIBRATION, TASKS)
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def once(value: Any) -> Any:
    """Return values without repeats; one alone as the only one."""
    values = (value,) if isinstance(value, str) else value
    named = isinstance(values, list | tuple) and all(isinstance(one, str) for one in values)
    return tuple(dict.fromkeys(values)) if named else values


Sources = Annotated[tuple[str, ...], BeforeValidator(once)]
"""Corpora or datasets; an option that may be given several times."""


def pairs(value: Any) -> Any:
    """Return texts such as ``name=3`` as {name: value}, each value read as YAML."""
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, Mapping) or not isinstance(texts, list | tuple):
        return value
    found = {}
    for text in texts:
        name, equals, said = str(text).partition("=")
        if not equals:
            raise ValueError(f"{text!r} has no value; write NAME=VALUE")
        try:
            found[name] = yaml.safe_load(said)
        except yaml.YAMLError:
            raise ValueError(f"the value of {name} is not YAML") from None
        if isinstance(found[name], str):
            with suppress(ValueError):  # YAML does not read 1e-6 as a number
                found[name] = float(said)
    return found


Pairs = Annotated[dict[str, Any], BeforeValidator(pairs)]
"""Named values; an option that may be given several times, as NAME=VALUE."""

by_comma = written(_names)
Names = Annotated[tuple[str, ...], by_comma]
"""Names, comma-separated in one option."""


class ModelSettings(Settings):
    """Which model, and how it is loaded."""

    model: str = option(
        ..., "Hub id, folder, .gguf file, or 'default' for SmolLM2-135M.", "MODEL", positional=True
    )
    dtype: str = _loading("float32", "float32, bfloat16, float16, or auto: as stored.", "TYPE")
    device: str = _loading("auto", "cpu, cuda, or auto: a GPU if there is one.", "NAME")
    revision: str | None = _loading(None, "Branch, tag or commit on the hub.", hidden=True)
    trust_remote_code: bool = _loading(False, "Run Python code that comes with the model.")

    def loading(self, model: str | Path | None = None, dtype: str | None = None) -> ModelSettings:
        """Return how this model, or another one such as a teacher, is loaded."""
        return ModelSettings(
            model=self.model if model is None else str(model),
            revision=self.revision if model is None else None,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def computing(self, model: str | Path | None = None) -> ModelSettings:
        """Return the same for computing: a model that is saved as stored computes in float32."""
        return self.loading(model, "float32" if self.dtype == "auto" else self.dtype)


Room = Annotated[int | str, written(parse_bytes, "auto")]

room_for_weights = partial(
    _loading,
    "auto",
    "Memory for the weights, such as 8GB; larger models are read block by block.",
    "SIZE",
)

SHARE_RESIDENT = 4
"""On a processor, weights stay in memory where they fit into one part in so many of the room."""


class MemorySettings(Settings):
    """How much of the memory the weights may take."""

    memory: Room = room_for_weights(shown="two fifths of what is free")

    def room(self, device: str) -> int:
        """Return bytes for the weights, by default so few that a cut and a refit fit beside."""
        return free_bytes(device) * 2 // 5 if isinstance(self.memory, str) else self.memory

    def resident(self, room: int, device: str) -> int:
        """Return the bytes of ``room`` up to which weights stay in memory.

        By default few on a processor: reading by blocks takes a fraction of the memory, and no
        longer.
        """
        by_choice = isinstance(self.memory, str) and not on_gpu(device)
        return room // SHARE_RESIDENT if by_choice else room


class FolderSettings(Settings):
    """The folder that is written."""

    out: Path = _output(..., "Folder to write.", "DIR", short="-o")
    overwrite: bool = _output(False, "Replace --out, if llm-pruner wrote all in it.")


class OutputSettings(FolderSettings):
    """The folder of a model that is written."""

    max_shard_size: Annotated[str, AfterValidator(lambda size: parse_bytes(size) and size)] = (
        _output("5GB", "Largest weight file.", hidden=True)
    )


class SavedSettings(ModelSettings):
    """A model that is read, and saved again."""

    dtype: str = _loading(
        "auto",
        "Of the saved weights: auto (as stored; computed in float32), float32, bfloat16, float16.",
        "TYPE",
    )


class WriterSettings(SavedSettings, OutputSettings):
    """A model that is read, and the folder that is made of it."""


class CalibrationSettings(Settings):
    """Text that importance is estimated on, and that compensation fits."""

    calibration: str = _text(
        "self",
        "self (the model writes text), chat (it writes questions and answers), a hub dataset, or a "
        ".txt, .jsonl, .json or .parquet file; several: c4,code or c4:0.6,code:0.4.",
        "SRC",
    )
    samples: int = _text(128, "Number of sequences.", "N", ge=1)
    seq_len: int = _text(128, "Tokens in each.", ge=2, hidden=True)
    score_samples: int | None = _text(
        None, "Estimate importance on only this many of the samples.", ge=1, hidden=True
    )
    text_split: str | None = _text(None, "Split of a hub dataset.", hidden=True)
    text_field: str | None = _text(None, "Field that holds the text.", hidden=True)
    kept: Path | None = option(
        None, "Folder that keeps the text of self, for other stages of a run.", hidden=True
    )


def _tasks(value: Any) -> Any:
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    return LOCAL_TASKS if names in (("paper",), ["paper"]) else names


class TaskSettings(Settings):
    """Zero-shot tasks of lm-evaluation-harness."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_tasks)] | None = _task(
        None,
        "Tasks of lm-evaluation-harness, such as boolq,piqa; paper: the seven of LLM-Pruner.",
        "NAMES",
    )
    tasks_data: Path | None = _task(
        None,
        "Folder with boolq.jsonl and so on, to run the seven without a network.",
        hidden=True,
        shown="the datasets on the hub",
    )
    limit: int | None = _task(
        None, "Only the first N items of each task, skill or prompt file.", "N", ge=1, shown="all"
    )
