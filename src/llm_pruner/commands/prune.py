"""Load, discover, estimate, plan, cut, verify, save."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from llm_pruner.checkpoints import SavedCheckpoint, atomic_write_text, save_checkpoint
from llm_pruner.commands.prune_checks import check_out, default_protection, finds_split
from llm_pruner.commands.pruned import Pruned
from llm_pruner.commands.refitter import Refitter
from llm_pruner.commands.request import write_request
from llm_pruner.commands.space import check_space
from llm_pruner.commands.stepwise import Estimator, Steps, prune_in_steps
from llm_pruner.data.calibration import Calibration, check_calibration, read_calibration
from llm_pruner.data.text import sources_of
from llm_pruner.discovery.groups import discover
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.outputs import Source, check_shard_size
from llm_pruner.importance import Criterion
from llm_pruner.importance.criteria import MEASURES
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.planning import (
    Cost,
    Numbering,
    Plan,
    Selection,
    Target,
    check_reachable,
    explain,
    read_plan,
)
from llm_pruner.report.data import Report
from llm_pruner.report.facts import (
    criterion_in_words,
    importance_maps,
    layers_of,
    settings_of,
    source_of,
    versions,
)
from llm_pruner.report.write import page_in, write_report
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.fast_widths import Rounding, measured_rounding
from llm_pruner.settings.common import CalibrationSettings, ModelSettings, OutputSettings
from llm_pruner.settings.limits import check_number, check_seed
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.pruner import Surgeon, reload_check
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, IntArray
from llm_pruner.version import __version__

_RUN = {"plan", "dry_run", "verify", "kept"}
"""Settings of a run that say nothing about what goes; so do those of the model and the output."""

RELOAD_LIMIT = 2_000_000_000
"""Parameters up to which a saved model is loaded beside the one in memory."""


def prune_checkpoint(
    settings: PruneSettings,
    *,
    command: str | None = None,
    reads: Sequence[Source] = (),
    estimate: Estimator | None = None,
) -> Pruned:
    """Prune a checkpoint and save the result as a folder that ``from_pretrained`` loads.

    Args:
        settings: what to do.
        command: the command line of this run, for the report.
        reads: files that were read besides, which ``out`` must not touch.
        estimate: gives the importance of the units in place of the criterion.

    Raises:
        UserError: something that was given must change; nothing is written.
        VerificationError: the pruned model is not its twin; nothing is written.
    """
    return PruneRun(settings, command=command, reads=reads, estimate=estimate).carry_out()


def target_of(settings: PruneSettings) -> Target | None:
    """Return how much is removed; None if a plan says what."""
    if settings.plan is not None:
        return None
    return Target(
        unit_ratio=settings.unit_ratio,
        ratio=settings.ratio,
        params=settings.params,
        kv_cache=settings.kv_cache,
    )


def selection_of(settings: PruneSettings) -> Selection:
    """Return where from; what is ``auto`` is not decided yet."""
    first, last, multiple = settings.protect_first, settings.protect_last, settings.round_to
    return Selection(
        structures=settings.structures,
        scope=settings.scope,
        protect_first=0 if first == "auto" else first,
        protect_last=0 if last == "auto" else last,
        layer_ranges=settings.layers or {},
        round_to=1 if multiple == "auto" else multiple,
        split=settings.split if isinstance(settings.split, dict) else None,
        spread=settings.spread,
        uniform=settings.uniform,
    )


def criterion_of(settings: PruneSettings) -> Criterion:
    """Return how importance is estimated."""
    return Criterion(settings.criterion, settings.order, settings.reduction, settings.aggregate)


class PruneRun:
    """One run: the stages in their order, and what they have made so far.

    What is there already can be handed in: a model and its groups, calibration text, importance.
    """

    def __init__(
        self,
        settings: PruneSettings,
        *,
        command: str | None = None,
        reads: Sequence[Source] = (),
        estimate: Estimator | None = None,
        loaded: LoadedModel | None = None,
        discovery: Discovery | None = None,
        text: Calibration | None = None,
    ) -> None:
        self.settings, self.command, self.reads, self.estimate = settings, command, reads, estimate
        self.given = (loaded, discovery, text)
        self.clock = Clock()
        self.done: Steps | None = None
        self.rounding: Rounding | None = None

    def carry_out(self) -> Pruned:
        """Go through all stages; a dry run ends with the plan."""
        self.check()
        self.check_files()
        self.load()
        if self.plan is None:
            self.make_plan()
        else:
            self.replay(self.plan)
        result = self.result()
        self.loaded.check_stored()
        if self.settings.dry_run:
            atomic_write_text(self.settings.out, result.plan.to_json())
            return result
        return self.save(result)

    # ----------------------------------------------------------------------------- what is asked

    def check(self) -> None:
        """Refuse what cannot be, and see what is to be done."""
        settings = self.settings
        settings.check()
        check_seed(settings.seed)
        self.plan = None if settings.plan is None else read_plan(settings.plan)
        self.target, self.selection = target_of(settings), selection_of(settings)
        self.criterion = criterion_of(settings)
        if self.plan is None and self.estimate is None:
            self.criterion.require_scores_of(settings.structures)
        self.refits = settings.compensation != "none"
        self.splits = self.plan is None and finds_split(settings, self.criterion)
        if self.target is not None:
            check_number("steps", settings.steps, 1, 1000)
        # A plan of random units that nothing judges, or a plan that is there, needs no weights.
        chance = self.criterion.name == "random" and not self.splits
        self.weightless = settings.dry_run and (self.plan is not None or chance)

    def check_files(self) -> None:
        """Refuse what files and disks can tell, since loading a model may take minutes."""
        settings = self.settings
        reads = (*settings.reads, *self.reads)
        check_out(settings.out, settings.overwrite, settings.dry_run, reads)
        check_shard_size(settings.max_shard_size)
        if self.target is not None and not settings.dry_run:
            check_space(settings.out, settings.loading(), self.target)
        if self.refits or (self.plan is None and (self.criterion.reads_text or self.splits)):
            check_calibration(settings)

    def loading(self) -> ModelSettings:
        """Return how the model is loaded: what is saved as it was stored is computed in float32."""
        settings = self.settings
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        return settings.loading(dtype=dtype)

    # ------------------------------------------------------------------------------ what is found

    def load(self) -> None:
        """Load the model and find its groups."""
        loaded, discovery, _ = self.given
        self.loaded = loaded or load(self.loading(), weights=not self.weightless)
        self.network = self.loaded.model
        self.clock.stop("load")
        self.dense_config = copy.deepcopy(self.network.config)
        self.dense_size = model_size(self.network)
        self.discovery = discovery or discover(self.network)
        self.clock.stop("discover")
        cuts = not self.settings.dry_run
        self.surgeon = Surgeon(self.network, self.settings.verify and cuts, self.clock)
        # A dry run refits too where its plan depends on it.
        self.refitter: Refitter | None = None
        if self.refits and not self.weightless:
            self.refitter = Refitter(self.loaded, self.discovery, self.surgeon)

    def replay(self, plan: Plan) -> None:
        """Remove what a plan says."""
        self.removal: dict[str, IntArray] = plan.removal(self.discovery)
        if self.settings.dry_run:
            return
        text = None
        if self.refitter is not None:
            text = read_calibration(self.loaded, self.settings, self.settings.seed, self.clock)
        self.surgeon.cut(self.discovery, self.removal)
        if self.refitter is not None and text is not None:
            self.refitter.refit(self.removal, text.input_ids)

    def make_plan(self) -> None:
        """Decide what goes, and remove it unless this is a dry run."""
        settings, target = self.settings, self.target
        assert target is not None
        selection = self._decided(self.selection)
        cost: Cost | None = None
        if target.kv_cache is not None:
            dense = Numbering.dense(self.discovery)
            cost = cache_cost(self.network, self.discovery, selection, dense)
        check_reachable(self.discovery, selection, target, cost)
        self.done = prune_in_steps(
            self.loaded,
            self.discovery,
            self.surgeon,
            settings,
            target=target,
            selection=selection,
            cost=cost,
            criterion=self.criterion,
            find_best_split=self.splits,
            refitter=self.refitter,
            estimate=self.estimate,
            text=self.given[2],
        )
        self.removal = self.done.removal
        self.plan = Plan.from_removal(
            self.discovery,
            self.removal,
            package_version=__version__,
            model_name=self.loaded.name,
            revision=self.loaded.revision,
            settings=self._planned(self.done),
            text=None if self.done.text is None else self.done.text.settings["fingerprint"],
        )

    def _planned(self, done: Steps) -> dict[str, Any]:
        """Return all settings that decide about a plan, as they were used."""
        settings, selection = self.settings, done.selection
        unread = set() if done.text is not None else set(CalibrationSettings.model_fields)
        if self.criterion.name != "taylor":
            unread |= {"order", "reduction"}
            if self.criterion.name in ("random", *MEASURES):
                unread.add("aggregate")
        decided = {
            # No folders: the same text gives the same plan wherever it lies.
            "preset": None if settings.preset is None else Path(settings.preset).name,
            "calibration": ",".join(Path(one).name for one in sources_of(settings.calibration)),
            "protect_first": selection.protect_first,
            "protect_last": selection.protect_last,
            "round_to": selection.round_to,
            "split": None if selection.split is None else dict(sorted(selection.split.items())),
            "spread": selection.spread,
        }
        run = {*ModelSettings.model_fields, *OutputSettings.model_fields, *_RUN}
        values = settings.model_dump(mode="json", exclude=run | unread) | decided
        return {
            name: values[name]
            for name in type(settings).model_fields
            if name not in run | unread and values[name] is not None
        }

    def _decided(self, selection: Selection) -> Selection:
        """Return the selection with what was left to be decided by the model and the machine."""
        settings = self.settings
        first, last = default_protection(self.discovery)
        if settings.protect_first == "auto" and not settings.uniform:
            selection = replace(selection, protect_first=first)
        if settings.protect_last == "auto" and not settings.uniform:
            selection = replace(selection, protect_last=last)
        if settings.round_to == "auto":
            self.rounding = measured_rounding(self.network, self.discovery, selection)
            selection = replace(selection, round_to=self.rounding.multiple)
            self.clock.stop("round")
        return selection

    # ------------------------------------------------------------------------------ what is made

    def result(self) -> Pruned:
        """Return what was done so far."""
        assert self.plan is not None
        rows = tuple(explain(self.discovery, self.removal))
        scores = {} if self.done is None else self.done.scores
        return Pruned(
            plan=self.plan,
            rows=rows,
            parameters=(
                count_parameters(self.discovery),
                count_parameters(self.discovery, self.removal),
            ),
            kind=None,
            path=self.settings.out,
            bytes=None,
            verified=self.surgeon.verified,
            seconds=self.clock.seconds,
            refitted=() if self.refitter is None else tuple(self.refitter.done),
            trials=() if self.done is None else tuple(self.done.trials),
            importance=importance_maps(self.discovery, scores, self.removal, rows),
            rounding=self.rounding,
        )

    def save(self, result: Pruned) -> Pruned:
        """Write the folder."""
        settings, network = self.settings, self.network
        self.refitter = None  # and with it the dense weights
        give_back()
        if settings.dtype == "auto":
            keep_type_(network, self.loaded.stored_dtype)
        reloads = settings.verify and result.parameters[0] <= RELOAD_LIMIT
        again = settings.loading(settings.out, dtype="auto")
        saved: SavedCheckpoint = save_checkpoint(
            network,
            settings.out,
            edits=self.surgeon.edits,
            plan_json=result.plan.to_json(),
            tokenizer=self.loaded.tokenizer,
            overwrite=settings.overwrite,
            max_shard_size=settings.max_shard_size,
            dense_config=self.dense_config,
            beside=partial(self._write_beside, result),
            check=reload_check(network, self.discovery, again, self.clock) if reloads else None,
        )
        self.clock.stop("save")
        return replace(
            result,
            kind=saved.kind,
            path=saved.path,
            bytes=saved.bytes,
            seconds=self.clock.seconds,
            needs=saved.needs,
            report=page_in(saved.path),
        )

    def _write_beside(
        self,
        result: Pruned,
        folder: Path,
        kind: Literal["stock", "recipe"],
        needs: tuple[str, ...],
    ) -> None:
        """Write what was asked for and the report beside the weights."""
        settings, plan, verified = self.settings, result.plan, self.surgeon.verified
        write_request(folder, settings)
        loaded = {"dtype": settings.dtype, "device": settings.device}
        report = Report(
            source=source_of(settings.model, self.loaded.name, self.loaded.revision, self.network),
            sizes={"dense": self.dense_size, "pruned": model_size(self.network)},
            layers=layers_of(result.rows),
            importance=result.importance,
            criterion=criterion_in_words(plan),
            compensation=self.settings.compensation if self.refits else None,
            trials=result.trials,
            twin_difference=None if verified is None else verified.difference,
            twin_scenes=() if verified is None else verified.scenes,
            twin_skipped=() if verified is None else verified.skipped,
            saved_as=kind,
            needs=needs,
            seconds=self.clock.seconds,
            settings=settings_of(plan, loaded),
            versions=versions(),
            command=self.command,
        )
        write_report(folder, report)


def keep_type_(network: Any, dtype: torch.dtype) -> None:
    """Turn the parameters of a model to the type in which they are saved.

    Buffers that no checkpoint holds, such as the frequencies of rotary embeddings, keep theirs.
    """
    kept = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    network.config.dtype = dtype
