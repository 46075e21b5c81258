"""The twin: the dense model with the removed units silenced must equal the pruned model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import InfeasibleError, UserError, VerificationError
from llm_pruner.models.forward import is_on_meta, leave_weights_
from llm_pruner.models.layers import heaviest_list, sharing_copy
from llm_pruner.models.streaming import (
    computed_in,
    ends_of,
    in_turns,
    is_model_streamed,
    keep_dtype_,
)
from llm_pruner.models.synchronized_runs import Outcome, result_of
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.precision import exact_products
from llm_pruner.surgery.cut import Undo, cut_, plan_edits
from llm_pruner.surgery.removal import checked_removal, removed_positions
from llm_pruner.surgery.twin import Logits, joined, run_both, run_pruned, run_twin
from llm_pruner.tracing.scenes import Scene
from llm_pruner.types import Discovery, Edits, Removal, bound_to

_SMALL = 500_000_000
"""Parameters up to which all of a model is copied to float64 where float32 is not enough; of a
larger one the block that runs is."""

_FINER = 1000
"""How many times less a model and its twin differ in float64 if rounding is all that they differ
by; the types have 2^29 between them, and some code computes parts in float32."""


@dataclass(frozen=True)
class Verified:
    """What a pruned model was compared with its masked twin on.

    Attributes:
        difference: largest absolute difference of two logits.
        scenes: the ways in which both were run.
        skipped: those in which the dense model gives no result that could be compared.
    """

    difference: float
    scenes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def prune_(
    model: nn.Module, discovery: Discovery, removal: Removal, *, verify: bool = True
) -> Edits:
    """Remove units from a model in place and return what was changed.

    Tied weights stay tied, ``requires_grad`` stays as it was, and removed layers are gone with all
    they hold. The new tensors hold exactly the values of the positions that were kept. A config of
    transformers stays that of the dense model, but for layers: their number and what is listed for
    each are set in a copy. So do sizes that modules state and do not read; ``save_checkpoint``
    writes the ones that fit.

    Args:
        model: the model that was traced.
        discovery: what was found in it.
        removal: group name -> units, in any collection, or a mask that is true for them.
        verify: compare the result with the masked dense model, see ``cut_verified_``; a model
            without weights (on meta) is never compared.

    Raises:
        InfeasibleError: before anything is touched.
        VerificationError: the pruned model is not its masked twin; it is as it was.
    """
    removal = checked_removal(discovery, removal)
    if not verify or is_on_meta(model):
        return cut_(model, discovery, removal)
    return cut_verified_(model, discovery, removal)[0]


@exact_products()
def cut_verified_(
    model: nn.Module, discovery: Discovery, removal: Removal
) -> tuple[Edits, Verified]:
    """Remove units in place; the result must equal the masked dense model, or all is undone.

    Both are run as the model was traced: on short and on long input, with padding, through
    ``generate`` and in training mode. The dense model is run before the cut, so that there is one
    model in memory, and what the cut took; a streamed one beside the pruned model, block by block.
    In bfloat16 and float16 rounding hides much, so a copy in float32 is compared first, of which
    there is one block at a time if there is no room for all.

    Raises:
        InfeasibleError: before anything is touched.
        VerificationError: they differ; names the groups at fault.
    """
    plan_edits(model, discovery, removal)
    leave_weights_(model)
    if _is_short(model):
        verified = _verified_in_float32(model, discovery, removal)
        if verified is not None:
            return cut_(model, discovery, removal), verified
    undo = Undo(model)
    found: dict[str, float] = {}
    differ: list[_Difference] = []
    try:
        edits, expected, outcomes, skipped = _cut_and_run(model, discovery, removal, undo)
        scenes = [scene for scene in discovery.graph.scenes if scene.name in expected]
        for scene, outcome in zip(scenes, outcomes, strict=True):
            difference, limit = _compared(expected[scene.name], result_of(outcome), model, scene)
            found[scene.name] = difference
            if difference > limit:
                differ.append(_Difference(scene, difference, limit))
    except BaseException:
        undo()
        raise
    if differ:
        undo()
        random = [one for one in differ if _is_random(model, one)]
        for one in random:
            differ.remove(one)
            del found[one.scene.name]
            skipped.append(f"{one.scene.name} (random)")
        if differ and not _is_rounding(model, discovery, removal, differ):
            scene, difference, limit = differ[0]
            names = find_culprits(model, discovery, removal, scene)
            raise VerificationError(
                f"the pruned model differs from its masked twin by {difference:.3g} "
                f"(limit {limit:.1g}) on {scene.name}; at fault: "
                f"{', '.join(names) or 'only groups in combination'}; nothing was saved. "
                "Leave the structure out with --structures, and please report the model."
            )
        edits = cut_(model, discovery, removal)
    return edits, Verified(max(found.values(), default=0.0), tuple(found), tuple(skipped))


class _Difference(NamedTuple):
    """A scene in which a model differs from its twin, by how much, and by how much it may."""

    scene: Scene
    difference: float
    limit: float


def _verified_in_float32(
    model: nn.Module, discovery: Discovery, removal: Removal
) -> Verified | None:
    """Cut a copy in float32; return what is said of it, None if it does not run in this type.

    Raises:
        VerificationError: it is not its masked twin.
    """
    streamed = is_model_streamed(model)
    try:
        with computed_in(model, torch.float32) if streamed else nullcontext():
            if streamed:
                wide = sharing_copy(model)
            elif _has_room(model, copies=1):
                wide = deepcopy(model).float()
            else:
                wide = in_turns(model, torch.float32)
            return cut_verified_(wide, discovery, removal)[1]
    except VerificationError as error:
        if error.__cause__ is None:
            raise
    except (UserError, torch.OutOfMemoryError):  # no list of blocks, or no room on the GPU
        pass
    return None


def _is_short(model: nn.Module) -> bool:
    """Whether a model has weights in bfloat16 or another type shorter than float32."""
    return any(one.is_floating_point() and one.itemsize < 4 for one in model.parameters())


def _has_room(model: nn.Module, copies: int) -> bool:
    """Whether there is memory for a model in float32 once more; a streamed one needs none."""
    if is_model_streamed(model):
        return True
    parameters = [*model.parameters()]
    bytes_ = sum(one.numel() * (4 + copies * one.itemsize) for one in parameters)
    return all(bytes_ < free_bytes(str(device)) for device in {one.device for one in parameters})


def _cut_and_run(
    model: nn.Module, discovery: Discovery, removal: Removal, undo: Undo
) -> tuple[Edits, dict[str, Logits], Iterable[Outcome[Logits]], list[str]]:
    """Return what was changed, what is expected in each scene, what comes out, and what is skipped.

    Raises:
        VerificationError: the twin cannot run in a scene that is needed.
    """
    scenes = discovery.graph.scenes
    if is_model_streamed(model):
        dense = sharing_copy(model)
        edits = cut_(model, discovery, removal, undo)
        twin, pruned = run_both(dense, model, discovery, removal, scenes)
        expected, skipped = _expected(discovery, twin)
        pairs = zip(scenes, pruned, strict=True)
        return edits, expected, [one for scene, one in pairs if scene.name in expected], skipped
    expected, skipped = _expected(discovery, run_twin(model, discovery, removal, scenes))
    edits = cut_(model, discovery, removal, undo)
    left = [scene for scene in scenes if scene.name in expected]
    return edits, expected, run_pruned(model, left), skipped


def _expected(
    discovery: Discovery, outcomes: Sequence[Outcome[Logits]]
) -> tuple[dict[str, Logits], list[str]]:
    """Return scene -> logits of the twin, and the scenes that cannot be compared.

    Raises:
        VerificationError: in a scene that is needed it cannot run, or gives what is not finite.
    """
    expected: dict[str, Logits] = {}
    skipped = list(discovery.graph.left_out)
    for scene, found in zip(discovery.graph.scenes, outcomes, strict=True):
        # A model may refuse a way of running it in any way.
        if isinstance(found, BaseException):
            if scene.needed:
                raise VerificationError(
                    f"the masked dense model cannot run on {scene.name} ({type(found).__name__}: "
                    f"{' '.join(str(found).split())[:200]}), so nothing was pruned; please report "
                    "the model, and use --no-verify to prune it all the same"
                ) from found
            skipped.append(scene.name)
        elif all(map(_is_finite, found)):
            expected[scene.name] = found
        elif scene.needed:
            raise VerificationError(
                f"the masked dense model gives numbers that are not finite on {scene.name}, so no "
                "pruned model can be compared with it, and nothing was pruned; check its weights, "
                "leave the structure out with --structures, or use --no-verify to prune it all the "
                "same"
            )
        else:
            skipped.append(f"{scene.name} (not finite)")
    return expected, skipped


def _is_finite(logits: torch.Tensor) -> bool:
    """Whether no logit is infinite or NaN, but for those of tokens that are never to be written."""
    return bool((logits.isfinite() | (logits == -math.inf)).all())


def _compared(
    expected: Logits, found: Logits, model: nn.Module, scene: Scene
) -> tuple[float, float]:
    """Return by how much a run differs from what is expected of it, and by how much it may."""
    return largest_difference(expected, found), tolerance(expected, model, scene.shape[1])


def _is_rounding(
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    differ: Sequence[_Difference],
) -> bool:
    """Whether a model and its twin differ by the rounding of float32 alone.

    Then they differ ``_FINER`` times less in float64. A model that cannot be run in it is not said
    to round, nor one that gives what is not finite where its twin does not.
    """
    streamed, weights = is_model_streamed(model), list(model.parameters())
    scenes, differences = [one.scene for one in differ], [one.difference for one in differ]
    if any(weight.dtype != torch.float32 for weight in weights) or math.inf in differences:
        return False
    large = sum(weight.numel() for weight in weights) > _SMALL
    try:
        with computed_in(model, torch.float64) if streamed else nullcontext():
            fine = model
            if not streamed:
                fine = in_turns(model, torch.float64) if large else deepcopy(model).double()
            _leave_heads_(fine, discovery, removal)
            left, right, _ = _twin_and_copy(fine, discovery, removal, scenes)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    beyond = difference_beyond_float32(left, right)
    return math.isfinite(beyond) and beyond * _FINER <= min(differences)


def _leave_heads_(model: nn.Module, discovery: Discovery, removal: Removal) -> None:
    """Have heads that lose nothing compute in float32, whose weights would be twice as large.

    What goes into them is the same to the last bit of that, or the two are not each other's twins.
    """
    cut = {name for name, _ in removed_positions(discovery, removal)}
    names = {id(one): name for name, one in model.named_parameters()}
    for end in ends_of(model):
        if type(end) is nn.Linear and names[id(end.weight)] not in cut:
            for one in end.parameters():
                keep_dtype_(one, torch.float32)


def difference_beyond_float32(left: Logits, right: Logits) -> float:
    """Return the largest difference of two runs in float64; infinite as `largest_difference` is.

    Of logits that are float32 all the same, which ``generate`` makes of all, without what their
    own rounding explains.
    """
    worst, size = 0.0, _size(left)
    for a, b in zip(left, right, strict=True):
        difference = 0.0 if torch.equal(a, b) else largest_difference([a], [b])
        if not math.isfinite(difference):
            return math.inf
        if difference:
            worst = max(worst, difference - 4 * torch.finfo(a.dtype).eps * size)
    return worst


def _twin_and_copy(
    model: nn.Module, discovery: Discovery, removal: Removal, scenes: Sequence[Scene]
) -> tuple[Logits, Logits, nn.Module]:
    """Return what the twin and a pruned copy, which shares the tensors, give, and the copy."""
    smaller = sharing_copy(model)
    cut_(smaller, discovery, removal)
    if is_model_streamed(model):
        twin, pruned = run_both(model, smaller, discovery, removal, scenes)
    else:
        twin = run_twin(model, discovery, removal, scenes)
        pruned = [*run_pruned(smaller, scenes)]
    return joined(twin), joined(pruned), smaller


@exact_products()
def require_same(
    model: nn.Module, loaded: nn.Module, discovery: Discovery, verified: Verified | None = None
) -> None:
    """Raise VerificationError if a model gives other logits once it is saved and loaded again.

    Both are run on short and on long input: a folder that is right there is right with padding and
    in training mode, too. Both compute in float32, one after the other, or one block after the
    other where there is no room for that.

    Args:
        verified: what was said of the model when it was cut; in what could not be compared then,
            it is not compared now.
    """
    scenes = [
        one
        for one in discovery.graph.scenes
        if one.needed or one.shape[1] > 8
        if verified is None or one.name in verified.scenes
    ]
    compared = None
    if any(map(_is_short, (model, loaded))):
        with suppress(RuntimeError, VerificationError, UserError):  # code of its own type alone
            compared = _runs_compared(model, loaded, scenes, wider=True)
    if compared is None:
        compared = _runs_compared(model, loaded, scenes, wider=False)
    for scene, (difference, limit) in zip(scenes, compared, strict=True):
        if difference > limit:
            raise VerificationError(
                f"the saved folder gives logits that differ by {difference:.3g} from the model "
                f"that was saved, on {scene.name}; nothing was kept; please report the model"
            )


def _runs_compared(
    model: nn.Module, loaded: nn.Module, scenes: Sequence[Scene], *, wider: bool
) -> list[tuple[float, float]]:
    """Return by how much the runs of two models differ in each scene, and by how much they may."""

    @contextmanager
    def widened(one: nn.Module) -> Iterator[nn.Module]:
        if not wider or not _is_short(one):
            yield one
        elif not _has_room(one, copies=0):
            yield in_turns(one, torch.float32)
        else:
            with computed_in(one, torch.float32):
                yield one

    with widened(model) as wide:
        expected = [*map(result_of, run_pruned(wide, scenes))]
    rounded = wider and _is_short(loaded)
    with widened(loaded) as wide:
        if rounded:
            _take_unrounded_(wide, model)
        found = [*map(result_of, run_pruned(wide, scenes))]
        return [
            _compared(one, other, wide, scene)
            for one, other, scene in zip(expected, found, scenes, strict=True)
        ]


def _take_unrounded_(loaded: nn.Module, model: nn.Module) -> None:
    """Give a model, in float32 now, those values of buffers that its shorter type has rounded.

    What no file holds, as the scale of Gemma's embeddings, is computed in the type of the model.
    """
    known = dict(model.named_buffers())
    kinds = (torch.bfloat16, torch.float16)
    for name, buffer in loaded.named_buffers():
        whole = known.get(name)
        if whole is None or whole.dtype != buffer.dtype or whole.shape != buffer.shape:
            continue
        if any(torch.equal(whole.to(kind).to(whole.dtype), buffer) for kind in kinds):
            buffer.data = whole


def _is_random(model: nn.Module, differs: _Difference) -> bool:
    """Whether the dense model itself gives something else each time, so that none can equal it.

    Raises:
        VerificationError: it does in a scene that is needed.
    """
    if not math.isfinite(differs.difference):
        return False
    scene = differs.scene
    runs: list[Logits] = []
    devices = {one.device for one in model.parameters() if one.is_cuda}
    with torch.random.fork_rng(devices=devices):
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(joined(run_pruned(model, [scene])))
    difference, limit = _compared(runs[0], runs[1], model, scene)
    random = limit < difference < math.inf
    if random and scene.needed:
        raise VerificationError(
            f"the model gives something else each time it runs on {scene.name}, so no pruned model "
            "can be compared with it, and nothing was pruned; switch off what is random (dropout, "
            "sampling), or use --no-verify to prune it all the same"
        )
    return random


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the largest absolute difference of two runs, infinite if one is not finite.

    Where both are minus infinity, as of tokens that are never to be written, there is none. Nor is
    there of no logits, which a step may give for the only token.
    """
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not a.numel() and a.shape == b.shape:
            continue
        never = (a == -math.inf) & (b == -math.inf)
        difference = (a.double() - b.double()).masked_fill(never, 0.0).abs().max().item()
        worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst


def tolerance(logits: list[torch.Tensor], model: nn.Module | None = None, length: int = 8) -> float:
    """Return the largest difference that rounding explains: 1e-5 of the logits' size in float32.

    Never below 1e-5; bfloat16 and float16 models are judged by the precision of their own type,
    which is that of the logits unless ``generate`` made float32 of them. In float32, sums over more
    than 64 tokens round more, in proportion, and so do more than 8 layers, by the root of their
    number.
    """
    size = max(1.0, _size(logits))
    types, depth = {logits[0].dtype}, 1
    if model is not None:
        types |= {p.dtype for p in model.parameters() if p.is_floating_point()}
        depth = len(heaviest_list(model) or ())
    precision = max(torch.finfo(dtype).eps for dtype in types)
    least = 1e-5 * math.sqrt(max(1.0, depth / 8)) * max(1.0, length / 64)
    return size * max(least, 32 * precision if precision > 1e-6 else 0.0)


def _size(logits: Logits) -> float:
    """Return the largest absolute value, but for tokens that are given one value everywhere.

    That is written there, such as -1e9 or the least number of the type where a token is never to
    be written; it is not rounded, and would hide any difference of the others.
    """
    by_width: dict[int, list[torch.Tensor]] = defaultdict(list)
    for one in filter(torch.Tensor.numel, logits):
        by_width[one.shape[-1]].append(one.nan_to_num(0, 0, 0).reshape(-1, one.shape[-1]))
    rows = [torch.cat(parts) for parts in by_width.values()]
    computed = [one[:, (one != one[0]).any(0)] for one in rows]
    sizes = [one.abs().max().item() for one in computed if one.numel()]
    return max(sizes or (one.abs().max().item() for one in rows), default=0.0)


def find_culprits(
    model: nn.Module, discovery: Discovery, removal: Removal, scene: Scene
) -> list[str]:
    """Return the groups that differ from the twin when they are pruned without the others.

    Groups that are bound to each other are tried together, and query heads with the heads that
    share them. They are halved again and again, and a half that is right is not looked into.
    """
    losing = {group.name: group for group in discovery.groups if group.name in removal}
    bundles: dict[str, dict[str, Fraction]] = {}
    for name, units in removal.items():
        if len(units):
            owner = losing.get(losing[name].owner or "", losing[name])
            leader = bound_to(owner.name, losing)
            bundles.setdefault(min(leader), leader).update(bound_to(name, losing))

    def differ(parts: Sequence[Iterable[str]]) -> bool:
        part = {name: removal[name] for name in chain.from_iterable(parts)}
        try:
            expected, actual, smaller = _twin_and_copy(model, discovery, part, [scene])
            difference, limit = _compared(expected, actual, smaller, scene)
        except VerificationError:
            return True
        except InfeasibleError:  # what goes only with others cannot be judged by itself
            return len(parts) > 1
        return difference > limit

    def among(parts: Sequence[Iterable[str]]) -> list[str]:
        if not parts or not differ(parts):
            return []
        if len(parts) == 1:
            return [*parts[0]]
        middle = len(parts) // 2
        return among(parts[:middle]) + among(parts[middle:])

    parts = [*bundles.values()]
    return among(parts[: len(parts) // 2]) + among(parts[len(parts) // 2 :])
