"""The twin: the dense model with the removed units silenced must equal the pruned model.

The twin runs the dense model with every slice of the removed units set to zero. Where an operation
would still see the dead positions (a mean, a norm, a softmax, a top-k over the axis they lie on),
it is computed on the living positions only. Nothing is sliced and no size changes, so the twin does
not share the surgery's way of being wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from llm_pruner.discovery.groups import bound_to
from llm_pruner.discovery.tracing.calls import hidden_in
from llm_pruner.discovery.tracing.ops import Call, Operation
from llm_pruner.discovery.tracing.run import (
    example_tokens,
    in_view,
    label_model,
    named_tensors,
    traced,
    watched,
)
from llm_pruner.discovery.tracing.scenes import Scene, few, staged
from llm_pruner.discovery.tracing.trace import Trace
from llm_pruner.discovery.tracing.tracer import Tracer
from llm_pruner.errors import VerificationError
from llm_pruner.models.forward import is_on_meta
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.lockstep import Job, Outcome, Side, in_step, result_of, together
from llm_pruner.models.streaming import is_model_streamed, is_streamed, zeroed
from llm_pruner.surgery.cut import Undo, cut_, plan_edits
from llm_pruner.surgery.removal import removed_modules, removed_positions
from llm_pruner.types import Discovery, Edits, IntArray, Removal

Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

Logits: TypeAlias = list[torch.Tensor]
"""Of each call of the model in a scene."""

_SMALL = 500_000_000
"""Parameters up to which a model is compared in float64, too, where float32 is not enough."""

_FINER = 1000
"""How many times less a model and its twin differ in float64 if rounding is all that they differ
by; the types have 2^29 between them, and some code computes parts in float32."""


class _Twin(Tracer):
    """A tracer that computes reductions on living positions only."""

    def __init__(self, trace: Trace, deleted: Flags) -> None:
        super().__init__(trace)
        self._deleted = deleted

    def dead(self, rows: IntArray) -> Flags:
        """Return by position of an axis whether it is removed."""
        roots = self.atoms.resolve(rows)
        if not roots.shape[1]:
            return np.zeros(len(rows), bool)
        known = np.where(roots < len(self._deleted), roots, 0)
        return np.asarray(self._deleted[known].any(axis=1))

    def alive(self, tensor: torch.Tensor, dim: int) -> torch.Tensor | None:
        """Return the living positions of an axis of a tensor, or None if all live."""
        dead = self.dead(self.label(tensor)[dim])
        if not dead.any():
            return None
        return torch.from_numpy(np.flatnonzero(~dead)).to(tensor.device)

    def follow(self, known: Operation, call: Call, args: tuple[Any, ...]) -> None:
        """Put zeros where an operation divided zero by zero at dead positions."""
        super().follow(known, call, args)
        for result in () if known.view else call.results:
            if not result.is_floating_point() or _is_finite(result):
                continue
            for dim, rows in enumerate(self.label(result)):
                dead = self.dead(rows)
                if dead.any():
                    shape = [-1 if place == dim else 1 for place in range(result.dim())]
                    mask = torch.from_numpy(dead).to(result.device).view(shape)
                    result.masked_fill_(mask & ~result.isfinite(), 0)

    def execute(self, known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if known.op.alive is None:
            return super().execute(known, args, kwargs)

        def run(**changed: Any) -> Any:
            return known.func(**{**known.given(args, kwargs), **changed})

        return known.op.alive(self.alive, run, **known.asked(known.op.alive, args, kwargs))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, as they are if their sum is; it takes one pass and no room."""
    if tensor.element_size() > 1 and math.isfinite(tensor.sum().item()):
        return True
    return bool(tensor.isfinite().all())


@contextmanager
def _silenced(model: nn.Module, discovery: Discovery, removal: Removal) -> Iterator[None]:
    """Set the slices of the removed units to zero for the time of the context."""
    saved: list[tuple[torch.Tensor, Any, torch.Tensor]] = []
    tensors = {name: tensor for name, tensor, _ in named_tensors(model)}
    streamed = ExitStack()
    try:
        for (name, dim), positions in removed_positions(discovery, removal).items():
            if is_streamed(tensors[name]):
                gone = torch.from_numpy(positions)
                streamed.enter_context(zeroed(tensors[name], dim, gone))
                continue
            tensor = tensors[name].detach()
            if not tensor.is_floating_point():
                continue
            index: Any = (*[slice(None)] * dim, torch.from_numpy(positions).to(tensor.device))
            saved.append((tensor, index, tensor[index].clone()))
            tensor[index] = 0
        yield
    finally:
        streamed.close()
        # Slices along two axes overlap: the first one saved holds the original values.
        for tensor, index, part in reversed(saved):
            tensor[index] = part


@contextmanager
def _bypassed(model: nn.Module, modules: tuple[str, ...]) -> Iterator[None]:
    """Let the given layers hand on what they were given."""

    given: dict[nn.Module, torch.Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # A layer may write into what it is given.
        given[module] = hidden_in(args, kwargs).clone()

    def after(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
        source = given.pop(module)
        if isinstance(output, tuple | list):
            return type(output)([source, *output[1:]])
        return source

    with ExitStack() as hooks:
        for name in modules:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield


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


def twin_logits(
    model: nn.Module, discovery: Discovery, removal: Removal, tokens: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the logits of the dense model with the removed units silenced.

    Args:
        model: the dense model that was traced; it comes back unchanged.
        tokens: token ids (batch, sequence) for the first way in which the model was traced; by
            default it is run in all of them, on seeded random ones.

    Returns:
        One tensor (batch, tokens of the call, vocabulary) per call of the model.
    """
    scenes = discovery.graph.scenes[: None if tokens is None else 1]
    return _joined(_run_twin(model, discovery, removal, scenes, tokens))


def pruned_logits(
    model: nn.Module, discovery: Discovery, tokens: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the logits of the pruned model on the tokens that ``twin_logits`` uses.

    Raises:
        VerificationError: the model cannot run.
    """
    scenes = discovery.graph.scenes[: None if tokens is None else 1]
    return _joined(_run_pruned(model, scenes, tokens))


def _joined(outcomes: Iterable[Outcome[Logits]]) -> Logits:
    return [*chain.from_iterable(map(result_of, outcomes))]


def _run_twin(
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    scenes: Sequence[Scene],
    tokens: torch.Tensor | None = None,
) -> list[Outcome[Logits]]:
    """Run scenes, on seeded random tokens by default, with the removed units silenced."""
    jobs = _twin_jobs(model, discovery, removal, scenes, tokens)
    with in_view(model), _silenced(model, discovery, removal):
        return [*in_step(model, jobs, "verify: twin")]


def _run_pruned(
    model: nn.Module, scenes: Sequence[Scene], tokens: torch.Tensor | None = None
) -> Iterator[Outcome[Logits]]:
    """Run scenes, on the same tokens by default."""
    return in_step(model, _pruned_jobs(model, scenes, tokens), "verify: pruned")


def _run_both(
    dense: nn.Module,
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    scenes: Sequence[Scene],
) -> tuple[list[Outcome[Logits]], list[Outcome[Logits]]]:
    """Run streamed models as ``_run_twin`` and ``_run_pruned`` do, with half the reads."""
    twin = _twin_jobs(dense, discovery, removal, scenes)
    pruned = _pruned_jobs(model, scenes)
    # Only the twin is to be in view.
    sides = [Side(dense, twin, partial(in_view, dense)), Side(model, pruned)]
    with _silenced(dense, discovery, removal):
        found = together(sides, "verify: blocks")
    return found[: len(scenes)], found[len(scenes) :]


def _twin_jobs(
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    scenes: Sequence[Scene],
    tokens: torch.Tensor | None = None,
) -> list[Job[Logits]]:
    given = zip(scenes, _tokens(model, scenes, tokens), strict=True)
    return [partial(_twin_scene, discovery, removal, *one) for one in given]


def _pruned_jobs(
    model: nn.Module, scenes: Sequence[Scene], tokens: torch.Tensor | None = None
) -> list[Job[Logits]]:
    given = zip(scenes, _tokens(model, scenes, tokens), strict=True)
    return [partial(_pruned_scene, *one) for one in given]


def _tokens(
    model: nn.Module, scenes: Sequence[Scene], tokens: torch.Tensor | None
) -> list[torch.Tensor]:
    return [
        example_tokens(model, one.shape, seed=1) if tokens is None else tokens for one in scenes
    ]


def _twin_scene(
    discovery: Discovery, removal: Removal, scene: Scene, tokens: torch.Tensor, model: nn.Module
) -> Logits:
    """Run a scene of a model in view whose removed units are silenced."""
    graph = discovery.graph
    trace = Trace(atoms=graph.trace.atoms.copy(), tensors=dict(graph.trace.tensors))
    deleted = graph.system.with_replicas(graph.deleted(removal))
    twin = _Twin(trace, deleted)
    gone = removed_modules(discovery, removal)
    # Sizes keep their origin as in the trace, so that the same axes are fixed.
    with traced(model, twin), _bypassed(model, gone):
        label_model(twin, model)
        logits = watched(model, scene, tokens, twin)
    return [few(tensor.detach()).clone() for tensor in logits]


def _pruned_scene(scene: Scene, tokens: torch.Tensor, model: nn.Module) -> Logits:
    try:
        with staged(model, training=scene.training):
            logits = scene.run(model, tokens)
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        text = str(error).strip()
        cause = text.splitlines()[0] if text else type(error).__name__
        raise VerificationError(
            f"the pruned model cannot run on {scene.name} ({cause}); nothing was saved. "
            "Leave the structure out with --structures, and please report the model."
        ) from error
    return [few(tensor.detach()).clone() for tensor in logits]


def prune_(
    model: nn.Module, discovery: Discovery, removal: Removal, *, verify: bool = True
) -> Edits:
    """Remove units from a model in place and return what was changed.

    Tied weights stay tied, ``requires_grad`` stays as it was, and removed layers are gone with all
    they hold. The new tensors hold exactly the values of the positions that were kept.

    Args:
        model: the model that was traced.
        discovery: what was found in it.
        removal: group name -> units.
        verify: compare the result with the masked dense model, see ``cut_verified_``; a model
            without weights (on meta) is never compared.

    Raises:
        InfeasibleError: before anything is touched.
        VerificationError: the pruned model is not its masked twin; it is as it was.
    """
    if not verify or is_on_meta(model):
        return cut_(model, discovery, removal)
    return cut_verified_(model, discovery, removal)[0]


def cut_verified_(
    model: nn.Module, discovery: Discovery, removal: Removal
) -> tuple[Edits, Verified]:
    """Remove units in place; the result must equal the masked dense model, or all is undone.

    Both are run as the model was traced: on short and on long input, with padding, through
    ``generate`` and in training mode. The dense model is run before the cut, so that there is one
    model in memory, and what the cut took; a streamed one beside the pruned model, block by block.

    Raises:
        InfeasibleError: before anything is touched.
        VerificationError: they differ; names the groups at fault.
    """
    plan_edits(model, discovery, removal)
    undo = Undo(model)
    worst, limit = 0.0, 0.0
    differs: Scene | None = None
    try:
        edits, expected, outcomes, skipped = _cut_and_run(model, discovery, removal, undo)
        scenes = [scene for scene in discovery.graph.scenes if scene.name in expected]
        for scene, outcome in zip(scenes, outcomes, strict=True):
            difference, limit = _compared(expected[scene.name], result_of(outcome), model, scene)
            if difference > limit and scene.training and not _repeats(model, scene):
                skipped.append(f"{scene.name} (random)")
                del expected[scene.name]
                continue
            if difference > limit:
                worst, differs = difference, scene
                break
            worst = max(worst, difference)
    except BaseException:
        undo()
        raise
    if differs is not None:
        undo()
        if not _is_rounding(model, discovery, removal, scenes, worst):
            names = find_culprits(model, discovery, removal, differs)
            raise VerificationError(
                f"the pruned model differs from its masked twin by {worst:.3g} (limit {limit:.1g}) "
                f"on {differs.name}; at fault: "
                f"{', '.join(names) or 'only groups in combination'}; nothing was saved. "
                "Leave the structure out with --structures, and please report the model."
            )
        edits = cut_(model, discovery, removal)
    return edits, Verified(worst, tuple(expected), tuple(skipped))


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
        twin, pruned = _run_both(dense, model, discovery, removal, scenes)
        expected, skipped = _expected(discovery, twin)
        pairs = zip(scenes, pruned, strict=True)
        return edits, expected, [one for scene, one in pairs if scene.name in expected], skipped
    expected, skipped = _expected(discovery, _run_twin(model, discovery, removal, scenes))
    edits = cut_(model, discovery, removal, undo)
    left = [scene for scene in scenes if scene.name in expected]
    return edits, expected, _run_pruned(model, left), skipped


def _expected(
    discovery: Discovery, outcomes: Sequence[Outcome[Logits]]
) -> tuple[dict[str, Logits], list[str]]:
    """Return scene -> logits of the twin, and the scenes that cannot be compared.

    Raises:
        VerificationError: it cannot run in a scene that is needed.
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
        elif not scene.needed and not all(bool(one.isfinite().all()) for one in found):
            skipped.append(f"{scene.name} (not finite)")
        else:
            expected[scene.name] = found
    return expected, skipped


def _compared(
    expected: Logits, found: Logits, model: nn.Module, scene: Scene
) -> tuple[float, float]:
    """Return by how much a run differs from what is expected of it, and by how much it may."""
    return largest_difference(expected, found), tolerance(expected, model, scene.shape[1])


def _is_rounding(
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    scenes: Sequence[Scene],
    difference: float,
) -> bool:
    """Whether a model and its twin differ by the rounding of float32 alone, for small models.

    Then they differ ``_FINER`` times less in float64. A model that cannot be run in it is not said
    to round.
    """
    weights = list(model.parameters())
    if (
        is_model_streamed(model)
        or sum(weight.numel() for weight in weights) > _SMALL
        or any(weight.dtype != torch.float32 for weight in weights)
    ):
        return False
    fine = copy.deepcopy(model).double()
    try:
        twin = _joined(_run_twin(fine, discovery, removal, scenes))
        cut_(fine, discovery, removal)
        left = largest_difference(twin, _joined(_run_pruned(fine, scenes)))
    except Exception:
        return False
    return left * _FINER <= difference


def require_same(model: nn.Module, loaded: nn.Module, discovery: Discovery) -> None:
    """Raise VerificationError if a model gives other logits once it is saved and loaded again.

    It is as it was in training mode if it is in the others, and with padding.
    """
    short = discovery.graph.scenes[0].shape[1]
    scenes = [one for one in discovery.graph.scenes if one.needed or one.shape[1] > short]
    runs = zip(scenes, _run_pruned(model, scenes), _run_pruned(loaded, scenes), strict=True)
    for scene, expected, found in runs:
        difference, limit = _compared(result_of(expected), result_of(found), loaded, scene)
        if difference > limit:
            raise VerificationError(
                f"the saved folder gives logits that differ by {difference:.3g} from the model "
                f"that was saved, on {scene.name}; nothing was kept; please report the model"
            )


def _repeats(model: nn.Module, scene: Scene) -> bool:
    """Whether a model gives the same twice; what is random in training cannot be compared."""
    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(_joined(_run_pruned(model, [scene])))
    return largest_difference(*runs) <= tolerance(runs[0], model)


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the largest absolute difference of two runs, infinite if one is not finite."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        difference = (a.double() - b.double()).abs().max().item()
        worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst


def tolerance(logits: list[torch.Tensor], model: nn.Module | None = None, length: int = 8) -> float:
    """Return the largest difference that rounding explains: 1e-5 of the logits' size in float32.

    Never below 1e-5; bfloat16 and float16 models are judged by the precision of their own type,
    which is that of the logits unless ``generate`` made float32 of them. Sums over more than 64
    tokens round more, in proportion.
    """
    size = max(1.0, *(tensor.abs().max().item() for tensor in logits))
    types = {logits[0].dtype}
    if model is not None:
        types |= {p.dtype for p in model.parameters() if p.is_floating_point()}
    precision = max(torch.finfo(dtype).eps for dtype in types)
    return size * max(1.0, length / 64) * max(1e-5, 32 * precision if precision > 1e-6 else 0.0)


def find_culprits(
    model: nn.Module, discovery: Discovery, removal: Removal, scene: Scene
) -> list[str]:
    """Return the groups that differ from the twin when they are pruned without the others.

    Groups that are bound to each other are tried together, on a copy that shares the tensors.
    """
    found = []
    done: set[str] = set()
    losing = {group.name: group for group in discovery.groups if group.name in removal}
    for name, units in removal.items():
        if name in done or not len(units):
            continue
        together = [*bound_to(name, losing)]
        done |= set(together)
        part = {other: removal[other] for other in together}
        expected = _joined(_run_twin(model, discovery, part, [scene]))
        smaller = sharing_copy(model)
        cut_(smaller, discovery, part)
        try:
            actual = _joined(_run_pruned(smaller, [scene]))
            difference, limit = _compared(expected, actual, smaller, scene)
        except VerificationError:
            difference, limit = math.inf, 0.0
        if difference > limit:
            found.extend(together)
    return found
