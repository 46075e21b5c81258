"""Compares a pruned model with its masked twin, the dense model with the removed units silenced."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from llm_pruner.errors import InfeasibleError, UserError, VerificationError, in_short
from llm_pruner.models.forward import is_on_meta, leave_weights_
from llm_pruner.models.layers import heaviest_list, own_copy, sharing_copy
from llm_pruner.models.streaming import computed_in, in_turns, is_model_streamed
from llm_pruner.models.synchronized_runs import Outcome, result_of
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.precision import exact_products
from llm_pruner.surgery.cut import Undo, cut_, plan_edits
from llm_pruner.surgery.removal import checked_removal
from llm_pruner.surgery.twin import Logits, joined, run_both, run_pruned, run_twin
from llm_pruner.tracing.scenes import Scene
from llm_pruner.types import Discovery, Edits, Removal, bound_to

_FINER = 1000
"""How many times less a model and its twin differ in float64 if rounding is all that they differ
by; the types have 2^29 between them, and some code computes parts in float32."""


@dataclass(frozen=True)
class Verified:
    """The largest difference of two logits, the scenes compared, and those that could not be."""

    difference: float
    scenes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def prune_(
    model: nn.Module, discovery: Discovery, removal: Removal, *, verify: bool = True
) -> Edits:
    """Remove units from a model in place and return what was changed.

    Tied weights stay tied, ``requires_grad`` stays as it was, and removed layers are gone with all
    they hold. The new tensors hold exactly the kept values. The config stays the dense model's, but
    for the number of layers; ``save_checkpoint`` writes sizes that fit.

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
    ``generate`` and in training mode. The dense model runs before the cut, so that there is one
    model in memory; a streamed one runs beside the pruned model, block by block. Rounding in
    bfloat16 and float16 hides much, so a copy in float32 is compared first.
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
                f"{', '.join(names) or 'structures in combination'}; nothing was saved. "
                "Leave the structure out with --structures, and please report the model."
            )
        edits = cut_(model, discovery, removal)
    return edits, Verified(max(found.values(), default=0.0), tuple(found), tuple(skipped))


class _Difference(NamedTuple):
    scene: Scene
    difference: float
    limit: float


def _verified_in_float32(
    model: nn.Module, discovery: Discovery, removal: Removal
) -> Verified | None:
    """Cut a copy in float32; return what is said of it, None if it does not run in this type."""
    try:
        with _computing_in(model, torch.float32) as wide:
            return cut_verified_(wide, discovery, removal)[1]
    except VerificationError as error:
        if error.__cause__ is None:
            raise
    except (UserError, torch.OutOfMemoryError):  # no list of blocks, or no room on the GPU
        pass
    return None


@contextmanager
def _computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Yield a copy of a model in float32 or float64, or one that is widened block by block."""
    if is_model_streamed(model):
        with computed_in(model, dtype):
            yield sharing_copy(model)
        return
    weights = [*model.parameters()]
    needed = sum(one.numel() * (dtype.itemsize + one.itemsize) for one in weights)
    if all(needed < free_bytes(str(device)) for device in {one.device for one in weights}):
        copy = own_copy(model)
        yield copy.float() if dtype == torch.float32 else copy.double()
    else:
        yield in_turns(model, dtype)


def _is_short(model: nn.Module) -> bool:
    return any(one.is_floating_point() and one.itemsize < 4 for one in model.parameters())


def _cut_and_run(
    model: nn.Module, discovery: Discovery, removal: Removal, undo: Undo
) -> tuple[Edits, dict[str, Logits], Iterable[Outcome[Logits]], list[str]]:
    """Return what was changed, scene -> what is expected, what comes out, and what is skipped."""
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
    """Return scene -> logits of the twin, and the scenes that cannot be compared."""
    expected: dict[str, Logits] = {}
    skipped = list(discovery.graph.left_out)
    for scene, found in zip(discovery.graph.scenes, outcomes, strict=True):
        # A model may refuse a way of running it in any way.
        if isinstance(found, BaseException):
            if scene.needed:
                raise VerificationError(
                    f"the masked dense model cannot run on {scene.name} ({in_short(found)}), so "
                    "nothing was pruned; please report the model, and use --set verify=false to "
                    "prune it all the same"
                ) from found
            skipped.append(scene.name)
        elif all(map(_is_finite, found)):
            expected[scene.name] = found
        elif scene.needed:
            raise VerificationError(
                f"the masked dense model gives numbers that are not finite on {scene.name}, so "
                "nothing was pruned; check its weights, leave the structure out with --structures, "
                "or use --set verify=false to prune it all the same"
            )
        else:
            skipped.append(f"{scene.name} (not finite)")
    return expected, skipped


def _is_finite(logits: torch.Tensor) -> bool:
    return bool((logits.isfinite() | (logits == -math.inf)).all())


def _compared(
    expected: Logits, found: Logits, model: nn.Module, scene: Scene
) -> tuple[float, float]:
    return largest_difference(expected, found), tolerance(expected, model, scene.shape[1])


def _is_rounding(
    model: nn.Module, discovery: Discovery, removal: Removal, differ: Sequence[_Difference]
) -> bool:
    """Whether a model and its twin differ by the rounding of float32 alone.

    Then they differ ``_FINER`` times less in float64. A model that cannot be run in it is not said
    to round, nor one that gives what is not finite where its twin does not.
    """
    scenes, differences = [one.scene for one in differ], [one.difference for one in differ]
    if any(one.dtype != torch.float32 for one in model.parameters()) or math.inf in differences:
        return False
    try:
        with _computing_in(model, torch.float64) as fine:
            left, right, _ = _twin_and_copy(fine, discovery, removal, scenes)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    beyond = difference_beyond_float32(left, right)
    return math.isfinite(beyond) and beyond * _FINER <= min(differences)


def difference_beyond_float32(left: Logits, right: Logits) -> float:
    """Return the largest difference of two runs in float64; infinite as `largest_difference` is.

    ``generate`` makes float32 of all logits; of these, what their own rounding explains is left
    out.
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

    Both run on short and on long input, in float32: one after the other, or by blocks where there
    is no room for that.
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
    def widened(one: nn.Module) -> AbstractContextManager[nn.Module]:
        short = wider and _is_short(one)
        return _computing_in(one, torch.float32) if short else nullcontext(one)

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
    """Give a model, in float32 now, the unrounded values of buffers that no file holds, such as the
    scale of Gemma's embeddings.
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
    """Whether the dense model itself gives something else each time, so that none can equal it."""
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
            f"the model gives something else each time it runs on {scene.name}, so nothing was "
            "pruned; switch off what is random, or use --set verify=false to prune it all the same"
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

    Never below 1e-5; shorter types are judged by their own precision. In float32, more than 64
    tokens round more, in proportion, and more than 8 layers by the root of their number.
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
    """Return the largest absolute value, but for tokens that have one value everywhere.

    Such a value, as -1e9 for a token that is never to be written, would hide any difference.
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
    """Return the structures that differ from the twin when they are pruned without the others.

    Structures whose groups are bound to each other are tried together, and query heads with the
    heads that share them.
    """
    losing = {name: discovery.group(name) for name, units in removal.items() if len(units)}
    kinds: dict[str, set[str]] = {}  # kind -> kinds that go with it, itself among them
    for name, group in losing.items():
        owner = losing.get(group.owner or "", group)
        bound = {losing[one].kind for one in (*bound_to(name, losing), owner.name)}
        merged = bound.union(*(kinds.get(one, {one}) for one in bound))
        kinds |= dict.fromkeys(merged, merged)
    culprits: list[str] = []
    for together in {id(one): one for one in kinds.values()}.values():
        part = {name: removal[name] for name, group in losing.items() if group.kind in together}
        try:
            expected, actual, smaller = _twin_and_copy(model, discovery, part, [scene])
            difference, limit = _compared(expected, actual, smaller, scene)
        except VerificationError:
            difference, limit = math.inf, 0.0
        except InfeasibleError:  # what goes only with others cannot be judged by itself
            continue
        if difference > limit:
            culprits += sorted(together)
    return culprits
