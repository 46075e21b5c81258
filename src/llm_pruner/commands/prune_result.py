"""The end of a run of ``prune``: its record for scripts, the folder and the report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_pruner import planning
from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.save import keep_type_
from llm_pruner.commands.prune_start import without_folders
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.report import facts
from llm_pruner.report.data import Report, SavedAs
from llm_pruner.report.records import Pruned
from llm_pruner.report.write import page_in, write_report, write_request
from llm_pruner.runtime.memory import give_back
from llm_pruner.surgery.removal import count_parameters

if TYPE_CHECKING:
    from llm_pruner.commands.prune import PruneRun

RELOAD_LIMIT = 2_000_000_000
"""Parameters up to which a saved model is loaded beside the one in memory."""


def result_of(run: PruneRun) -> Pruned:
    """Return what a run has done so far."""
    assert run.plan is not None
    before = count_parameters(run.discovery)
    after = count_parameters(run.discovery, run.removal)
    verified, round_to = run.surgeon.verified, run.plan.settings.get("round_to")
    if run.settings.plan is None:
        round_to = run.selection.round_to
    return Pruned(
        model=run.plan.model.name,
        parameters_before=before,
        parameters_after=after,
        ratio=1 - after / before,
        layers=tuple(planning.explain(run.discovery, run.removal)),
        twin_difference=None if verified is None else verified.difference,
        twin_scenes=() if verified is None else verified.scenes,
        twin_skipped=() if verified is None else verified.skipped,
        round_to=round_to if isinstance(round_to, int) else None,
        refitted=() if run.refitter is None else tuple(run.refitter.done),
        repair=run.training,
        trials=tuple(run.trials),
        seconds=run.clock.seconds,
        path=run.settings.out,
    )


def save(run: PruneRun) -> Pruned:
    """Write the folder of a run that is done but for that."""
    result = result_of(run)
    settings, network = run.settings, run.network
    assert run.plan is not None
    run.refitter = None  # and with it the dense weights
    give_back()
    if settings.dtype == "auto":
        keep_type_(network, run.saved)
    reloads = settings.verify and result.parameters_before <= RELOAD_LIMIT
    again = settings.loading(settings.out, dtype="auto").but(device=run.device)
    saved = save_checkpoint(
        network,
        settings.out,
        edits=run.surgeon.edits,
        plan_json=run.plan.to_json(),
        tokenizer=run.loaded.tokenizer,
        processor=run.loaded.processor,
        overwrite=settings.overwrite,
        max_shard_size=settings.max_shard_size,
        dense_config=run.dense_config,
        beside=partial(_write_beside, run, result),
        check=run.surgeon.reload_check(run.discovery, again, run.room) if reloads else None,
    )
    run.clock.stop("save")
    return replace(
        result,
        path=saved.path,
        saved_as=saved.kind,
        needs=saved.needs,
        bytes=saved.bytes,
        report=page_in(saved.path),
    )


def _write_beside(
    run: PruneRun, result: Pruned, folder: Path, kind: SavedAs, needs: tuple[str, ...]
) -> None:
    """Write the settings and the report beside the weights."""
    write_request(folder, run.settings)
    done = replace(result, saved_as=kind, needs=needs)
    write_report(folder, partial(_report, run, done))


def _report(run: PruneRun, done: Pruned) -> Report:
    """Return the report that lies beside the weights."""
    settings, loaded, plan = run.settings, run.loaded, run.plan
    assert plan is not None
    # A report has many fields of the run, by the same names.
    shared = {name: of for name, of in vars(done).items() if name in Report.model_fields}
    return Report(
        **shared | {"layers": facts.layers_of(done.layers), "repair": facts.repair_of(done)},
        source=facts.source_of(
            settings.model, loaded.name, loaded.revision, run.network, loaded.fingerprint
        ),
        sizes={"dense": run.dense_size, "pruned": model_size(run.network)},
        importance=facts.importance_maps(run.discovery, run.scores, run.removal),
        criterion=facts.criterion_in_words(plan),
        compensation=settings.compensation if any(one.changed for one in done.refitted) else None,
        settings=facts.settings_of(
            plan,
            {"dtype": settings.dtype, "device": settings.device},
            _after(run),
            plan.text if run.text is None else run.text.settings["fingerprint"],
        ),
        versions=facts.versions(),
        command=run.command,
    )


def _after(run: PruneRun) -> dict[str, Any]:
    """Return the settings of what was done after the cut."""
    settings, replayed = run.settings, run.settings.plan is not None
    found: dict[str, Any] = {}
    if replayed:
        found["compensation"] = settings.compensation if run.refits else "none"
    if replayed and run.text is not None:
        names = ("text_split", "text_field", "samples", "seq_len", "seed")
        read = {name: run.text.settings[name] for name in names}
        found |= {name: of for name, of in read.items() if of is not None}
        found["calibration"] = without_folders(settings.calibration)
    if run.refits:
        found["refit_text"] = settings.refit_text
    if run.repairs:
        found["repair_minutes"] = settings.repair_minutes
    return found
