"""Load, discover, estimate, plan, cut, verify, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llm_pruner.allocator import give_back
from llm_pruner.checkpoints import atomic_write_text, check_output, save_checkpoint
from llm_pruner.checkpoints.recipe import compose, from_edits
from llm_pruner.compensation import Refitted, add_means_, refit_
from llm_pruner.data.calibration import Calibration, build_calibration
from llm_pruner.data.text import SELF, load_documents, sources_of
from llm_pruner.errors import UserError, VerificationError
from llm_pruner.evaluation.rounding import Rounding
from llm_pruner.groups import discover
from llm_pruner.importance import Criterion, score
from llm_pruner.importance.criteria import MEASURES
from llm_pruner.pipeline.allocation_search import (
    AllocationSearch,
    Searched,
    search_allocation,
)
from llm_pruner.pipeline.cache_cost import cache_cost
from llm_pruner.pipeline.decode_time import Timed, params_for_decode_time
from llm_pruner.pipeline.facts import (
    criterion_in_words,
    importance_maps,
    layers_of,
    settings_of,
    size_of,
    source_of,
    versions,
)
from llm_pruner.pipeline.judge import divergences, sharing_copy
from llm_pruner.pipeline.levels import TOKENS as LEVEL_TOKENS
from llm_pruner.pipeline.levels import measure_levels
from llm_pruner.pipeline.loading import load
from llm_pruner.pipeline.matmul import fast_matmul, mixed_precision
from llm_pruner.pipeline.report import page_in, write_report
from llm_pruner.pipeline.rounding import measured_rounding
from llm_pruner.pipeline.settings import CalibrationSettings, ModelSettings
from llm_pruner.pipeline.trials import TOKENS as SPLIT_TOKENS
from llm_pruner.pipeline.trials import Trial, find_split
from llm_pruner.planning import (
    Cost,
    Level,
    Plan,
    PlanCalibration,
    PlanCriterion,
    Row,
    Selection,
    Survivors,
    Target,
    check_reachable,
    choose_groups,
    explain,
    find_allocation,
    read_plan,
    step_targets,
)
from llm_pruner.removal import count_parameters
from llm_pruner.report.data import ImportanceMap, LayerSearch, Report, SplitTrial
from llm_pruner.sources import LoadedModel
from llm_pruner.surgery import prune_
from llm_pruner.types import Discovery, Edits, FloatArray, IntArray, Removal
from llm_pruner.verification import (
    find_culprits,
    largest_difference,
    pruned_logits,
    require_equal,
    tolerance,
    twin_logits,
)

COMPENSATIONS = ("none", "least-squares", "bias")

VERIFY_LIMIT = 2_000_000_000
"""Models of up to this many parameters are verified unless the user says otherwise."""


@dataclass(frozen=True)
class Pruned:
    """What a run did.

    Attributes:
        plan: the Plan, in the numbering of the dense model.
        rows: what is left of every layer.
        parameters: before and after.
        kind: how the checkpoint loads; None if nothing was saved.
        path: the folder or the Plan file written.
        bytes: size of the folder.
        difference: largest difference of logits between the pruned model and its masked twin;
            None if it was not verified.
        seconds: by stage.
        refitted: what compensation did to each consumer, all steps.
        trials: splits of the budget that were tried.
        levels: what trial removals in each group alone cost, all steps.
        searched: what a search between layers found, in each step.
        needs: what loading the folder needs besides transformers, such as ``import llm_pruner``.
        report: the page that shows all this; None if none was written.
        importance: of the units, as the first estimate on the dense model gave it; empty if none
            was made.
        rounding: what ``round_to`` was chosen by; None if it was given.
        timed: trials by which a decode time became a number of parameters.
    """

    plan: Plan
    rows: tuple[Row, ...]
    parameters: tuple[int, int]
    kind: Literal["stock", "recipe"] | None
    path: Path | None
    bytes: int | None
    difference: float | None
    seconds: dict[str, float]
    refitted: tuple[Refitted, ...] = ()
    trials: tuple[Trial, ...] = ()
    levels: tuple[Level, ...] = ()
    searched: tuple[Searched, ...] = ()
    needs: tuple[str, ...] = ()
    report: Path | None = None
    importance: tuple[ImportanceMap, ...] = ()
    rounding: Rounding | None = None
    timed: tuple[Timed, ...] = ()


def prune_checkpoint(
    model: ModelSettings,
    out: Path,
    *,
    target: Target | None,
    selection: Selection | None,
    protect_by_default: tuple[bool, bool] = (False, False),
    round_by_speed: bool = False,
    criterion: Criterion,
    calibration: CalibrationSettings,
    seed: int = 0,
    steps: int = 1,
    plan_file: Path | None = None,
    dry_run: bool = False,
    verify: bool | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    compensation: str = "none",
    find_best_split: bool | None = None,
    search: AllocationSearch | None = None,
    command: str | None = None,
) -> Pruned:
    """Prune a checkpoint and save the result as a folder that ``from_pretrained`` loads.

    Args:
        model: what to prune.
        out: the folder to write; with ``dry_run`` the Plan file.
        target: how much to remove; None with ``plan_file``.
        selection: where from; None with ``plan_file``.
        protect_by_default: whether to replace the protection at the start and at the end by
            ``default_protection``.
        round_by_speed: whether to replace ``round_to`` by what this machine multiplies fast.
        criterion: how importance is estimated.
        calibration: text for it; read by ``taylor`` alone.
        seed: of the calibration text and of ``random``.
        steps: prune in this many equal steps, estimating anew before each.
        plan_file: replay this Plan instead of making one.
        dry_run: write the Plan and stop.
        verify: compare with the masked twin, and the saved folder with the model in memory; by
            default for models of up to ``VERIFY_LIMIT`` parameters.
        overwrite: replace what ``out`` holds.
        max_shard_size: largest weight file.
        compensation: ``least-squares`` refits what reads the pruned axes after each cut, on the
            calibration text; ``bias`` gives it what was removed on average; ``none`` leaves the
            kept weights as they are.
        find_best_split: choose how the budget is split between structures by trial removals, in
            the first step; by default where ``finds_split`` says so.
        search: move units between layers by trial, for so long over all steps; None: do not.
        command: the command line of this run, for the report.

    Raises:
        UserError: something that was given must change; nothing is written.
        VerificationError: the pruned model is not its twin; nothing is written.
    """
    clock = _Clock()
    # All that can be refused without the model is, since loading one may take minutes.
    _check_out(out, model.source, overwrite, dry_run)
    if compensation not in COMPENSATIONS:
        raise UserError(
            f"unknown compensation {compensation!r}; choose one of {', '.join(COMPENSATIONS)}"
        )
    refit = compensation != "none"
    plan = None if plan_file is None else read_plan(plan_file)
    _check_split(target, selection, find_best_split)
    if find_best_split is None:
        find_best_split = finds_split(target, selection, criterion, calibration)
    if plan is None:
        if target is None or selection is None:
            raise UserError(
                "no target given; use --ratio, --params, --kv-cache, --decode-time or --unit-ratio"
            )
        if steps < 1:
            raise UserError(f"steps={steps} prunes nothing; use 1 or more")
        _check_search(search, target, selection)
    judges = search is not None or (selection is not None and selection.scope == "measured")
    if (plan is None and (criterion.reads_text or find_best_split or judges)) or refit:
        _check_calibration(calibration)
    # A plan of random units that nothing judges, or a plan that is there, needs no weights.
    judged = find_best_split or judges
    timing = target is not None and target.decode_time is not None
    weightless = plan is not None or (criterion.name == "random" and not judged and not timing)
    loaded = load(model, weights=not (dry_run and weightless))
    clock.stop("load")
    network = loaded.model
    dense_config = copy.deepcopy(network.config)
    dense_size = size_of(network)
    scores: dict[str, FloatArray] = {}
    discovery = discover(network)
    clock.stop("discover")
    verified = verify if verify is not None else count_parameters(discovery) <= VERIFY_LIMIT
    surgeon = _Surgeon(network, verified and not dry_run, clock)
    # A dry run refits too where its plan depends on it.
    refits = refit and not (dry_run and weightless)
    refitter = _Refitter(loaded, discovery, surgeon, compensation) if refits else None
    trials: list[Trial] = []
    levels: list[Level] = []
    searched: list[Searched] = []
    rounding = None
    timed: list[Timed] = []
    if plan is not None:
        removal: dict[str, IntArray] = plan.removal(discovery)
        if not dry_run:
            text = _calibration_text(loaded, calibration, seed, clock) if refitter else None
            surgeon.cut(discovery, removal)
            if refitter is not None and text is not None:
                refitter.refit(removal, text.input_ids)
    else:
        assert target is not None
        assert selection is not None
        first, last = default_protection(discovery)
        if protect_by_default[0]:
            selection = replace(selection, protect_first=first)
        if protect_by_default[1]:
            selection = replace(selection, protect_last=last)
        if round_by_speed:
            rounding = measured_rounding(network, discovery, selection)
            selection = replace(selection, round_to=rounding.multiple)
            clock.stop("round")
        decode_time = target.decode_time
        if decode_time is not None:
            params, timed = params_for_decode_time(network, discovery, selection, decode_time)
            target = Target(params=params)
            clock.stop("timing")
        cost = None
        if target.kv_cache is not None:
            cost = cache_cost(network, discovery, selection, Survivors.dense(discovery))
        check_reachable(discovery, selection, target, cost)
        used, removal, selection = _prune_in_steps(
            loaded,
            discovery,
            surgeon,
            target,
            cost,
            selection,
            criterion,
            calibration,
            seed,
            steps,
            cut_last=not dry_run,
            refitter=refitter,
            trials=trials if find_best_split else None,
            levels=levels,
            search=search,
            searched=searched,
            first_scores=scores,
        )
        plan = Plan.from_removal(
            discovery,
            removal,
            package_version=version("llm-pruner"),
            model_name=loaded.name,
            revision=loaded.revision,
            criterion=_criterion_record(criterion),
            calibration=used,
            seed=seed,
            target=target,
            decode_time=decode_time,
            steps=steps,
            selection=selection,
            search_trials=sum(one.trials for one in searched) if search is not None else None,
            compensation=compensation if refit else None,
        )
    rows = tuple(explain(discovery, removal))
    result = Pruned(
        plan=plan,
        rows=rows,
        parameters=(count_parameters(discovery), count_parameters(discovery, removal)),
        kind=None,
        path=out,
        bytes=None,
        difference=surgeon.difference,
        seconds=clock.seconds,
        refitted=tuple(refitter.done) if refitter is not None else (),
        trials=tuple(trials),
        levels=tuple(levels),
        searched=tuple(searched),
        importance=importance_maps(discovery, scores, removal, rows),
        rounding=rounding,
        timed=tuple(timed),
    )
    if dry_run:
        atomic_write_text(out, plan.to_json())
        return result
    refitter = None  # and with it the dense weights
    give_back()
    saved = save_checkpoint(
        network,
        out,
        edits=surgeon.edits,
        plan_json=plan.to_json(),
        tokenizer=loaded.tokenizer,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        dense_config=dense_config,
        beside=lambda folder, kind, needs: write_report(
            folder,
            Report(
                source=source_of(model.source, loaded.name, loaded.revision, network),
                sizes={"dense": dense_size, "pruned": size_of(network)},
                layers=layers_of(result.rows),
                importance=result.importance,
                criterion=criterion_in_words(plan),
                compensation=plan.compensation,
                trials=tuple(SplitTrial(**asdict(trial)) for trial in trials),
                searches=tuple(LayerSearch(**asdict(one)) for one in searched),
                twin_difference=result.difference,
                saved_as=kind,
                needs=needs,
                seconds=clock.seconds,
                settings=settings_of(plan, {"dtype": model.dtype, "device": model.device}),
                versions=versions(),
                command=command,
            ),
        ),
        check=_reload_check(network, discovery, model) if verified else None,
    )
    clock.stop("save")
    return replace(
        result,
        kind=saved.kind,
        path=saved.path,
        bytes=saved.bytes,
        seconds=clock.seconds,
        needs=saved.needs,
        report=page_in(saved.path),
    )


def _prune_in_steps(
    loaded: LoadedModel,
    dense: Discovery,
    surgeon: _Surgeon,
    target: Target,
    cost: Cost | None,
    selection: Selection,
    criterion: Criterion,
    calibration: CalibrationSettings,
    seed: int,
    steps: int,
    *,
    cut_last: bool,
    refitter: _Refitter | None,
    trials: list[Trial] | None,
    levels: list[Level],
    search: AllocationSearch | None,
    searched: list[Searched],
    first_scores: dict[str, FloatArray],
) -> tuple[PlanCalibration | None, dict[str, IntArray], Selection]:
    """Estimate, allocate, cut and refit, step by step.

    The scores of the first estimate, which are the dense model's, go into ``first_scores``, what
    trials measured into ``trials``, ``levels`` and ``searched``.

    Returns:
        The calibration, the whole removal, and the selection with the split that was found.
    """
    clock = surgeon.clock
    survivors = Survivors.dense(dense)
    targets = step_targets(survivors.parameters, target, steps)
    if criterion.name != "random":
        _require_weights(loaded.model)
    tokens, record, scored, held_out = None, None, None, None
    measures = selection.scope == "measured"
    judges = trials is not None or measures or search is not None
    if criterion.reads_text or refitter is not None or judges:
        text = _calibration_text(loaded, calibration, seed, clock)
        tokens = text.input_ids
        record = _calibration_record(text.settings, calibration.score_samples)
        scored = tokens
        if judges:
            held_out, scored = _hold_out(tokens)
    discovery = dense
    for number, step in enumerate(targets):
        chosen = choose_groups(discovery, selection, survivors)
        names = {group.name for group in chosen}
        names |= {c.group for group in chosen for c in group.companions}
        seen = None if scored is None else scored[: calibration.score_samples]
        with fast_matmul():
            scores = score(
                loaded.model, discovery, criterion, input_ids=seen, seed=seed, groups=names
            )
        if not first_scores:
            first_scores.update(scores)
        clock.stop("estimate")
        measured: list[Level] = []
        if held_out is not None and measures:
            some = held_out[: max(1, LEVEL_TOKENS // held_out.shape[1])]
            measured = measure_levels(loaded.model, discovery, scores, selection, survivors, some)
            levels.extend(measured)
            clock.stop("trials")
        if held_out is not None and trials is not None and number == 0:
            with mixed_precision():
                selection, tried = find_split(
                    loaded.model,
                    discovery,
                    scores,
                    selection,
                    step,
                    survivors,
                    held_out,
                    measured,
                    refit_on=scored if refitter is not None and refitter.fits else None,
                )
            trials.extend(tried)
            clock.stop("trials")
        if cost is not None and number > 0:
            cost = cache_cost(loaded.model, discovery, selection, survivors, cost.dense)
        allocation = find_allocation(discovery, scores, selection, step, survivors, measured, cost)
        if held_out is not None and search is not None:
            allocation, found = search_allocation(
                loaded.model,
                discovery,
                allocation,
                held_out,
                search.shared(steps),
                within_structures=selection.split is not None or selection.scope == "local",
                seed=seed + number,
            )
            searched.append(found)
            clock.stop("search")
        removal = allocation.removal()
        survivors = survivors.after(removal)
        clock.stop("plan")
        if number + 1 < len(targets) or cut_last:
            surgeon.cut(discovery, removal)
            if refitter is not None and tokens is not None:
                refitter.refit(survivors.removal(), tokens)
        if number + 1 < len(targets):
            discovery = discover(loaded.model)
            clock.stop("discover")
    return record, survivors.removal(), selection


def _calibration_text(
    loaded: LoadedModel, calibration: CalibrationSettings, seed: int, clock: _Clock
) -> Calibration:
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} has no tokenizer, so no text can be read; add one")
    text = build_calibration(
        calibration.source,
        loaded.tokenizer,
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=seed,
        model=loaded.model,
        text_field=calibration.text_field,
        split=calibration.split,
        kept=calibration.kept,
    )
    clock.stop("calibration text")
    return text


def _hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples for judging and the rest: an eighth, at most ``SPLIT_TOKENS`` tokens.

    They are the last ones, because packed samples share documents with their neighbours.
    """
    count = max(1, min(len(tokens) // 8, SPLIT_TOKENS // tokens.shape[1]))
    if len(tokens) < 2:
        raise UserError(
            "trials need text of their own and there is 1 calibration sample; give more samples, "
            "or say the split yourself"
        )
    return tokens[-count:], tokens[:-count]


class _Refitter:
    """Brings the pruned model nearer to the dense one after each cut, if that is a gain.

    Each consumer is judged by its own error on held-out tokens, and all of them together by the
    divergence from the dense model on samples that no fit has seen: if the repaired model is
    further from the dense one than it was, it gets its weights back.
    """

    def __init__(
        self, loaded: LoadedModel, discovery: Discovery, surgeon: _Surgeon, compensation: str
    ) -> None:
        self._model, self._dense = loaded.model, sharing_copy(loaded.model)
        self._discovery, self._surgeon = discovery, surgeon
        self.fits = compensation == "least-squares"
        self.done: list[Refitted] = []

    def refit(self, removal: Removal, tokens: torch.Tensor) -> None:
        """Refit after ``removal``, all that was removed so far in dense numbering."""
        before = sharing_copy(self._model)
        # Two samples are the least that can be fitted; then one of them has to judge, too.
        held_out, fitted = _hold_out(tokens) if len(tokens) > 2 else (tokens[-1:], tokens)
        repair = refit_ if self.fits else add_means_
        with mixed_precision():
            found = repair(self._model, self._dense, self._discovery, removal, fitted)
        give_back()
        judging = held_out[: max(1, LEVEL_TOKENS // held_out.shape[1])]
        after, without = divergences(self._dense, (self._model, before), judging)
        if not after <= without:
            for one in found:
                module, old = (
                    self._model.get_submodule(one.module),
                    before.get_submodule(one.module),
                )
                module.weight = old.get_parameter("weight")
                if one.biased:
                    module.bias = getattr(old, "bias", None)
            found = [replace(one, ridge=None, after=one.before, biased=False) for one in found]
        self._surgeon.has_biases([one.module for one in found if one.biased])
        self.done.extend(found)
        self._surgeon.clock.stop("least squares" if self.fits else "bias")


class _Surgeon:
    """Cuts one model, once or in steps, and keeps what was changed since it was loaded."""

    def __init__(self, model: nn.Module, verify: bool, clock: _Clock) -> None:
        self.model = model
        self.verify = verify
        self.clock = clock
        self.edits = Edits({}, {}, {}, {})
        self.difference: float | None = None

    def cut(self, discovery: Discovery, removal: Removal) -> None:
        """Prune in place; with ``verify``, compare with the masked twin."""
        expected = twin_logits(self.model, discovery, removal) if self.verify else None
        backup = self._weights() if self.verify else None
        edits = prune_(self.model, discovery, removal)
        total = compose(from_edits(self.edits), from_edits(edits))
        self.edits = Edits(total.shapes, total.buffers, total.attributes, total.layers)
        self.clock.stop("cut")
        if expected is not None:
            actual = pruned_logits(self.model, discovery)
            found = require_equal(
                expected, actual, lambda: self._culprits(discovery, removal, backup)
            )
            self.difference = max(self.difference or 0.0, found)
            self.clock.stop("verify")

    def has_biases(self, modules: Sequence[str]) -> None:
        """Note the biases that modules have now, whether or not they had one."""
        biases = {
            f"{name}.bias": tuple(self.model.get_submodule(name).get_parameter("bias").shape)
            for name in modules
        }
        self.edits = replace(self.edits, shapes={**self.edits.shapes, **biases})

    def _weights(self) -> Callable[[], nn.Module]:
        """Return how to get the model back as it is now.

        The copy shares the tensors, which surgery leaves as they are.
        """
        frozen = sharing_copy(self.model)
        return lambda: frozen

    def _culprits(
        self, discovery: Discovery, removal: Removal, backup: Callable[[], nn.Module] | None
    ) -> list[str]:
        return [] if backup is None else find_culprits(backup(), discovery, removal)


def _reload_check(
    model: Any, discovery: Discovery, settings: ModelSettings
) -> Callable[[Path], None]:
    """Return a check that a saved folder gives the logits of the model in memory."""

    def check(folder: Path) -> None:
        expected = pruned_logits(model, discovery)
        saved = replace(settings, source=str(folder), revision=None)
        again = load(saved, tokenizer_required=False)
        actual = pruned_logits(again.model, discovery)
        difference = largest_difference(expected, actual)
        if difference > tolerance(expected):
            raise VerificationError(
                f"the saved folder gives logits that differ by {difference:.3g} from the model "
                "that was saved; nothing was kept; please report the model"
            )

    return check


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Book the time since the last call on a stage; leave the next one its memory."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        give_back()


def _check_out(out: Path, source: str, overwrite: bool, dry_run: bool) -> None:
    if not dry_run:
        check_output(out, overwrite)
        if out.exists() and out.resolve() == Path(source).expanduser().resolve():
            raise UserError(f"{out} is the model that is to be pruned; give another --out")
    elif out.is_dir():
        raise UserError(f"{out} is a folder; with --dry-run, --out names the plan file to write")
    elif out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")


def _check_split(
    target: Target | None, selection: Selection | None, find_best_split: bool | None
) -> None:
    """Raise UserError if a split of parameters is asked for where none are counted."""
    split = selection is not None and selection.split is not None
    if target is not None and target.kv_cache is not None and (split or find_best_split):
        raise UserError(
            f"a split shares out parameters, and {target} counts the cache; drop one of them"
        )


def _check_search(search: AllocationSearch | None, target: Target, selection: Selection) -> None:
    """Raise UserError if a search would undo what was asked for."""
    if search is None:
        return
    if selection.uniform:
        raise UserError(
            "a search moves units between layers, and uniform layers lose the same; use one of them"
        )
    if target.unit_ratio is not None:
        raise UserError(
            f"{target} says what each layer loses, and a search moves units between layers; give "
            "a target in parameters (ratio or params) with it"
        )


def _check_calibration(calibration: CalibrationSettings) -> None:
    """Raise UserError if the calibration text cannot be read."""
    if calibration.samples < 1:
        raise UserError(f"samples={calibration.samples} calibrates on nothing; use at least 1")
    if calibration.score_samples is not None and calibration.score_samples < 1:
        raise UserError(
            f"score_samples={calibration.score_samples} estimates on nothing; use at least 1"
        )
    if (calibration.score_samples or 0) > calibration.samples:
        raise UserError(
            f"score_samples={calibration.score_samples} of {calibration.samples} samples cannot be "
            "read; ask for more samples, or for fewer of them"
        )
    if calibration.seq_len < 2:
        raise UserError(f"seq_len={calibration.seq_len} predicts no token; use at least 2")
    for source in sources_of(calibration.source):
        if source == SELF:
            continue
        # A local file is read whole, so that a broken line far down shows now. Of a dataset the
        # beginning says whether it is there.
        load_documents(
            source,
            split=calibration.split,
            text_field=calibration.text_field,
            limit=None if Path(source).expanduser().exists() else 1000,
        )


def _require_weights(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model has no weights here; only --criterion random works without")


def _criterion_record(criterion: Criterion) -> PlanCriterion:
    if criterion.name == "random":
        return PlanCriterion(name="random")
    if criterion.name in MEASURES:
        return PlanCriterion(name=criterion.name)
    if criterion.name != "taylor":
        return PlanCriterion(name=criterion.name, aggregate=criterion.aggregate)
    return PlanCriterion(
        name=criterion.name,
        order=criterion.order,
        reduction=criterion.reduction,
        aggregate=criterion.aggregate,
    )


def _calibration_record(settings: dict[str, Any], score_samples: int | None) -> PlanCalibration:
    return PlanCalibration(
        # No folder: the same text gives the same plan wherever it lies.
        source=",".join(Path(part).name for part in sources_of(settings["source"])),
        split=settings["split"],
        samples=settings["samples"],
        seq_len=settings["seq_len"],
        score_samples=score_samples,
        seed=settings["seed"],
        digest=settings["fingerprint"],
    )


def finds_split(
    target: Target | None,
    selection: Selection | None,
    criterion: Criterion,
    calibration: CalibrationSettings,
) -> bool:
    """Return whether a run finds the split of its budget by trial removals unless told otherwise.

    It does where there is something to split (several structures, and a number of parameters to
    remove that no split was given for, nor a ranking by measured damage), and text is there anyway,
    because the criterion reads it.
    """
    return (
        target is not None
        and target.unit_ratio is None
        and target.kv_cache is None
        and selection is not None
        and selection.split is None
        and selection.scope != "measured"
        and len(selection.structures) > 1
        and criterion.reads_text
        and calibration.samples > 1
    )


def default_protection(discovery: Discovery) -> tuple[int, int]:
    """Return how many layers stay whole at the start and at the end.

    The first and the last layers are the costliest to prune (arXiv 2305.11627, section 4.1): a
    quarter and a fifth of the layers, at most 4 and 3.
    """
    layers = max(
        (group.layer + 1 for group in discovery.groups if group.layer is not None), default=0
    )
    return min(4, layers // 4), min(3, layers // 5)
