"""Prunes one model structure by structure and judges each result."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner import (
    Criterion,
    LLMPrunerError,
    Selection,
    Target,
    allocate,
    discover,
    prune_,
    score,
)
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.removal import removed_modules, removed_positions
from llm_pruner.surgery.twin import pruned_logits, twin_logits
from llm_pruner.surgery.verify import largest_difference, tolerance
from llm_pruner.types import Discovery, IntArray, Removal
from removals import pick
from unseen.copies import own_copy
from unseen.oracle import Run, computed, difference, expected, to_double, zeroed
from unseen.spec import VOCABULARY, Positions, Spec, logits_of, make

LIMIT = 1e-6
"""Relative difference in float64 from which a result is wrong."""

Row = dict[str, Any]


def examine(spec: Spec, only: str | None = None) -> Row:
    """Return what was found for one model; an error becomes a verdict."""
    started = time.monotonic()
    row: Row = {"model": spec.name, "package": spec.package, "structures": []}
    try:
        model = make(spec)
        row["class"] = type(model).__name__
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        call = spec.call or _call
        with torch.no_grad():
            logits_of(call(own_copy(model), tokens_of(8)))
    except Exception as error:
        return row | {"error": _line(error), "traceback": traceback.format_exc()[-1500:]}
    forward = None
    if spec.call is not None:

        def forward(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
            return [logits_of(call(model, tokens))]

    fresh = own_copy(model)
    try:
        discovery = discover(model) if forward is None else discover(model, forward=forward)
    except Exception as error:
        row["structures"].append({"structure": "discover"} | _failure(error))
        return row | {"seconds": round(time.monotonic() - started, 1)}
    row["discover_seconds"] = round(time.monotonic() - started, 1)
    row["groups"] = _groups(discovery)
    kinds = list(dict.fromkeys(group.kind for group in discovery.groups))
    dense = to_double(own_copy(fresh))
    checks = _checks(spec, dense, row)
    outcomes: dict[str, Row] = {}
    first = ["first layer"] if "layers" in kinds else []
    for kind in [*kinds, *first, "all", "plan"]:
        if only is not None and kind != only:
            continue
        outcomes[kind] = _structure(kind, model, dense, discovery, checks, spec.by_hand)
        row["structures"].append({"structure": kind} | outcomes[kind])
    reasons = Counter[str]()
    for axis in discovery.frozen:
        if axis.reason != "the vocabulary":
            reasons[axis.reason] += axis.positions
    row["frozen_axes"] = dict(reasons.most_common(4))
    for kind in ("hidden", "heads", "ffn", "layers"):
        if kind not in kinds and only in (None, kind):
            # Nothing of the kind was found: frozen before it became a group, or not there at all.
            reason = "; ".join(row["frozen_axes"]) if kind != "layers" else "no list of layers"
            row["structures"].append({"structure": kind, "verdict": "absent", "reason": reason})
    return row | {"seconds": round(time.monotonic() - started, 1)}


def tokens_of(length: int, seed: int = 1, batch: int = 2) -> torch.Tensor:
    """Return random token ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def _call(model: nn.Module, tokens: torch.Tensor) -> Any:
    return model(tokens)


def _groups(discovery: Discovery) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group in discovery.groups:
        entry = found.setdefault(group.kind, {"free": 0, "frozen": {}})
        if group.frozen is None:
            entry["free"] += 1
        else:
            entry["frozen"][group.frozen] = entry["frozen"].get(group.frozen, 0) + 1
    return found


# ------------------------------------------------------------------------------------ the checks


def _checks(spec: Spec, dense: nn.Module, row: Row) -> dict[str, Run]:
    """Return what is compared; what the dense model itself cannot do is left out and noted."""
    call = spec.call or _call

    def prefill(length: int) -> Run:
        return lambda model: [logits_of(call(model, tokens_of(length)))]

    def padded(left: bool) -> Run:
        def run(model: nn.Module) -> list[torch.Tensor]:
            tokens = tokens_of(12, seed=2)
            mask = torch.ones_like(tokens)
            mask[0, :5] = 0
            if not left:
                mask = mask.flip(1)
            assert spec.masked is not None
            return [logits_of(spec.masked(model, tokens, mask))[mask.bool()]]

        return run

    def greedy(model: nn.Module) -> list[torch.Tensor]:
        tokens, seen = tokens_of(9, seed=3), []
        for _ in range(8):
            seen.append(logits_of(call(model, tokens))[:, -1])
            tokens = torch.cat([tokens, seen[-1].argmax(-1, keepdim=True)], dim=1)
        return seen

    def trained(model: nn.Module) -> list[torch.Tensor]:
        was = [(m, m.training) for m in model.modules()]
        shares = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
        model.train()
        for module, _ in shares:
            module.p = 0.0
        try:
            return [logits_of(call(model, tokens_of(12, seed=4)))]
        finally:
            for module, share in shares:
                module.p = share
            for module, state in was:
                module.training = state

    checks: dict[str, Run] = {f"prefill {n}": prefill(n) for n in spec.lengths}
    checks["greedy"] = greedy
    if spec.masked is not None:
        checks |= {"left padding": padded(True), "right padding": padded(False)}
    if spec.generate is not None:
        checks["generate"] = lambda model: spec.generate(model, tokens_of(9, seed=3))  # type: ignore[misc]
    checks["train mode"] = trained
    kept: dict[str, Run] = {}
    for name, run in checks.items():
        try:
            with torch.no_grad():
                one = computed(run, own_copy(dense))
                more = [computed(run, own_copy(dense)) for _ in range(2)]
            if not all(bool(torch.isnan(tensor).sum() == 0) for tensor in one):
                raise ValueError("not finite")
            if max(difference(one, other) for other in more) > 0:
                raise ValueError("differs from run to run")
            kept[name] = run
        except Exception as error:
            row.setdefault("left_out", {})[name] = _line(error)
    return kept


def _gradients(spec_call: Run, names: Mapping[str, str], tokens: torch.Tensor) -> Run:
    """Compare the loss and gradients of parameters; ``names`` gives each its name in the model."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        with torch.enable_grad():
            (logits,) = spec_call(model)
            targets = tokens[:, 1 : logits.shape[1] + 1]
            width = targets.shape[1]
            loss = F.cross_entropy(logits[:, :width].transpose(1, 2), targets)
            parameters = dict(model.named_parameters(remove_duplicate=False))
            wanted = [parameters[name] for name in names.values()]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        zeros = (
            torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)
        )
        return [loss.detach(), *zeros]

    return run


# ------------------------------------------------------------------------------- one structure


def _structure(
    kind: str,
    model: nn.Module,
    dense: nn.Module,
    discovery: Discovery,
    checks: Mapping[str, Run],
    by_hand: Callable[[nn.Module, Positions], set[tuple[str, int]]] | None,
) -> Row:
    try:
        removal = _removal(kind, model, discovery)
    except Exception as error:
        return _failure(error)
    if not any(len(units) for units in removal.values()):
        groups = [
            group for group in discovery.groups if kind == group.kind or kind in ("all", "plan")
        ]
        reasons = Counter(group.frozen for group in groups if group.frozen is not None)
        reason = reasons.most_common(1)[0][0] if reasons else "no number of units fits"
        return {"verdict": "frozen", "reason": reason}
    row: Row = {
        "removed": sum(len(units) for units in removal.values()),
        "of_groups": len(removal),
    }
    smaller = own_copy(model)
    try:
        prune_(smaller, discovery, removal)
    except Exception as error:
        return row | _failure(error)
    smaller = to_double(smaller)
    gone = removed_positions(discovery, removal)
    layers = removed_modules(discovery, removal)
    if by_hand is not None:
        dense = own_copy(dense)
        cut = by_hand(dense, gone)
        row |= {"cut by hand": sorted(name for name, _ in cut)} if cut else {}
        gone = {place: positions for place, positions in gone.items() if place not in cut}
    silent = zeroed(dense, gone)
    compared: dict[str, float] = {}
    lost: list[str] = []
    for name, run in checks.items():
        try:
            with torch.no_grad():
                wanted, unsure = expected(run, dense, silent, layers)
        except Exception as error:
            row.setdefault("oracle", {})[name] = _line(error)
            continue
        try:
            with torch.no_grad():
                # Generation leaves caches behind.
                own = own_copy(smaller) if name in ("generate", "train mode") else smaller
                given = computed(run, own)
        except Exception as error:
            return row | _failure(error) | {"verdict": "crashed", "at": name}
        apart = difference(wanted, given)
        if not apart <= LIMIT:
            apart = min(apart, _strictly(run, dense, silent, layers, given))
        compared[name] = float(f"{apart:.1e}")
        if unsure or not all(bool(one.isfinite().all()) for one in wanted):
            lost.append(name)  # zeros under a norm of weights are 0 / 0
    first = next(iter(checks), None)
    if first is not None:
        _compare_gradients(
            checks[first], model, dense, silent, smaller, gone, layers, discovery, compared, row
        )
        with torch.no_grad():
            row["visible"] = (
                difference(
                    computed(checks[first], own_copy(dense)), computed(checks[first], smaller)
                )
                > LIMIT
            )
    row["checks"] = compared
    wrong = {name: apart for name, apart in compared.items() if not apart <= LIMIT}
    sure = {name: apart for name, apart in wrong.items() if name not in lost}
    row["difference"] = max(compared.values(), default=0.0)
    if sure:
        row["verdict"] = "WRONG"
        row["twin"] = _twin(model, discovery, removal)
    elif wrong or not compared:
        row["verdict"] = "no verdict"
        row["reason"] = f"the oracle lost its way in {', '.join(lost) or 'every check'}"
    else:
        row["verdict"] = "right"
        if first is not None and not layers:
            row["control"] = _control(checks[first], model, dense, silent, discovery, removal)
    return row


def _strictly(
    run: Run,
    dense: nn.Module,
    silent: nn.Module,
    layers: tuple[str, ...],
    given: list[torch.Tensor],
) -> float:
    """Return the difference from the oracle that takes less for dead, infinite if it fails."""
    try:
        with torch.enable_grad():
            return difference(expected(run, dense, silent, layers, strict=True)[0], given)
    except Exception:
        return float("inf")


def _control(
    run: Run,
    model: nn.Module,
    dense: nn.Module,
    silent: nn.Module,
    discovery: Discovery,
    removal: Removal,
) -> str:
    """Give one member of each group its neighbour's positions: the oracle must notice."""
    rng = np.random.default_rng(0)
    groups = []
    for group in discovery.groups:
        units = removal.get(group.name)
        if units is not None and group.members:
            place = int(rng.integers(len(group.members)))
            member = group.members[place]
            moved = replace(member, index=np.roll(member.index, 1, axis=0))
            members = (*group.members[:place], moved, *group.members[place + 1 :])
            group = replace(group, members=members)
        groups.append(group)
    smaller = own_copy(model)
    try:
        # Not compared with its twin, which would refuse it before the oracle sees it.
        cut_(smaller, replace(discovery, groups=tuple(groups)), removal)
        with torch.no_grad():
            wanted, _ = expected(run, dense, silent, ())
            given = computed(run, to_double(smaller))
    except Exception as error:
        return _line(error)
    return "noticed" if difference(wanted, given) > LIMIT else "not noticed"


def _removal(kind: str, model: nn.Module, discovery: Discovery) -> dict[str, IntArray]:
    if kind == "all":
        return pick(discovery)
    if kind == "first layer":
        return {
            group.name: np.array([0])
            for group in discovery.groups
            if group.kind == "layers" and group.frozen is None and group.size > 1
        }
    if kind != "plan":
        return pick(discovery, (kind,))
    # As a user asks for it: heads and FFN channels by importance, half of the units.
    kinds = tuple(
        kind
        for kind in ("heads", "ffn")
        if (sizes := [g.size for g in discovery.groups if g.kind == kind and g.frozen is None])
        and min(sizes) > 1
    )
    if not kinds:
        return {}
    scores = score(own_copy(model), discovery, Criterion("l2"), input_ids=None, seed=0)
    return dict(allocate(discovery, scores, Selection(kinds), Target(unit_ratio=0.5)))


def _compare_gradients(
    run: Run,
    model: nn.Module,
    dense: nn.Module,
    silent: nn.Module,
    smaller: nn.Module,
    gone: Mapping[tuple[str, int], IntArray],
    layers: tuple[str, ...],
    discovery: Discovery,
    compared: dict[str, float],
    row: Row,
) -> None:
    names = _some_parameters(model, layers, discovery)
    tokens = tokens_of(300)
    before = {name: name for name in names}
    try:
        given = computed(_gradients(run, names, tokens), smaller)
    except Exception as error:
        row.setdefault("oracle", {})["gradients of the pruned model"] = _line(error)
        return
    for strict in (False, True):
        try:
            with torch.enable_grad():
                wanted, unsure = expected(
                    _gradients(run, before, tokens), dense, silent, layers, strict
                )
        except Exception as error:
            row.setdefault("oracle", {})["gradients"] = _line(error)
            continue
        left = [wanted[0]]
        for name, tensor in zip(names, wanted[1:], strict=True):
            for dim in range(tensor.dim()):
                dead = gone.get((name, dim))
                if dead is not None:
                    alive = torch.ones(tensor.shape[dim], dtype=torch.bool)
                    alive[torch.from_numpy(dead)] = False
                    tensor = tensor.index_select(dim, torch.nonzero(alive)[:, 0])
            left.append(tensor)
        apart = {
            "loss": difference(left[:1], given[:1]),
            "gradients": difference(left[1:], given[1:]),
        }
        if not unsure and max(apart.values()) <= max(compared.get("gradients", 1e30), LIMIT):
            compared.update({name: float(f"{value:.1e}") for name, value in apart.items()})
        if max(apart.values()) <= LIMIT:
            return


def _some_parameters(
    model: nn.Module, layers: tuple[str, ...], discovery: Discovery
) -> dict[str, str]:
    """Return a few kept parameters: dense name -> name in the pruned model."""
    gone: dict[str, list[int]] = {}
    for path in layers:
        parent, _, number = path.rpartition(".")
        gone.setdefault(parent, []).append(int(number))
    names: dict[str, str] = {}
    for name, _ in model.named_parameters():
        if name not in discovery.shapes or name.startswith(tuple(f"{path}." for path in layers)):
            continue
        new = name
        for parent, numbers in gone.items():
            match = re.match(re.escape(parent) + r"\.(\d+)\.", name)
            if match:
                place = int(match[1]) - sum(number < int(match[1]) for number in numbers)
                new = f"{parent}.{place}{name[match.end(1) :]}"
        names[name] = new
    step = max(1, len(names) // 8)
    return dict(list(names.items())[::step])


def _twin(model: nn.Module, discovery: Discovery, removal: Removal) -> str:
    """Return whether the project's own check, on its few tokens, notices."""
    try:
        expected_logits = twin_logits(own_copy(model), discovery, removal)
        smaller = own_copy(model)
        prune_(smaller, discovery, removal)
        actual = pruned_logits(smaller, discovery)
    except Exception as error:
        return f"fails: {_line(error)}"
    apart = largest_difference(expected_logits, actual)
    return "differs" if apart > tolerance(expected_logits) else "equal"


def _failure(error: Exception) -> Row:
    row: Row = {
        "verdict": "refused" if isinstance(error, LLMPrunerError) else "crashed",
        "reason": _line(error),
    }
    if row["verdict"] == "crashed" or error.__cause__ is not None:
        source = error.__cause__ or error
        frames = traceback.extract_tb(source.__traceback__)
        row["frames"] = [
            f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} {frame.line}"
            for frame in frames[-4:]
        ]
    return row


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
