"""Load, discover, estimate, plan, cut, verify, refit, repair, save."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Set
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from llm_pruner import planning
from llm_pruner.checkpoints.save import check_saved_by_shard
from llm_pruner.commands import prune_start as start
from llm_pruner.commands.prune_result import result_of, save
from llm_pruner.commands.refitting import (
    Refitter,
    fitted_and_judged,
    repaired,
    text_to_refit,
    why_no_chain,
)
from llm_pruner.data.calibration import Calibration, check_calibration, read_calibration
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import NeedsMemory, UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.disk import placed
from llm_pruner.files.outputs import check_file, check_output, write_output
from llm_pruner.importance import score
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.checkpoint_files import stored_size
from llm_pruner.models.forward import is_on_meta
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel, exceeds, load
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.planning.rounding import rounded_for
from llm_pruner.report.records import Pruned, Training
from llm_pruner.runtime.memory import keep_all_blocks
from llm_pruner.runtime.precision import fast_matmul, mixed_precision
from llm_pruner.runtime.processes import check_trains
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.layer_trials import Damage, allocate_by_damage, measure_layers
from llm_pruner.search.structure_split import find_split, hold_out
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.types import Discovery, FloatArray, IntArray, Removal, Scores, SplitTrial
from llm_pruner.version import __version__

_LOG = logging.getLogger(__name__)

KEPT_AFTER = 300.0
"""Seconds after which a plan is kept if a later stage fails."""


Estimator = Callable[[nn.Module, Discovery, Set[str], torch.Tensor | None], Scores]
"""Model, its groups, names of those to score, tokens (samples, length) -> importance."""


class PruneRun:
    """One run: the stages in their order, and what they have made so far.

    Args:
        estimate: estimates importance in place of the criterion.
        loaded, discovery, text: model, groups and calibration text, if they are there already.
        scores, damage: of the dense model, if another run made them.

    Attributes:
        plan: what is removed, in the numbering of the dense model; None until it is made.
        selection: where from, with what the run decided.
        text: the calibration text; None if none was read.
        scores: importance in the dense model.
        damage: of each group of the dense model alone, if it was tried.
        trials: splits of the budget that were tried.
    """

    def __init__(
        self,
        settings: PruneSettings,
        *,
        command: str | None = None,
        estimate: Estimator | None = None,
        loaded: LoadedModel | None = None,
        discovery: Discovery | None = None,
        text: Calibration | None = None,
        scores: Scores | None = None,
        damage: Mapping[str, Damage] | None = None,
    ) -> None:
        self.settings, self.command, self.estimate = settings, command, estimate
        self.given = (loaded, discovery, text)
        self.clock = Clock()
        self.text: Calibration | None = None
        self.scores: dict[str, FloatArray] = dict(scores or {})
        self.damage = damage or {}
        self.trials: list[SplitTrial] = []
        self.training: Training | None = None
        self.saves = False  # set by `carry_out`
        self.by_block = True  # whether weights that fit into memory may be streamed
        self.device = settings.device

    def carry_out(self) -> Pruned:
        """Go through all stages: save a folder that ``from_pretrained`` loads, or the plan alone.

        Raises UserError, or VerificationError if the result differs from its masked twin; nothing
        is written then.
        """
        try:
            return self._carry_out()
        except NeedsMemory as reason:
            if self.resident == self.room or exceeds(self.settings.computing(), self.room):
                raise
            _LOG.warning("all weights are read into memory: %s", reason.why)
        again = PruneRun(self.settings, command=self.command, text=self.text)
        again.by_block = False
        return again.carry_out()

    def _carry_out(self) -> Pruned:
        self.check()
        self.check_files()
        self.load()
        self.saves = not self.settings.dry_run
        try:
            if self.plan is None:
                self.make_plan()
            else:
                self.replay(self.plan)
            self.repair()
            if self.saves:
                return save(self)
        except BaseException:
            self._keep_plan()
            raise
        assert self.plan is not None
        write_output(self.settings.out, self.plan.to_json())
        placed.append(self.settings.out)
        return result_of(self)

    def _keep_plan(self) -> None:
        """Leave the plan beside the folder that was not made, if it took long to make."""
        asked, took = self.settings, sum(self.clock.seconds.values())
        if self.plan is None or asked.plan or asked.kept or not self.saves or took < KEPT_AFTER:
            return
        file = Path(f"{asked.out}.plan.json")
        with suppress(OSError):
            write_output(file, self.plan.to_json())
            placed.append(file)
            _LOG.warning("the plan is kept; go on from it with --plan %s", file)

    # ----------------------------------------------------------------------------- what is asked

    def check(self) -> None:
        """Decide what is to be done; refuse what the settings rule out."""
        settings = self.settings
        settings.check()
        self.refits = settings.compensation != "none"
        self.plan = None if settings.plan is None else planning.read_plan(settings.plan)
        self.target, self.selection = start.target_of(settings), start.selection_of(settings)
        self.criterion = start.criterion_of(settings)
        if self.plan is None and self.estimate is None:
            self.criterion.require_scores_of(settings.structures)
        self.repairs = settings.repair_minutes > 0 and not settings.dry_run
        if self.repairs:
            check_trains(settings.device)
        self.splits = self.plan is None and start.finds_split(settings, self.criterion)
        self.tries_layers = self.plan is None and start.tries_layers(settings, self.criterion)
        chance = self.criterion.name == "random" and not (self.splits or self.tries_layers)
        self.weightless = settings.dry_run and (self.plan is not None or chance)

    @property
    def reads_text(self) -> bool:
        """Whether a plan is made, or its cut repaired, by what the model does with text."""
        return self.scores_text or self.splits or self.tries_layers or self.refits

    @property
    def scores_text(self) -> bool:
        """Whether importance is, or was, estimated on text."""
        return self.criterion.reads_text and (self.estimate is None or self.given[2] is not None)

    def check_files(self) -> None:
        """Check files, disk and text, since loading a model may take minutes."""
        settings = self.settings
        if settings.dry_run:
            check_file("--out", settings.out, "plan", settings.reads, overwrite=settings.overwrite)
        else:
            check_output(settings.out, settings.overwrite, settings.reads)
        if self.target is not None and not settings.dry_run:
            start.check_space(settings.out, settings.loading(), self.target)
        if self.refits or self.repairs or (self.plan is None and self.reads_text):
            check_calibration(settings)

    # ------------------------------------------------------------------------------ what is found

    def load(self) -> None:
        """Load the model and find its groups."""
        keep_all_blocks()
        settings, (loaded, discovery, _) = self.settings, self.given
        self.room = settings.room(self.device)
        self.resident = self.room if loaded else self.stays(self.room)
        loading = settings.computing().but(device=self.device)
        self.loaded = loaded or load(
            loading, weights=not self.weightless, memory=self.room, resident=self.resident
        )
        self.network = self.loaded.model
        if not settings.dry_run:
            check_saved_by_shard(self.network)
        self.clock.stop("load")
        self.dense_config = copy.deepcopy(self.network.config)
        own = settings.dtype != "auto"
        self.saved = self.network.dtype if own else self.loaded.stored_dtype
        self.dense_size = model_size(self.network, None if own else self.saved)
        self.discovery = discovery or discover(self.network)
        self.narrow()
        self.clock.stop("discover")
        self.surgeon = Surgeon(self.network, settings.verify and not settings.dry_run, self.clock)
        # A dry run refits too where its plan depends on it.
        self.refitter: Refitter | None = None
        if self.refits and not self.weightless:
            self._begin_refit()
        if self.repairs and is_model_streamed(self.network):
            _LOG.warning(
                "no repair, which trains weights that are held in memory: those of this model are "
                "read block by block; give more --memory, or train the result with recover"
            )
            self.repairs = False
        self.dense = sharing_copy(self.network) if self.repairs else None  # the teacher

    def stays(self, room: int) -> int:
        """Return the bytes of weights, of ``room``, up to which they stay in memory.

        Weights that fit are streamed by choice, unless that takes longer or is impossible.
        """
        settings = self.settings
        size = stored_size(settings.model, settings.revision, "auto")
        alone = self.by_block and not self.repairs
        if not alone or self.tries_layers:
            return room
        if self.reads_text and start.writes_slowly(settings, size, self.device):
            return room
        held = not self.refits or start.holds_new_weights(size)
        if not held or (size is not None and size[0] is None):
            return room
        return settings.resident(room, self.device)

    def narrow(self) -> None:
        """Leave out structures that nobody named and that cannot be removed."""
        given = self.settings.given
        if "structures" not in given:
            self.selection = start.of_what_can_go(self.selection, self.discovery)
        if "split" not in given and len(self.selection.structures) == 1:
            self.splits = False

    def _begin_refit(self) -> None:
        """Keep the dense weights for a refit; without a chain of blocks there is none."""
        reason = why_no_chain(self.network)
        if reason is None:
            self.refitter = Refitter(self.loaded, self.discovery, self.surgeon, self.saved)
        else:
            _LOG.warning("no refit, which goes block by block: %s", reason)
            self.refits = False
        self.clock.stop("discover")

    # ---------------------------------------------------------------------------- what is removed

    def replay(self, plan: planning.Plan) -> None:
        """Remove what a plan says."""
        self.removal: dict[str, IntArray] = plan.removal(self.discovery)
        if self.settings.dry_run:
            return
        if self.refitter is not None:
            self.text = read_calibration(self.loaded, self.settings, self.settings.seed, self.clock)
        self._cut(self.discovery, self.removal, self.removal)

    def reach(self) -> planning.Cost | None:
        """Decide what was left to the model; refuse a target that no importance can reach.

        Returns the cost that the target counts; None for parameters.
        """
        assert self.target is not None
        self._decide()
        cost = None
        if self.target.kv_cache is not None:
            dense = planning.Numbering.dense(self.discovery)
            cost = cache_cost(self.network, self.discovery, self.selection, dense)
        if self.settings.split == "equal" and self.target.unit_ratio is None:
            asked = self.discovery, self.selection, self.target, cost
            self.selection = planning.with_equal_split(*asked)
        planning.check_reachable(self.discovery, self.selection, self.target, cost)
        return cost

    def _decide(self) -> None:
        """Complete the selection with what was left to the model and the machine."""
        settings = self.settings
        first, last = start.default_protection(self.discovery)
        if settings.protect_first == "auto" and not settings.uniform:
            self.selection = replace(self.selection, protect_first=first)
        if settings.protect_last == "auto" and not settings.uniform:
            self.selection = replace(self.selection, protect_last=last)
        if isinstance(settings.round_to, str):
            self.selection = rounded_for(settings.round_to, self.discovery, self.selection)
        self.narrow()

    def make_plan(self, known: HiddenStates | None = None) -> None:
        """Decide round by round what is removed, and remove it; in a dry run not the last round.

        Args:
            known: keeps the dense model's hidden states of the first estimate, for trials, refits
                and later runs on the same text; by default for this run alone.
        """
        if known is None:
            with closing(HiddenStates()) as known:
                self.make_plan(known)
            return
        settings, clock, target, cost = self.settings, self.clock, self.target, self.reach()
        assert target is not None
        discovery, numbering = self.discovery, planning.Numbering.dense(self.discovery)
        scored, held_out = self._read_text()
        targets = planning.step_targets(numbering.parameters, target, settings.steps)
        for number, step in enumerate(targets):
            scores: Scores = self.scores
            if number or not scores:
                keep = known if number == 0 and self.refitter is not None else None
                scores = self._scores_of(discovery, numbering, scored, keep)
            self.scores = self.scores or dict(scores)
            if self.splits and held_out is not None and number == 0:
                with mixed_precision(self.network):
                    self.selection, self.trials = find_split(
                        self.network,
                        discovery,
                        scores,
                        self.selection,
                        target,  # of the last round, since the split is that of all
                        numbering,
                        held_out,
                        refit_on=None if self.refitter is None else scored,
                        known=known,
                    )
                clock.stop("trials")
            if cost is not None and number > 0:
                cost = cache_cost(self.network, discovery, self.selection, numbering, cost.dense)
            tried = held_out if self.tries_layers else None
            removal = self._allocate(discovery, scores, step, numbering, cost, tried)
            numbering = numbering.after(removal)
            clock.stop("plan")
            if number + 1 < len(targets):
                self._cut(discovery, removal, numbering.removal(), known, last=False)
                discovery = numbering.matched(discover(self.network))
                clock.stop("discover")
        self.removal = numbering.removal()
        self.plan = planning.Plan.from_removal(
            self.discovery,
            self.removal,
            package_version=__version__,
            model_name=self.loaded.name,
            revision=self.loaded.revision,
            settings=start.planned(
                settings,
                self.selection,
                self.criterion,
                samples=None if self.text is None else len(self.text.input_ids),
                refits=self.refits,
            ),
            text=None if self.text is None else self.text.settings["fingerprint"],
        )
        if not settings.dry_run:
            self._cut(discovery, removal, self.removal, known, last=True)

    def _allocate(
        self,
        discovery: Discovery,
        scores: Scores,
        target: planning.Target,
        numbering: planning.Numbering,
        cost: planning.Cost | None,
        held_out: torch.Tensor | None,
    ) -> Removal:
        """Return what is removed in a round; by layer trials if there is text for them."""
        asked = discovery, scores, self.selection
        if held_out is None:
            return planning.allocate(*asked, target, numbering, cost=cost)
        with mixed_precision(self.network):
            known = self.damage if discovery is self.discovery else {}
            damage = measure_layers(self.network, *asked, numbering, held_out, known)
            if discovery is self.discovery:
                self.damage = damage
            removal = allocate_by_damage(
                self.network, *asked, target, numbering, cost, damage, held_out
            )
        self.clock.stop("layer trials")
        return removal

    def _read_text(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the tokens to score on, and those to judge trials by; None where none are read."""
        if self.criterion.name != "random" and is_on_meta(self.network):
            raise UserError("the model has no weights here; only --criterion random works without")
        trials = self.splits or self.tries_layers
        if not (self.scores_text or self.refitter is not None or trials):
            return None, None
        self.text = self.given[2] or read_calibration(
            self.loaded, self.settings, self.settings.seed, self.clock
        )
        tokens = self.text.input_ids
        if not trials:
            return tokens, None
        held_out, scored = hold_out(tokens)
        return scored, held_out

    def _scores_of(
        self,
        discovery: Discovery,
        numbering: planning.Numbering,
        tokens: torch.Tensor | None,
        keep: HiddenStates | None = None,
    ) -> Scores:
        """Return the importance in all groups that are ranked."""
        names = planning.scored_groups(discovery, self.selection, numbering)
        seen = None if tokens is None else tokens[: self.settings.score_samples]
        if self.estimate is not None:
            scores = self.estimate(self.network, discovery, names, seen)
        else:
            with fast_matmul(self.network):
                scores = score(
                    self.network,
                    discovery,
                    self.criterion,
                    input_ids=seen,
                    seed=self.settings.seed,
                    groups=names,
                    keep=keep,
                )
        self.clock.stop("estimate")
        return scores

    def _cut(
        self,
        discovery: Discovery,
        removal: Removal,
        all_gone: Removal,
        known: HiddenStates | None = None,
        *,
        last: bool = True,
    ) -> None:
        """Remove units of the model as it is, and refit.

        Args:
            all_gone: what is removed of the dense model after that.
            last: whether this is the last round; only then further text is read for the refit.
        """
        self.surgeon.cut(discovery, removal)
        if self.refitter is None or self.text is None:
            return
        if last:
            fitted, judged = text_to_refit(self.loaded, self.settings, self.text)
        else:
            fitted, judged = fitted_and_judged(self.text.input_ids)
        self.refitter.refit(all_gone, fitted, judged, known)

    def repair(self) -> None:
        """Train the pruned model on the dense one's predictions, for as long as was asked."""
        if self.dense is None:
            return
        settings, dense = self.settings, self.dense
        writer = replace(self.loaded, model=dense)
        self.text = (
            self.text
            or self.given[2]
            or read_calibration(writer, settings, settings.seed, self.clock)
        )
        self.dense = None
        self.training = repaired(self.loaded, dense, settings, self.text, self.saved)
        self.clock.stop("repair")
