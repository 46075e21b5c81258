"""What ``prune`` refuses before it loads a model, and what it decides by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import Source, check_file, check_output, check_place
from llm_pruner.importance import Criterion
from llm_pruner.settings.prune import PruneSettings
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


def finds_split(settings: PruneSettings, criterion: Criterion) -> bool:
    """Return whether the split of the budget is found by trial removals.

    Where it was not asked for by name, it is where there is something to split (several structures,
    and a number of parameters to remove), and text is there anyway, because the criterion reads it.

    Raises:
        UserError: a split of parameters is asked for where none are counted.
    """
    asked = "split" in settings.given
    if settings.kv_cache is not None and asked and settings.split != "equal":
        raise UserError(
            f"a split shares out parameters, and kv_cache={settings.kv_cache} counts the cache; "
            "drop one of them"
        )
    if settings.split != "auto":
        return False
    return asked or (
        settings.unit_ratio is None
        and settings.kv_cache is None
        and len(settings.structures) > 1
        and criterion.reads_text
        and settings.samples > 1
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
