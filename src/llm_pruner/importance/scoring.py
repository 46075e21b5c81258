"""One importance per unit: from sums over tensors, or from what a criterion sees of activations."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from llm_pruner.discovery.run import changed_since
from llm_pruner.errors import UserError
from llm_pruner.importance.criteria import MEASURES, Criterion
from llm_pruner.importance.members import last_members
from llm_pruner.importance.observing import measure
from llm_pruner.importance.taylor import Sums, reduced, taylor_sums
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.forward import token_ids, undisturbed
from llm_pruner.models.streaming import values_of
from llm_pruner.settings.options import near
from llm_pruner.tracing.provenance import put_back, spaces_of
from llm_pruner.types import Discovery, FloatArray, Group


def score(
    model: nn.Module,
    discovery: Discovery,
    criterion: Criterion,
    *,
    input_ids: torch.Tensor | None,
    seed: int,
    groups: Collection[str] | None = None,
    keep: HiddenStates | None = None,
) -> dict[str, FloatArray]:
    """Return the importance of every unit; higher means keep.

    A unit's score is that of its slice in each member, but for buffers, joined over the members by
    ``criterion.aggregate``. A layer's score is the sum over its parameters, each whole: sum |w| for
    l1, the norm of all its weights for l2, the terms of ``Criterion`` for taylor. Random scores are
    uniform in [0, 1), by ``seed`` and the group's name. The criteria in ``criteria.MEASURES`` have
    their formulas there; those that read inputs of linear modules have no score for layers, and for
    groups that other modules read.

    Args:
        model: maps token ids, shape (samples, seq_len), to logits, shape (samples, seq_len,
            vocabulary). It is left exactly as it was.
        discovery: the groups of this model.
        criterion: what to measure.
        input_ids: calibration tokens, integers of shape (samples, seq_len); None for criteria that
            read no text.
        seed: of ``random``.
        groups: names of the groups to score; None scores all that are not frozen.
        keep: is given the hidden states between the blocks.

    Returns:
        Group name -> finite float64 scores of shape (size,), in the order of ``discovery``.

    Raises:
        UserError: the model is not the one that was traced; a group is unknown or has no such
            score; there are no calibration tokens; a loss, a weight or a gradient is not finite.
    """
    if changed := changed_since(model, discovery):
        raise UserError(f"{changed}: run discover again on the model as it is now")
    chosen = _choose(discovery, criterion, groups)
    if criterion.name == "random":
        return {group.name: _random(group, seed) for group in chosen}
    with put_back(spaces_of(model)):  # what it makes when it is first run, too
        if criterion.name in MEASURES:
            with _seen(model, input_ids, criterion.name) as ids:
                how = MEASURES[criterion.name]
                scores = measure(model, ids, chosen, how, keep)
            for name, found in scores.items():
                if not np.isfinite(found).all():
                    raise UserError(
                        f"importance of {name} is not finite; load the model in float32, or look "
                        "for extreme values in its weights"
                    )
            return scores
        parameters = _scored_parameters(model, chosen)
        if criterion.name == "taylor":
            with _seen(model, input_ids, criterion.name) as ids:
                about = (model, parameters, criterion, ids, keep)
                sums = taylor_sums(*about) if parameters else {}
        else:
            sums = _magnitude_sums(parameters, criterion.name)
        _require_finite(sums, criterion)
        return {group.name: _group_scores(model, group, sums, criterion) for group in chosen}


def _choose(
    discovery: Discovery, criterion: Criterion, names: Collection[str] | None
) -> list[Group]:
    if names is None:
        scored = [group for group in discovery.groups if group.frozen is None]
        return [group for group in scored if criterion.scores_layers or not group.modules]
    known = [group.name for group in discovery.groups]
    names = [names] if isinstance(names, str | Group) else [*names]
    names = [one.name if isinstance(one, Group) else one for one in names]
    for name in names:
        if name not in known:
            raise UserError(
                f"unknown group {name!r}: the model has {len(known)} groups; {near(name, known)}"
                "inspect lists them"
            )
    chosen = [group for group in discovery.groups if group.name in names]
    criterion.require_scores_of({group.kind for group in chosen})
    return chosen


def _random(group: Group, seed: int) -> FloatArray:
    digest = hashlib.sha256(f"{seed}:{group.name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(group.size)


@contextmanager
def _seen(model: nn.Module, input_ids: torch.Tensor | None, name: str) -> Iterator[torch.Tensor]:
    text = _require_text(input_ids, name, model)
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        yield text.detach().to(next(model.parameters()).device)


def _layer_parameters(model: nn.Module, module: str) -> list[str]:
    inside = {id(parameter) for parameter in model.get_submodule(module).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def _scored_parameters(model: nn.Module, groups: Iterable[Group]) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters(remove_duplicate=False))
    members: dict[str, None] = {}
    whole: set[str] = set()
    for group in groups:
        for member in group.members:
            if member.buffer:
                continue
            if member.tensor not in known:
                raise UserError(
                    f"group {group.name} names the tensor {member.tensor}, which the model does "
                    "not have; discover the groups of this very model"
                )
            members[member.tensor] = None
        for module in group.modules:
            whole.update(_layer_parameters(model, module))
    return {name: known[name] for name in dict.fromkeys([*members, *sorted(whole)])}


def _magnitude_sums(parameters: Mapping[str, nn.Parameter], name: str) -> dict[str, Sums]:
    sums: dict[str, Sums] = {}
    for tensor, parameter in parameters.items():
        weight = values_of(parameter).to(torch.promote_types(parameter.dtype, torch.float32))
        sums[tensor] = reduced(weight.abs() if name == "l1" else weight.square())
    return sums


def _require_text(input_ids: torch.Tensor | None, name: str, model: nn.Module) -> torch.Tensor:
    if input_ids is None:
        raise UserError(f"criterion {name!r} needs calibration text and got none; give some, or l2")
    input_ids = token_ids(input_ids, model)
    if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise UserError(f"calibration text of shape {tuple(input_ids.shape)} predicts no token")
    return input_ids


def _require_finite(sums: Mapping[str, Sums], criterion: Criterion) -> None:
    for tensor, found in sums.items():
        if all(np.isfinite(part).all() for part in (*found.by_dim, np.array(found.total))):
            continue
        what = "gradients" if criterion.name == "taylor" else "weights"
        raise UserError(
            f"the {what} of {tensor} are not finite, so its importance is unknown; load the model "
            "in float32, or a sound checkpoint"
        )


def _group_scores(
    model: nn.Module, group: Group, sums: Mapping[str, Sums], criterion: Criterion
) -> FloatArray:
    if group.modules:
        layers = [
            np.array([sums[name].total for name in _layer_parameters(model, module)])
            for module in group.modules
        ]
        wholes = [one.sum() if criterion.name == "l2" else np.abs(one).sum() for one in layers]
        return _slices(np.array(wholes, dtype=np.float64), criterion)
    members = [member for member in group.members if not member.buffer]
    if criterion.aggregate == "last":
        members = last_members(group)
    if not members:
        return np.zeros(group.size)
    totals = [sums[one.tensor].by_dim[one.dim][one.index].sum(1) for one in members]
    scores = _slices(np.stack(totals), criterion)
    if criterion.aggregate == "max":
        return np.asarray(scores.max(0))
    if criterion.aggregate == "prod":
        with np.errstate(divide="ignore"):  # a zero factor: log -inf, and the product is 0
            return np.asarray(np.exp(np.log(scores).mean(0)))
    return np.asarray(scores.sum(0))


def _slices(totals: FloatArray, criterion: Criterion) -> FloatArray:
    """Turn sums over slices, such as those of a group's members by unit, into their scores."""
    if criterion.name == "l2":
        return np.sqrt(totals)
    return np.abs(totals)  # changes vector-wise taylor only: all else is a sum of magnitudes
