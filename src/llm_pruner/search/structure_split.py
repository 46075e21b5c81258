"""Trial removals: find by measured damage how a budget is split between structures.

Scores of different structures are on no common scale. So candidate splits are carried out on a copy
that shares the weights, and the one with the least divergence from the dense model on held-out text
is taken. Where a refit follows, which repairs some better, that split and the best structure alone
are both refitted and judged again; the latter stays unless the split does clearly better.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from math import inf, isfinite

import torch
from torch import nn

from llm_pruner.compensation import refit_
from llm_pruner.errors import InfeasibleError, UserError
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.planning import Numbering, Selection, Target, allocate
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.progress import track
from llm_pruner.search.divergence import DivergenceMeter
from llm_pruner.surgery.cut import cut_copy
from llm_pruner.types import Discovery, Scores, SplitTrial

_LOG = logging.getLogger(__name__)

SHARES = (0.05, 0.1, 0.2, 0.4)
"""Shares of the removed parameters that are tried for each structure beside the largest one."""

TOKENS = 2048
"""Held-out tokens that trials are judged on."""

MARGIN = 0.1
"""Share of the divergence by which a split must do better than one structure after a refit.

The held-out text is of the calibration's kind. On text of another kind removed heads cost more than
it shows: SmolLM2-135M with a fifth of the removed parameters in heads is as far from the dense
model on held-out C4 as with FFN channels alone, and a tenth further on WikiText-2.
"""

REFIT_TOKENS = 8192
"""Tokens that a trial is refitted on. With fewer, FFN channels look worse than they will be: their
consumers have more inputs to fit than those of heads."""

REFIT_WORK, FEWEST = 3 * 10**12, 2048
"""Tokens times parameters that a trial's refit may take, and tokens that it takes at least: on a
large model two such refits would be as much work as the final one."""

REFIT_RIDGE = 1.0
"""The ridge of trials, which so few tokens would choose."""


def find_split(
    model: nn.Module,
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    target: Target,
    numbering: Numbering,
    held_out: torch.Tensor,
    refit_on: torch.Tensor | None = None,
    known: HiddenStates | None = None,
) -> tuple[Selection, list[SplitTrial]]:
    """Return the selection with the best split that was found, and all trials.

    Every structure is tried alone. From the best of these, each other structure is then given
    growing shares for as long as the divergence falls. Where no structure reaches the target alone
    the selection is as it was, and one ranking over all structures shares it out; no trial then.

    Args:
        held_out: tokens that the scores did not see, shape (samples, seq_len).
        refit_on: tokens to refit trials on, where the pruned model will be; None if it will not.
        known: hidden states of the model, of the first of these samples or all.

    Raises:
        UserError: nothing reaches the target, or no split can be judged.
    """
    meter = DivergenceMeter(model, held_out)
    trials: list[SplitTrial] = []
    failure: UserError | None = None

    def attempt(split: Mapping[str, float]) -> float:
        nonlocal failure
        try:
            candidate = replace(selection, split=dict(split))
            removal = allocate(discovery, scores, candidate, target, numbering)
            divergence = meter.of(cut_copy(model, discovery, removal))
        except (UserError, InfeasibleError) as error:
            _LOG.info("split %s: %s", split, error)
            return inf
        if not isfinite(divergence):
            failure = UserError(
                f"the logits on the {len(held_out)} calibration samples of the trials are not "
                "finite, so no split can be judged; load the model in float32, or give "
                "--set split=SHARES"
            )
            return inf
        trials.append(SplitTrial(dict(split), divergence))
        _LOG.info("split %s: divergence %.4f", split, divergence)
        return divergence

    def refitted(split: Mapping[str, float], tokens: torch.Tensor) -> SplitTrial:
        removal = allocate(discovery, scores, replace(selection, split=split), target, numbering)
        network = cut_copy(model, discovery, removal)
        give_back()
        size = sum(one.numel() for one in model.parameters())
        some = tokens[: refit_samples(size, tokens.shape[1])]
        refit_(network, model, discovery, removal, some, (REFIT_RIDGE, REFIT_RIDGE), known)
        give_back()
        return SplitTrial(dict(split), meter.of(network), refitted=True)

    names = selection.structures
    alone = [dict.fromkeys(names, 0.0) | {name: 1.0} for name in names]
    results = [(attempt(split), split) for split in track(alone, "trials: one structure")]
    best, split = min(results, key=lambda result: result[0])
    if not trials:
        if failure is not None:
            raise failure
        allocate(discovery, scores, selection, target, numbering)  # else nothing reaches it
        return selection, []
    main = max(split, key=lambda name: split[name])
    others = [name for name in names if name != main]
    for name in track(others, "trials: two structures"):
        for share in SHARES:
            rest = split[main] + split[name] - share
            if rest <= 0:
                break
            found = attempt({**split, name: share, main: rest})
            if found == best:  # too small a share for a unit of it: the same model
                continue
            if found > best:
                break
            best, split = found, {**split, name: share, main: rest}
    alone_best = {name: float(name == main) for name in names}
    tried = any(trial.split == alone_best for trial in trials)
    if refit_on is not None and len(refit_on) < 2:
        refit_on = None  # a fit needs one more, which chooses the ridge
    if refit_on is not None and tried and split != alone_best:
        for candidate in track([alone_best, split], "trials: refitted"):
            trials.append(refitted(candidate, refit_on))
        if trials[-1].divergence >= (1 - MARGIN) * trials[-2].divergence:
            split = alone_best
    marked = [replace(trial, taken=trial.split == split) for trial in trials]
    return replace(selection, split=split), marked


def refit_samples(parameters: int, seq_len: int) -> int:
    """Return how many samples a trial of a model of this size is refitted on, at most."""
    tokens = min(REFIT_TOKENS, max(FEWEST, REFIT_WORK // parameters))
    return max(2, tokens // seq_len)


def hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last eighth of samples, at most ``TOKENS``, for trials, and the rest."""
    count = max(1, min(len(tokens) // 8, TOKENS // tokens.shape[1]))
    if len(tokens) < 2:
        raise UserError(
            "trials need text of their own and there is 1 calibration sample; give more samples, "
            "or say the split yourself"
        )
    return tokens[-count:], tokens[:-count]
