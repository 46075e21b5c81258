"""Estimate, allocate, cut and refit, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from llm_pruner.commands.refitter import Refitter
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, score
from llm_pruner.models.load import LoadedModel
from llm_pruner.planning import (
    Cost,
    Level,
    PlanCalibration,
    Selection,
    Survivors,
    Target,
    choose_groups,
    find_allocation,
    step_targets,
)
from llm_pruner.runtime.precision import fast_matmul, mixed_precision
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.calibration import calibration_record, hold_out, read_calibration
from llm_pruner.search.layer_allocation import (
    AllocationSearch,
    Searched,
    search_allocation,
)
from llm_pruner.search.per_group import TOKENS as LEVEL_TOKENS
from llm_pruner.search.per_group import measure_levels
from llm_pruner.search.structure_split import Trial, find_split
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.types import Discovery, FloatArray, IntArray


@dataclass(frozen=True)
class StepSettings:
    """What the steps are to do.

    Attributes:
        target: how much they remove together.
        cost: what a unit costs in another currency than parameters; None for these.
        selection: where from.
        criterion: how importance is estimated.
        calibration: text for it.
        seed: of the calibration text, of ``random`` and of the search.
        steps: how many.
        find_best_split: choose the split between structures by trial removals, in the first step.
        search: move units between layers by trial; None: do not.
        cut_last: whether the last step cuts; a dry run needs only its plan.
    """

    target: Target
    cost: Cost | None
    selection: Selection
    criterion: Criterion
    calibration: CalibrationSettings
    seed: int
    steps: int
    find_best_split: bool
    search: AllocationSearch | None
    cut_last: bool

    @property
    def measures(self) -> bool:
        """Whether groups are compared by the damage of trial removals."""
        return self.selection.scope == "measured"

    @property
    def judges(self) -> bool:
        """Whether anything is judged on text of its own."""
        return self.find_best_split or self.measures or self.search is not None


@dataclass
class Steps:
    """What the steps did.

    Attributes:
        selection: with the split that was found.
        removal: all that was removed, in the numbering of the dense model.
        calibration: the text.
        scores: of the first estimate, which are the dense model's.
        trials: splits of the budget that were tried.
        levels: what trial removals in each group alone cost.
        searched: what a search between layers found, in each step.
    """

    selection: Selection
    removal: dict[str, IntArray] = field(default_factory=dict)
    calibration: PlanCalibration | None = None
    scores: dict[str, FloatArray] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    searched: list[Searched] = field(default_factory=list)


def prune_in_steps(
    loaded: LoadedModel,
    dense: Discovery,
    surgeon: Surgeon,
    settings: StepSettings,
    refitter: Refitter | None,
) -> Steps:
    """Carry out the steps on a model, in place.

    Args:
        loaded: the model.
        dense: its groups.
        surgeon: cuts it.
        settings: see there.
        refitter: repairs it after each cut.

    Raises:
        UserError: there is no text or too little, or no weights.
    """
    clock, calibration = surgeon.clock, settings.calibration
    done = Steps(settings.selection)
    survivors = Survivors.dense(dense)
    targets = step_targets(survivors.parameters, settings.target, settings.steps)
    if settings.criterion.name != "random":
        _require_weights(loaded.model)
    tokens = scored = held_out = None
    if settings.criterion.reads_text or refitter is not None or settings.judges:
        text = read_calibration(loaded, calibration, settings.seed, clock)
        tokens = scored = text.input_ids
        done.calibration = calibration_record(text.settings, calibration.score_samples)
        if settings.judges:
            held_out, scored = hold_out(tokens)
    discovery, cost = dense, settings.cost
    for number, step in enumerate(targets):
        scores = _estimate(loaded.model, discovery, done.selection, survivors, settings, scored)
        done.scores = done.scores or dict(scores)
        clock.stop("estimate")
        measured: list[Level] = []
        if held_out is not None and settings.measures:
            some = held_out[: max(1, LEVEL_TOKENS // held_out.shape[1])]
            measured = measure_levels(
                loaded.model, discovery, scores, done.selection, survivors, some
            )
            done.levels.extend(measured)
            clock.stop("trials")
        if held_out is not None and settings.find_best_split and number == 0:
            with mixed_precision():
                done.selection, tried = find_split(
                    loaded.model,
                    discovery,
                    scores,
                    done.selection,
                    step,
                    survivors,
                    held_out,
                    measured,
                    refit_on=scored if refitter is not None and refitter.fits else None,
                )
            done.trials.extend(tried)
            clock.stop("trials")
        selection = done.selection
        if cost is not None and number > 0:
            cost = cache_cost(loaded.model, discovery, selection, survivors, cost.dense)
        allocation = find_allocation(discovery, scores, selection, step, survivors, measured, cost)
        if held_out is not None and settings.search is not None:
            allocation, found = search_allocation(
                loaded.model,
                discovery,
                allocation,
                held_out,
                settings.search.shared(settings.steps),
                within_structures=selection.split is not None or selection.scope == "local",
                seed=settings.seed + number,
            )
            done.searched.append(found)
            clock.stop("search")
        removal = allocation.removal()
        survivors = survivors.after(removal)
        clock.stop("plan")
        last = number + 1 == len(targets)
        if not last or settings.cut_last:
            surgeon.cut(discovery, removal)
            if refitter is not None and tokens is not None:
                refitter.refit(survivors.removal(), tokens)
        if not last:
            discovery = discover(loaded.model)
            clock.stop("discover")
    done.removal = survivors.removal()
    return done


def _estimate(
    model: nn.Module,
    discovery: Discovery,
    selection: Selection,
    survivors: Survivors,
    settings: StepSettings,
    tokens: torch.Tensor | None,
) -> dict[str, FloatArray]:
    """Return the scores of all groups that may lose units and of those that go with them."""
    chosen = choose_groups(discovery, selection, survivors)
    names = {group.name for group in chosen}
    names |= {companion.group for group in chosen for companion in group.companions}
    seen = None if tokens is None else tokens[: settings.calibration.score_samples]
    with fast_matmul():
        return score(
            model, discovery, settings.criterion, input_ids=seen, seed=settings.seed, groups=names
        )


def _require_weights(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model has no weights here; only --criterion random works without")
