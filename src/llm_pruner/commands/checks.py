"""What files and disks can tell before a model is loaded, which may take minutes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import (
    Source,
    check_file,
    check_output,
    free_bytes,
    nearest,
)
from llm_pruner.models.stored import stored_size
from llm_pruner.planning import Target
from llm_pruner.report.text import megabytes
from llm_pruner.settings.common import ModelSettings


def check_out(out: Path, overwrite: bool, dry_run: bool, reads: Sequence[Source]) -> None:
    """Raise UserError if a run cannot write to ``out``: a folder, or with ``dry_run`` a file."""
    if not dry_run:
        check_output(out, overwrite, reads)
    elif os.path.isdir(out):
        raise UserError(f"{out} is a folder; with --dry-run, --out names the plan file to write")
    elif os.path.isfile(out) and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")
    else:
        check_file("--out", out, "plan", reads)


def check_space(
    out: Path, model: ModelSettings, target: Target | None = None, *, copies: float = 1
) -> None:
    """Raise UserError if the disk is too full for the weights of a result.

    They are estimated from the headers of the model's weight files, the type in which the model is
    loaded and saved, and the share that is kept; the rest of a checkpoint is small beside them. A
    model that is not on this machine yet is not asked about.

    Args:
        out: where the result will lie.
        model: what it is made of.
        target: what is removed; None: nothing.
        copies: how many such results lie there at one time.

    Raises:
        UserError: or a weight file is damaged, or the model has no more parameters than are to be
            kept.
    """
    stored = stored_size(model.model, model.revision, model.dtype)
    if stored is None:
        return
    parameters, bytes_ = stored
    needed = int(bytes_ * _share_kept(target, parameters) * copies)
    free = free_bytes(out)
    if needed > free:
        kind = "" if model.dtype == "auto" else f" in {model.dtype}"
        raise UserError(
            f"{out} needs about {megabytes(needed)} for weights{kind}, and the disk of "
            f"{nearest(out)} has {megabytes(free)} free; free some, or give another --out"
        )


def _share_kept(target: Target | None, parameters: int | None) -> float:
    """Return the least share of the weights that is kept; one of units may remove less."""
    if target is None:
        return 1.0
    if target.params is not None:
        return 0.0 if parameters is None else target.kept(parameters) / parameters
    shares = (target.ratio, target.unit_ratio, target.kv_cache)
    return 1.0 - next(share for share in shares if share is not None)
