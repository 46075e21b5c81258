"""Load, discover, estimate, plan, cut, verify, save."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from llm_pruner.checkpoints import atomic_write_text, save_checkpoint
from llm_pruner.commands.prune_checks import (
    check_out,
    check_search,
    check_split,
    default_protection,
    finds_split,
)
from llm_pruner.commands.pruned import Pruned
from llm_pruner.commands.refitter import COMPENSATIONS, Refitter
from llm_pruner.commands.space import check_space
from llm_pruner.commands.stepwise import Steps, StepSettings, prune_in_steps
from llm_pruner.data.text import sources_of
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.files.outputs import Source
from llm_pruner.files.places import check_shard_size
from llm_pruner.importance import Criterion
from llm_pruner.importance.criteria import MEASURES
from llm_pruner.models.loading import load
from llm_pruner.planning import (
    Plan,
    PlanCriterion,
    Selection,
    Survivors,
    Target,
    check_reachable,
    explain,
    read_plan,
)
from llm_pruner.report.data import LayerSearch, Report, SplitTrial
from llm_pruner.report.facts import (
    criterion_in_words,
    importance_maps,
    layers_of,
    settings_of,
    size_of,
    source_of,
    versions,
)
from llm_pruner.report.write import page_in, write_report
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.timer import Clock
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.calibration import check_calibration, read_calibration
from llm_pruner.search.decode_time import Timed, params_for_decode_time
from llm_pruner.search.fast_widths import measured_rounding
from llm_pruner.search.layer_allocation import AllocationSearch
from llm_pruner.settings.common import CalibrationSettings, ModelSettings
from llm_pruner.settings.limits import check_number, check_seed
from llm_pruner.surgery.pruner import Surgeon, reload_check
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import IntArray

RELOAD_LIMIT = 2_000_000_000
"""Parameters up to which a saved model is loaded beside the one in memory."""


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
    verify: bool = True,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    compensation: str = "none",
    find_best_split: bool | None = None,
    search: AllocationSearch | None = None,
    reads: Sequence[Source] = (),
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
        verify: compare with the masked twin, and, for models of up to ``RELOAD_LIMIT`` parameters,
            the saved folder with the model in memory.
        overwrite: replace what ``out`` holds.
        max_shard_size: largest weight file.
        compensation: ``least-squares`` refits what reads the pruned axes after each cut, on the
            calibration text; ``bias`` gives it what was removed on average; ``none`` leaves the
            kept weights as they are.
        find_best_split: choose how the budget is split between structures by trial removals, in
            the first step; by default where ``finds_split`` says so.
        search: move units between layers by trial, for so long over all steps; None: do not.
        reads: files that were read besides, which ``out`` must not touch.
        command: the command line of this run, for the report.

    Raises:
        UserError: something that was given must change; nothing is written.
        VerificationError: the pruned model is not its twin; nothing is written.
    """
    clock = Clock()
    # All that can be refused without the model is, since loading one may take minutes.
    check_out(
        out, overwrite, dry_run, (model.source, plan_file, *sources_of(calibration.source), *reads)
    )
    check_seed(seed)
    check_shard_size(max_shard_size)
    if compensation not in COMPENSATIONS:
        raise UserError(
            f"unknown compensation {compensation!r}; choose one of {', '.join(COMPENSATIONS)}"
        )
    refit = compensation != "none"
    plan = None if plan_file is None else read_plan(plan_file)
    check_split(target, selection, find_best_split)
    if find_best_split is None:
        find_best_split = finds_split(target, selection, criterion, calibration)
    if plan is None:
        if target is None or selection is None:
            raise UserError(
                "no target given; use --ratio, --params, --kv-cache, --decode-time or --unit-ratio"
            )
        if steps < 1:
            raise UserError(f"steps={steps} prunes nothing; use 1 or more")
        check_number("steps", steps, 1, 1000)
        check_search(search, target, selection)
    if not dry_run and target is not None:
        check_space(out, model, target)
    judges = search is not None or (selection is not None and selection.scope == "measured")
    if (plan is None and (criterion.reads_text or find_best_split or judges)) or refit:
        check_calibration(calibration)
    # A plan of random units that nothing judges, or a plan that is there, needs no weights.
    judged = find_best_split or judges
    timing = target is not None and target.decode_time is not None
    weightless = plan is not None or (criterion.name == "random" and not judged and not timing)
    loaded = load(model, weights=not (dry_run and weightless))
    clock.stop("load")
    network = loaded.model
    dense_config = copy.deepcopy(network.config)
    dense_size = size_of(network)
    discovery = discover(network)
    clock.stop("discover")
    surgeon = Surgeon(network, verify and not dry_run, clock)
    # A dry run refits too where its plan depends on it.
    refits = refit and not (dry_run and weightless)
    refitter = Refitter(loaded, discovery, surgeon, compensation) if refits else None
    done: Steps | None = None
    rounding = None
    timed: list[Timed] = []
    if plan is not None:
        removal: dict[str, IntArray] = plan.removal(discovery)
        if not dry_run:
            text = read_calibration(loaded, calibration, seed, clock) if refitter else None
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
        done = prune_in_steps(
            loaded,
            discovery,
            surgeon,
            StepSettings(
                target,
                cost,
                selection,
                criterion,
                calibration,
                seed,
                steps,
                find_best_split,
                search,
                cut_last=not dry_run,
            ),
            refitter,
        )
        removal = done.removal
        plan = Plan.from_removal(
            discovery,
            removal,
            package_version=version("llm-pruner"),
            model_name=loaded.name,
            revision=loaded.revision,
            criterion=_criterion_record(criterion),
            calibration=done.calibration,
            seed=seed,
            target=target,
            decode_time=decode_time,
            steps=steps,
            selection=done.selection,
            search_trials=None if search is None else sum(one.trials for one in done.searched),
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
        verified=surgeon.verified,
        seconds=clock.seconds,
        refitted=tuple(refitter.done) if refitter is not None else (),
        trials=tuple(done.trials) if done is not None else (),
        levels=tuple(done.levels) if done is not None else (),
        searched=tuple(done.searched) if done is not None else (),
        importance=importance_maps(
            discovery, done.scores if done is not None else {}, removal, rows
        ),
        rounding=rounding,
        timed=tuple(timed),
    )
    loaded.check_stored()
    if dry_run:
        atomic_write_text(out, plan.to_json())
        return result
    refitter = None  # and with it the dense weights
    verified = surgeon.verified
    reloads = verify and count_parameters(discovery) <= RELOAD_LIMIT
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
                trials=tuple(SplitTrial(**asdict(trial)) for trial in result.trials),
                searches=tuple(LayerSearch(**asdict(one)) for one in result.searched),
                twin_difference=None if verified is None else verified.difference,
                twin_scenes=() if verified is None else verified.scenes,
                twin_skipped=() if verified is None else verified.skipped,
                saved_as=kind,
                needs=needs,
                seconds=clock.seconds,
                settings=settings_of(plan, {"dtype": model.dtype, "device": model.device}),
                versions=versions(),
                command=command,
            ),
        ),
        check=reload_check(network, discovery, model, clock) if reloads else None,
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
