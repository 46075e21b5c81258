"""What ``prune`` refuses before it loads a model, and what it decides by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import Source, check_file, check_output
from llm_pruner.files.places import check_place
from llm_pruner.importance import Criterion
from llm_pruner.planning import Selection, Target
from llm_pruner.search.layer_allocation import AllocationSearch
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.types import Discovery


def check_out(out: Path, overwrite: bool, dry_run: bool, reads: Sequence[Source]) -> None:
    """Raise UserError if a run cannot write to ``out``: a folder, or with ``dry_run`` a file."""
    check_place(out, "--out")
    if not dry_run:
        check_output(out, overwrite, reads)
    elif out.is_dir():
        raise UserError(f"{out} is a folder; with --dry-run, --out names the plan file to write")
    elif out.is_file() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")
    else:
        check_file("--out", out, "plan", reads)


def check_split(
    target: Target | None, selection: Selection | None, find_best_split: bool | None
) -> None:
    """Raise UserError if a split of parameters is asked for where none are counted."""
    split = selection is not None and selection.split is not None
    if target is not None and target.kv_cache is not None and (split or find_best_split):
        raise UserError(
            f"a split shares out parameters, and {target} counts the cache; drop one of them"
        )


def check_search(search: AllocationSearch | None, target: Target, selection: Selection) -> None:
    """Raise UserError if a search would undo what was asked for."""
    if search is None:
        return
    if selection.uniform:
        raise UserError(
            "a search moves units between layers, and uniform layers lose the same; use one of them"
        )
    if target.unit_ratio is not None:
        raise UserError(
            f"{target} says what each layer loses, and a search moves units between layers; give "
            "a target in parameters (ratio or params) with it"
        )


def finds_split(
    target: Target | None,
    selection: Selection | None,
    criterion: Criterion,
    calibration: CalibrationSettings,
) -> bool:
    """Return whether a run finds the split of its budget by trial removals unless told otherwise.

    It does where there is something to split (several structures, and a number of parameters to
    remove that no split was given for, nor a ranking by measured damage), and text is there anyway,
    because the criterion reads it.
    """
    return (
        target is not None
        and target.unit_ratio is None
        and target.kv_cache is None
        and selection is not None
        and selection.split is None
        and selection.scope != "measured"
        and len(selection.structures) > 1
        and criterion.reads_text
        and calibration.samples > 1
    )


def default_protection(discovery: Discovery) -> tuple[int, int]:
    """Return how many layers stay whole at the start and at the end.

    The first and the last layers are the costliest to prune (arXiv 2305.11627, section 4.1): a
    quarter and a fifth of the layers, at most 4 and 3.
    """
    layers = max(
        (group.layer + 1 for group in discovery.groups if group.layer is not None), default=0
    )
    return min(4, layers // 4), min(3, layers // 5)
