"""Estimate, allocate, cut and refit, step by step."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from llm_pruner.commands.refitter import Refitter
from llm_pruner.data.calibration import Calibration, read_calibration
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.importance import Criterion, score
from llm_pruner.models.load import LoadedModel
from llm_pruner.planning import (
    Cost,
    Numbering,
    Selection,
    Target,
    allocate,
    choose_groups,
    step_targets,
)
from llm_pruner.runtime.precision import fast_matmul, mixed_precision
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.structure_split import find_split, hold_out
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.types import Discovery, FloatArray, IntArray, Scores, SplitTrial

Estimator = Callable[[nn.Module, Discovery, Set[str], torch.Tensor | None], Scores]
"""Model, its groups, the names of those to score, tokens (samples, length) -> importance."""


@dataclass
class Steps:
    """What the steps did.

    Attributes:
        selection: with the split that was found.
        removal: all that was removed, in the numbering of the dense model.
        text: what importance was estimated on; None if nothing was read.
        scores: of the first estimate, which are the dense model's.
        trials: splits of the budget that were tried.
    """

    selection: Selection
    removal: dict[str, IntArray] = field(default_factory=dict)
    text: Calibration | None = None
    scores: dict[str, FloatArray] = field(default_factory=dict)
    trials: list[SplitTrial] = field(default_factory=list)


def prune_in_steps(
    loaded: LoadedModel,
    dense: Discovery,
    surgeon: Surgeon,
    settings: PruneSettings,
    *,
    target: Target,
    selection: Selection,
    criterion: Criterion,
    cost: Cost | None = None,
    find_best_split: bool = False,
    refitter: Refitter | None = None,
    estimate: Estimator | None = None,
    text: Calibration | None = None,
) -> Steps:
    """Carry out the steps on a model, in place.

    Args:
        loaded: the model.
        dense: its groups.
        surgeon: cuts it.
        settings: text, seed, number of steps, and whether the last one cuts.
        target: how much they remove together.
        selection: where from.
        criterion: how importance is estimated.
        cost: what a unit costs in another currency than parameters; None for these.
        find_best_split: choose the split between structures by trial removals, in the first step.
        refitter: repairs it after each cut.
        estimate: gives importance in place of the criterion.
        text: what is read in place of what the settings name.

    Raises:
        UserError: there is no text or too little, or no weights.
    """
    clock = surgeon.clock
    done = Steps(selection)
    numbering = Numbering.dense(dense)
    targets = step_targets(numbering.parameters, target, settings.steps)
    if criterion.name != "random":
        _require_weights(loaded.model)
    tokens = scored = held_out = None
    if criterion.reads_text or refitter is not None or find_best_split:
        text = text or read_calibration(loaded, settings, settings.seed, clock)
        tokens = scored = text.input_ids
        done.text = text
        if find_best_split:
            held_out, scored = hold_out(tokens)

    def by_criterion(
        model: nn.Module, groups: Discovery, names: Set[str], seen: torch.Tensor | None
    ) -> Scores:
        with fast_matmul():
            return score(
                model, groups, criterion, input_ids=seen, seed=settings.seed, groups=set(names)
            )

    estimate = estimate or by_criterion
    discovery = dense
    for number, step in enumerate(targets):
        names = _scored(discovery, done.selection, numbering)
        seen = None if scored is None else scored[: settings.score_samples]
        scores = estimate(loaded.model, discovery, names, seen)
        done.scores = done.scores or dict(scores)
        clock.stop("estimate")
        if held_out is not None and number == 0:
            with mixed_precision():
                done.selection, tried = find_split(
                    loaded.model,
                    discovery,
                    scores,
                    done.selection,
                    step,
                    numbering,
                    held_out,
                    refit_on=None if refitter is None else scored,
                )
            done.trials.extend(tried)
            clock.stop("trials")
        selection = done.selection
        if cost is not None and number > 0:
            cost = cache_cost(loaded.model, discovery, selection, numbering, cost.dense)
        removal = allocate(discovery, scores, selection, step, numbering, cost=cost)
        numbering = numbering.after(removal)
        clock.stop("plan")
        last = number + 1 == len(targets)
        if not last or not settings.dry_run:
            surgeon.cut(discovery, removal)
            if refitter is not None and tokens is not None:
                refitter.refit(numbering.removal(), tokens)
        if not last:
            discovery = discover(loaded.model)
            clock.stop("discover")
    done.removal = numbering.removal()
    return done


def _scored(discovery: Discovery, selection: Selection, numbering: Numbering) -> set[str]:
    """Return the names of all groups that may lose units and of those that go with them."""
    chosen = choose_groups(discovery, selection, numbering)
    names = {group.name for group in chosen}
    return names | {companion.group for group in chosen for companion in group.companions}


def _require_weights(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model has no weights here; only --criterion random works without")
