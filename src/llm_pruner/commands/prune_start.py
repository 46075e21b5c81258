"""What a run starts from: how much goes, where from and by what; and whether there is room."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_pruner import planning
from llm_pruner.data.selfmade import LARGE, WRITERS, faster_in_bfloat16
from llm_pruner.data.text import shares_of
from llm_pruner.errors import UserError
from llm_pruner.files import outputs
from llm_pruner.importance import Criterion
from llm_pruner.models.activation_store import free_on_disk
from llm_pruner.models.checkpoint_files import stored_size
from llm_pruner.planning import Selection, Target
from llm_pruner.report.text import megabytes
from llm_pruner.settings.common import CalibrationSettings, ModelSettings, OutputSettings
from llm_pruner.settings.prune import AMOUNTS, READ_BY, PruneSettings
from llm_pruner.types import Discovery

_LOG = logging.getLogger(__name__)

_RUN = {"plan", "dry_run", "estimate", "verify", "kept", "memory", "refit_text", "repair_minutes"}
"""Settings of a run that say nothing about what goes; so do those of the model and the output."""


def target_of(settings: PruneSettings) -> Target | None:
    """Return how much is removed; None if a plan says what."""
    if settings.plan is not None:
        return None
    return Target(**settings.model_dump(include={*AMOUNTS}))


def selection_of(settings: PruneSettings) -> Selection:
    """Return where from; what is ``auto`` is not decided yet."""
    first, last, multiple = settings.protect_first, settings.protect_last, settings.round_to
    return Selection(
        structures=settings.structures,
        scope=settings.scope,
        protect_first=0 if first == "auto" else first,
        protect_last=0 if last == "auto" else last,
        layer_ranges=settings.layers or {},
        round_to=1 if isinstance(multiple, str) else multiple,  # named: decided later
        split=settings.split if isinstance(settings.split, dict) else None,
        spread=settings.spread,
        uniform=settings.uniform,
    )


def of_what_can_go(selection: Selection, discovery: Discovery) -> Selection:
    """Return a selection that nobody named without structures of which nothing can be removed."""
    named = {*(selection.split or {}), *selection.layer_ranges}
    reasons = {
        one: planning.why_none_can_go(discovery, selection, one)
        for one in selection.structures
        if one not in named
    }
    left = tuple(one for one in selection.structures if reasons.get(one) is None)
    if not left or left == selection.structures:
        return selection
    for one in selection.structures:
        if one not in left:
            _LOG.warning("all %s of this model stay: %s", one, reasons[one])
    return replace(selection, structures=left)


def criterion_of(settings: PruneSettings) -> Criterion:
    """Return how importance is estimated."""
    return Criterion(settings.criterion, settings.order, settings.reduction, settings.aggregate)


def finds_split(settings: PruneSettings, criterion: Criterion) -> bool:
    """Return whether trial removals find how structures share the budget.

    Where that was not asked for by name, they do if there is something to share and text is read
    anyway.
    """
    counts_parameters = settings.unit_ratio is None and settings.kv_cache is None
    if settings.split != "auto" or not counts_parameters:
        return False
    if "split" in settings.given:
        return True
    return len(settings.structures) > 1 and criterion.reads_text and settings.samples > 1


def default_protection(discovery: Discovery) -> tuple[int, int]:
    """Return how many layers stay whole at the start and at the end.

    The first and the last layers are the costliest to prune (arXiv 2305.11627, section 4.1): a
    quarter and a fifth of the layers, at most 4 and 3.
    """
    layers = max(
        (group.layer + 1 for group in discovery.groups if group.layer is not None), default=0
    )
    return min(4, layers // 4), min(3, layers // 5)


def tries_layers(settings: PruneSettings, criterion: Criterion) -> bool:
    """Return whether trials of each layer alone find how much each one loses.

    Where that was not asked for by name, they do if text is read anyway. They share the budget out
    between layers, which ``scope="global"`` allows, and are judged on samples of their own.
    """
    if not settings.layer_trials or settings.scope != "global" or settings.samples < 2:
        return False
    return "layer_trials" in settings.given or criterion.reads_text


def planned(
    settings: PruneSettings,
    selection: Selection,
    criterion: Criterion,
    *,
    samples: int | None,
    refits: bool,
) -> dict[str, Any]:
    """Return all settings that decide about a plan, as they were used; ``samples`` were read."""
    unread = set() if samples else set(CalibrationSettings.model_fields)
    unread |= {name for name, criteria in READ_BY.items() if criterion.name not in criteria}
    decided = {
        # No folders: the same text gives the same plan wherever it lies.
        "preset": None if settings.preset is None else Path(settings.preset).name,
        "calibration": without_folders(settings.calibration),
        "samples": samples,
        "compensation": settings.compensation if refits else "none",
        "protect_first": selection.protect_first,
        "protect_last": selection.protect_last,
        # A number says nothing of heads.
        "round_to": settings.round_to if selection.heads_to > 1 else selection.round_to,
        "split": None if selection.split is None else dict(sorted(selection.split.items())),
        "spread": selection.spread,
        "layer_trials": tries_layers(settings, criterion) or None,
    }
    run = {*ModelSettings.model_fields, *OutputSettings.model_fields, *_RUN}
    values = settings.model_dump(mode="json", exclude=run | unread) | decided
    return {
        name: values[name]
        for name in type(settings).model_fields
        if name not in run | unread and values[name] is not None
    }


def without_folders(mixture: str) -> str:
    """Return a mixture of texts without the folders of files."""
    shares = shares_of(mixture)
    equal = len({*shares.values()}) == 1
    parts = (f"{Path(one).name}{'' if equal else f':{n:g}'}" for one, n in shares.items())
    return ",".join(parts)


def check_space(
    out: Path, model: ModelSettings, target: Target | None = None, *, copies: float = 1
) -> None:
    """Raise UserError if the disk has no room for the weights of ``copies`` results.

    Their size follows from the headers of the weight files, the type in which they are saved and
    the share that is kept. Nothing is known of a model that is not on this machine yet.

    Args:
        target: what is removed; None: nothing.
    """
    stored = stored_size(model.model, model.revision, model.dtype)
    if stored is None:
        return
    parameters, bytes_ = stored
    needed, free = int(bytes_ * share_kept(target, parameters) * copies), outputs.free_bytes(out)
    if needed > free:
        raise UserError(
            f"{out} needs about {megabytes(needed)} for weights, and the disk of "
            f"{outputs.nearest(out)} has {megabytes(free)} free; free some, or give another --out"
        )


def writes_slowly(
    settings: PruneSettings, size: tuple[int | None, int] | None, device: str
) -> bool:
    """Whether a model of this `stored_size` would read and cast all weights for each token."""
    written = not WRITERS.keys().isdisjoint(shares_of(settings.calibration))
    kind: torch.dtype = getattr(torch, settings.computing().dtype)
    parameters = LARGE if size is None else size[0] or 0
    return written and not faster_in_bfloat16(parameters, kind, device)


def holds_new_weights(size: tuple[int | None, int] | None) -> bool:
    """Whether the disk has room for the new weights of a refit of a model of this `stored_size`,
    and for the folder that is written, if that is on the same disk."""
    return size is None or 2 * size[1] < free_on_disk()


def share_kept(target: Target | None, parameters: int | None) -> float:
    """Return the least share of the weights that is kept; one of units may remove less."""
    if target is None:
        return 1.0
    if target.params is not None:
        return 0.0 if parameters is None else target.kept(parameters) / parameters
    shares = (target.ratio, target.unit_ratio, target.kv_cache)
    return 1.0 - next(share for share in shares if share is not None)
