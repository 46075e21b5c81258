"""From sums per tensor to one importance per unit."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.blockwise import blockwise_sums
from llm_pruner.importance.criteria import MEASURES
from llm_pruner.importance.criterion import Criterion
from llm_pruner.importance.gradients import whole_sums
from llm_pruner.importance.needs import Need, Sums, collect_needs, layer_parameters, magnitude_sums
from llm_pruner.importance.observation import Observation
from llm_pruner.importance.observing import measure as measured
from llm_pruner.models.blockwise import NotBlockwise
from llm_pruner.models.forward import undisturbed
from llm_pruner.types import Discovery, FloatArray, Group

_LOG = logging.getLogger(__name__)


def score(
    model: nn.Module,
    discovery: Discovery,
    criterion: Criterion,
    *,
    input_ids: torch.Tensor | None,
    seed: int,
    groups: Collection[str] | None = None,
) -> dict[str, FloatArray]:
    """Return the importance of every unit; higher means keep.

    A unit's score is that of its slice in each member, joined over the members by
    ``criterion.aggregate``. A member that is a buffer carries no importance. A layer is scored as
    the sum over its parameters, each whole: sum |w| for l1, the norm of all its weights for l2, the
    terms of ``Criterion`` for taylor; ``aggregate`` does not apply to it, since a layer has no
    members of which one could be the last. Random scores are uniform in [0, 1), drawn once per
    unit, and depend on ``seed`` and the group's name alone.

    Args:
        model: maps token ids, shape (samples, seq_len), to logits, shape (samples, seq_len,
            vocabulary): the output itself, its ``logits`` or its first entry. Samples must not
            influence each other. It is left exactly as it was.
        discovery: the groups of this model.
        criterion: what to measure.
        input_ids: calibration tokens, integers of shape (samples, seq_len); read by taylor and by
            the criteria that look at activations.
        seed: of ``random``.
        groups: names of the groups to score; None scores all that are not frozen.

    The criteria in ``criteria.MEASURES`` have their formulas there. A group without a linear module
    that reads it, which follows others, weighs nothing in those that need moments of its input.

    Returns:
        Group name -> finite float64 scores of shape (size,), in the order of ``discovery``.

    Raises:
        UserError: an unknown group; no, or unusable, calibration tokens; a sample whose loss is NaN
            or infinite (named); a tensor whose weights or gradients are not finite (named).
    """
    chosen = _choose(discovery, groups)
    if criterion.name == "random":
        return {group.name: _random(group, seed) for group in chosen}
    if criterion.name in MEASURES:
        return _measured(model, chosen, criterion.name, input_ids)
    needs = collect_needs(model, chosen)
    if criterion.name == "taylor":
        sums = _taylor_sums(model, needs, criterion, input_ids)
    else:
        sums = magnitude_sums(model, needs, criterion.name)
    _require_finite(sums, criterion)
    return {group.name: _group_scores(model, group, sums, criterion) for group in chosen}


def _choose(discovery: Discovery, names: Collection[str] | None) -> list[Group]:
    if names is None:
        return [group for group in discovery.groups if group.frozen is None]
    known = [group.name for group in discovery.groups]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "list them with inspect"
            raise UserError(f"unknown group {name!r}: the model has {len(known)} groups; {hint}")
    return [group for group in discovery.groups if group.name in names]


def _random(group: Group, seed: int) -> FloatArray:
    digest = hashlib.sha256(f"{seed}:{group.name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(group.size)


def _measured(
    model: nn.Module, groups: list[Group], name: str, input_ids: torch.Tensor | None
) -> dict[str, FloatArray]:
    measure = MEASURES[name]
    text = _require_text(input_ids, name)

    def formula(seen: Observation) -> FloatArray:
        if measure.needs & {"moments", "gram"} and not seen.readings:
            # A follower without a consumer of its own weighs nothing.
            return np.zeros(seen.group.size)
        return measure.formula(seen)

    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        ids = text.detach().to(next(model.parameters()).device, torch.long)
        scores = measured(model, ids, groups, measure.needs, formula, measure.where_linear)
    for group in groups:
        if not np.isfinite(scores[group.name]).all():
            raise UserError(
                f"importance of {group.name} is not finite; load the model in float32, or look for "
                "extreme values in its weights"
            )
    return scores


def _taylor_sums(
    model: nn.Module,
    needs: Mapping[str, Need],
    criterion: Criterion,
    input_ids: torch.Tensor | None,
) -> dict[str, Sums]:
    text = _require_text(input_ids, criterion.name)
    if not needs:
        return {}
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        device = next(model.parameters()).device
        ids = text.detach().to(device, torch.long)
        try:
            return blockwise_sums(model, ids, criterion, needs)
        except NotBlockwise as reason:
            _LOG.info("gradients of the whole model at once: %s", reason)
        return whole_sums(model, ids, criterion, needs)


def _require_text(input_ids: torch.Tensor | None, name: str) -> torch.Tensor:
    if input_ids is None:
        raise UserError(f"criterion {name!r} needs calibration text and got none; give some, or l2")
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.is_complex():
        raise UserError(
            f"calibration tokens of shape {tuple(input_ids.shape)} and type {input_ids.dtype} "
            "cannot be scored; give integers of shape (samples, seq_len)"
        )
    if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise UserError(
            f"calibration of {input_ids.shape[0]} samples x {input_ids.shape[1]} tokens predicts "
            "no token; give at least 1 sample of 2 tokens"
        )
    return input_ids


def _require_finite(sums: Mapping[str, Sums], criterion: Criterion) -> None:
    for tensor, found in sums.items():
        parts = [*found.by_dim.values(), np.array([found.total])]
        if all(np.isfinite(part).all() for part in parts):
            continue
        if criterion.name == "taylor":
            raise UserError(
                f"the gradient of {tensor} is not finite, so its importance is unknown; load the "
                "model in float32, or look for extreme values in its weights"
            )
        raise UserError(
            f"{tensor} holds NaN or infinite weights, so its importance is unknown; load a sound "
            "checkpoint"
        )


def _group_scores(
    model: nn.Module, group: Group, sums: Mapping[str, Sums], criterion: Criterion
) -> FloatArray:
    if group.modules:
        layers = [layer_parameters(model, module) for module in group.modules]
        return np.array([_layer(names, sums, criterion) for names in layers], dtype=np.float64)
    members = [member for member in group.members if not member.buffer]
    if not members:
        return np.zeros(group.size)
    if criterion.aggregate == "last":
        last = max(member.order for member in members)
        members = [member for member in members if member.order == last]
    scores = np.stack(
        [
            _slices(sums[member.tensor].by_dim[member.dim][member.index].sum(1), criterion)
            for member in members
        ]
    )
    return _aggregate(scores, criterion.aggregate)


def _slices(totals: FloatArray, criterion: Criterion) -> FloatArray:
    """Turn the sums over each unit's slice, shape (units,), into its score in this member."""
    if criterion.name == "l2":
        return np.sqrt(totals)
    return np.abs(totals)  # changes vector-wise taylor only: all else is a sum of magnitudes


def _layer(names: list[str], sums: Mapping[str, Sums], criterion: Criterion) -> float:
    totals = np.array([sums[name].total for name in names], dtype=np.float64)
    if criterion.name == "l2":
        return float(np.sqrt(totals.sum()))
    return float(np.abs(totals).sum())


def _aggregate(scores: FloatArray, aggregate: str) -> FloatArray:
    """Join scores of shape (members, units) over the members; ``last`` was chosen before."""
    if aggregate == "max":
        return np.asarray(scores.max(0))
    if aggregate == "prod":
        with np.errstate(divide="ignore"):  # a zero factor: log -inf, and the product is 0
            return np.asarray(np.exp(np.log(scores).mean(0)))
    return np.asarray(scores.sum(0))
