"""A model as a file of another program: what is checked, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import check_file, free_bytes
from llm_pruner.models.checkpoint_files import stored_at
from llm_pruner.models.load import load
from llm_pruner.report.text import megabytes
from llm_pruner.settings.export import ExportSettings
from llm_pruner.settings.registry import entry


@dataclass(frozen=True)
class Exported:
    """A file that another program reads; ``facts`` are what the format says of it."""

    model: str
    to: str
    type: str
    path: Path
    bytes: int
    facts: dict[str, Any]


def export(settings: ExportSettings) -> Exported:
    """Write a model as a file of another program; UserError, before that, if it cannot be."""
    form, out = entry("export/formats", settings.to), settings.out
    form.require(settings.type, settings.like)
    check_file("--out", out, "GGUF", settings.reads, overwrite=settings.overwrite)
    loaded = load(settings, tokenizer_required=False)
    folder = stored_at(settings.model, settings.revision)
    assert folder is not None  # since it was loaded
    file = form.convert(loaded, folder, settings.type, settings.like)
    if file.bytes > free_bytes(out):
        raise UserError(
            f"{out} needs about {megabytes(file.bytes)}, and its disk has "
            f"{megabytes(free_bytes(out))} free; free some, or give another --out"
        )
    file.write(out.resolve())
    return Exported(loaded.name, settings.to, settings.type, out, out.stat().st_size, file.facts)
