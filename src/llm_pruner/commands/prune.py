"""Load, discover, estimate, plan, cut, verify, save."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Callable, Mapping, Set
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_pruner import planning
from llm_pruner.checkpoints import SavedCheckpoint, save_checkpoint
from llm_pruner.checkpoints.save import check_saved_by_shard, keep_type_, round_
from llm_pruner.commands import prune_start as start
from llm_pruner.commands.inspect import tokens_go_first
from llm_pruner.commands.publish import check_push
from llm_pruner.commands.refitting import Refitter, fitted_and_judged, text_to_refit
from llm_pruner.data.calibration import (
    FURTHER,
    Calibration,
    check_calibration,
    further_text,
    read_calibration,
)
from llm_pruner.data.selfmade import WRITERS
from llm_pruner.data.text import shares_of
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import NeedsMemory, UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.disk import placed
from llm_pruner.files.outputs import check_shard_size, write_output
from llm_pruner.importance import score
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.models.checkpoint_files import stored_size
from llm_pruner.models.forward import embedding_rows, is_on_meta, undisturbed
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel, exceeds, load
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.planning.rounding import rounded_for
from llm_pruner.report import facts
from llm_pruner.report.data import Report, SavedAs
from llm_pruner.report.records import Pruned, Training
from llm_pruner.report.write import page_in, write_report, write_request
from llm_pruner.runtime.memory import give_back, keep_all_blocks
from llm_pruner.runtime.precision import fast_matmul, mixed_precision
from llm_pruner.runtime.processes import (
    ALONE,
    Processes,
    check_trains,
    is_sharded,
    joined,
    own_device,
    sharing,
)
from llm_pruner.runtime.progress import Clock, quiet
from llm_pruner.search.cache_cost import cache_cost
from llm_pruner.search.fast_widths import Rounding, measured_rounding
from llm_pruner.search.layer_trials import Damage, allocate_by_damage, measure_layers
from llm_pruner.search.structure_split import find_split, hold_out
from llm_pruner.settings.options import option_name
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, FloatArray, IntArray, Removal, Scores, SplitTrial
from llm_pruner.version import __version__

_LOG = logging.getLogger(__name__)

RELOAD_LIMIT = 2_000_000_000
"""Parameters up to which a saved model is loaded beside the one in memory."""

KEPT_AFTER = 300.0
"""Seconds after which a plan is kept where what follows it fails."""


Estimator = Callable[[nn.Module, Discovery, Set[str], torch.Tensor | None], Scores]
"""Model, its groups, the names of those to score, tokens (samples, length) -> importance."""


class PruneRun:
    """One run: the stages in their order, and what they have made so far.

    What is there already can be handed in: a model and its groups, calibration text, importance.

    Args:
        estimate: gives the importance of the units in place of the criterion.
        scores: the first estimate, which is the dense model's, where another run made it.
        damage: what its groups do alone, likewise.

    Attributes:
        plan: what goes, in the numbering of the dense model; None until it is made.
        selection: where from, with what the run decided.
        text: what was read; None if nothing was.
        scores: of the first estimate, which are the dense model's.
        damage: what each group of the dense model does alone, if it was tried.
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
        self.rounding: Rounding | None = None
        self.tokenizer: Any = None
        self.saves = False  # what is made is not kept, but by ``carry_out``
        self.by_block = True  # whether weights that fit into memory may be read so
        self.processes, self.device = ALONE, settings.device

    def carry_out_together(self) -> Pruned | None:
        """Do the same in each of several processes that a launcher started.

        They share the text of the first estimate; the first one does all else, while the others
        wait, and returns what was done. Raises UserError also if they cannot meet.
        """
        if is_sharded():
            raise UserError(
                "prune has the whole model in each process, and FSDP was asked for; start it with "
                "torchrun, or with accelerate launch without --use_fsdp"
            )
        self.device = own_device(self.settings.device)
        self.check()
        self.check_files()
        with joined(self.device) as self.processes:
            # From here on, the folders that were looked at may change.
            self.processes.barrier()
            done = None
            if self.processes.is_first:
                done = self.carry_out()
            else:
                self._assist()
            self.processes.barrier()
        return done

    def _assist(self) -> None:
        """Take a share of the first estimate; the first process says what there is to say."""
        with quiet("llm_pruner", warned=None):
            self.load()
        if self.plan is None and not self.scores:
            self.reach()
            scored, _ = self._read_text()
            dense = planning.Numbering.dense(self.discovery)
            self._scores_of(self.discovery, dense, scored, self.processes)

    def carry_out(self) -> Pruned:
        """Go through all stages: save a folder that ``from_pretrained`` loads, or the plan alone.

        Raises UserError, or VerificationError if it is not its twin; nothing is written then.
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
            result = self.result()
            if self.saves:
                return self.save(result)
        except BaseException:
            self._keep_plan()
            raise
        assert self.plan is not None
        write_output(self.settings.out, self.plan.to_json())
        placed.append(self.settings.out)
        return result

    def _keep_plan(self) -> None:
        """Leave a plan beside the folder that did not come about, if it took long to make."""
        took = sum(self.clock.seconds.values())
        # In a run that keeps what it has (`compress`) there is no command that reads the plan.
        if not self.saves or self.settings.plan or self.settings.kept or self.plan is None:
            return
        if took < KEPT_AFTER:
            return
        with suppress(UserError, OSError):  # there is no name for it, or the disk is full
            file = self._free_name()
            write_output(file, self.plan.to_json())
            placed.append(file)
            words = shlex.join(["--plan", str(file), *self._repairing()])
            _LOG.warning("what was decided is kept; go on from it with %s", words)

    def _free_name(self) -> Path:
        """Return where a plan may be written beside the folder, as its user may have edited one."""
        settings = self.settings
        for number in ("", *range(2, 100)):
            file = Path(f"{settings.out}.plan{number}.json")
            with suppress(UserError):
                start.check_out(file, settings.overwrite, dry_run=True, reads=settings.reads)
                return file
        raise UserError(f"no plan may be written beside {settings.out}; give another --out")

    def _repairing(self) -> list[str]:
        """Return the options by which a replay of the plan refits and repairs as this run does."""
        text = ["calibration", "text_split", "text_field", "samples", "seq_len", "seed"]
        names = text * (self.refits or self.repairs)
        names += ["compensation", "refit_text"] * self.refits + ["repair_minutes"] * self.repairs
        asked = self.settings
        if self.text is not None:
            asked = asked.but(samples=len(self.text.input_ids))  # a preset takes fewer, too
        values = ((option_name(name), getattr(asked, name)) for name in names)
        return [str(word) for pair in values if pair[1] is not None for word in pair]

    # ----------------------------------------------------------------------------- what is asked

    def check(self) -> None:
        """Refuse what cannot be, and see what is to be done."""
        settings = self.settings
        settings.check()
        self.refits = settings.compensation != "none"
        # Neither what a model writes nor the text of earlier steps is made longer for a refit.
        written = WRITERS.keys() >= shares_of(settings.calibration).keys()
        times = 1.0 if written or settings.steps > 1 else settings.refit_text
        if self.refits and not settings.dry_run and round(times * settings.samples) < 2:
            raise UserError(
                f"--samples {settings.samples} leaves none to judge a refit by; use 2 or more, or "
                "--compensation none"
            )
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
        # A plan of random units that nothing judges, or a plan that is there, needs no weights.
        chance = self.criterion.name == "random" and not (self.splits or self.tries_layers)
        self.weightless = settings.dry_run and (self.plan is not None or chance)

    @property
    def reads_text(self) -> bool:
        """Whether a plan is made, or its cut repaired, by what the model does with text."""
        return self.scores_text or self.splits or self.tries_layers or self.refits

    @property
    def scores_text(self) -> bool:
        """Whether importance is, or was, estimated on text, but for tokens that nobody names."""
        return self.criterion.reads_text and (self.estimate is None or self.given[2] is not None)

    def check_files(self) -> None:
        """Refuse what files and disks can tell, since loading a model may take minutes."""
        settings = self.settings
        start.check_out(settings.out, settings.overwrite, settings.dry_run, settings.reads)
        check_shard_size(settings.max_shard_size)
        check_push(settings, dry_run=settings.dry_run)
        if self.target is not None and not settings.dry_run:
            start.check_space(settings.out, settings.loading(), self.target)
        if self.refits or self.repairs or (self.plan is None and self.reads_text):
            self.tokenizer = check_calibration(settings, settings.loading().but(device=self.device))

    # ------------------------------------------------------------------------------ what is found

    def load(self) -> None:
        """Load the model and find its groups."""
        keep_all_blocks()
        loaded, discovery, _ = self.given
        self.room = self.settings.room(self.device)
        if isinstance(self.settings.memory, str):
            self.room //= sharing(self.device)
        self.resident = self.room if loaded else self.stays(self.room)
        loading = self.settings.computing().but(device=self.device)
        self.loaded = loaded or load(
            loading,
            weights=not self.weightless,
            memory=self.room,
            resident=self.resident,
            tokenizer=self.tokenizer,
        )
        self.network = self.loaded.model
        if not self.settings.dry_run:
            check_saved_by_shard(self.network)
        self.clock.stop("load")
        self.dense_config = copy.deepcopy(self.network.config)
        own = self.settings.dtype != "auto"
        self.saved = self.network.dtype if own else self.loaded.stored_dtype
        self.dense_size = model_size(self.network, None if own else self.saved)
        if loaded is None and self.processes.is_first:
            self._say_if_tokens_go_first()
        self.discovery = discovery or discover(self.network)
        self.narrow()
        self.clock.stop("discover")
        cuts = not self.settings.dry_run
        self.surgeon = Surgeon(self.network, self.settings.verify and cuts, self.clock)
        # A dry run refits too where its plan depends on it.
        self.refitter: Refitter | None = None
        if self.refits and not self.weightless:
            self._begin_refit()
        self._begin_repair()

    def stays(self, room: int) -> int:
        """Return the bytes of weights, of ``room``, up to which they stay in memory.

        They may be read block by block though they fit, but where that takes longer or is no way
        to read them. A repair trains what is in memory.
        """
        settings = self.settings
        size = stored_size(settings.model, settings.revision, "auto")
        alone = self.by_block and not self.repairs and self.processes.count == 1
        if not alone or self.tries_layers:
            return room
        if self.reads_text and start.writes_slowly(settings, size, self.device):
            return room
        held = not self.refits or start.holds_new_weights(settings, size)
        if not held or (size is not None and size[0] is None):
            return room
        return settings.resident(room, self.device)

    def narrow(self) -> None:
        """Leave out structures that nobody named and that cannot go."""
        given = self.settings.given
        if "structures" not in given:
            self.selection = start.of_what_can_go(self.selection, self.discovery)
        if "split" not in given and len(self.selection.structures) == 1:
            self.splits = False

    def _begin_refit(self) -> None:
        """Keep the dense weights, which a refit needs; without a chain none is made unasked."""
        some = torch.arange(8, device=next(self.network.parameters()).device)[None]
        try:
            with undisturbed(self.network), torch.enable_grad():
                find_chain(self.network, some % embedding_rows(self.network), {}, carries=True)
        except NotBlockwise as reason:
            if "compensation" in self.settings.given:
                raise UserError(
                    f"--compensation {self.settings.compensation} refits block by block, and "
                    f"{reason}; use --compensation none"
                ) from reason
            _LOG.warning("no refit, which goes block by block: %s", reason)
            self.refits = False
        else:
            self.refitter = Refitter(self.loaded, self.discovery, self.surgeon, self.saved)
        self.clock.stop("discover")

    def _say_if_tokens_go_first(self) -> None:
        tokens, size = embedding_rows(self.network), self.dense_size
        if tokens_go_first(tokens, size.embedding or 0, size.total):
            _LOG.warning(
                "embeddings of %s tokens are %.0f%% of the model: where your texts do not need all "
                "of them, llm-pruner vocab takes some out first, or compress --vocab-text",
                f"{tokens:,}",
                100 * (size.embedding or 0) / size.total,
            )

    def _begin_repair(self) -> None:
        """Keep the dense weights, which the repair learns from."""
        if self.repairs and is_model_streamed(self.network):
            if "repair_minutes" in self.settings.given:
                raise UserError(
                    f"--repair-minutes {self.settings.repair_minutes:g} trains weights that are "
                    "held in memory, and those of this model are read block by block; leave it "
                    "out, or give more --memory, or train the result with recover"
                )
            _LOG.warning(
                "no repair, which trains weights that are held in memory: those of this model are "
                "read block by block"
            )
            self.repairs = False
        self.dense = sharing_copy(self.network) if self.repairs else None
        self.training: Training | None = None

    def replay(self, plan: planning.Plan) -> None:
        """Remove what a plan says."""
        self.removal: dict[str, IntArray] = plan.removal(self.discovery)
        if self.settings.dry_run:
            return
        if self.refitter is not None:
            self.text = read_calibration(self.loaded, self.settings, self.settings.seed, self.clock)
        self._check_space()
        self._cut(self.discovery, self.removal, self.removal)

    def _check_space(self, known: HiddenStates | None = None) -> None:
        """Raise UserError if the disk is too full for weights, of which ``known`` makes room."""
        if not self.saves:
            return
        before, after = (count_parameters(self.discovery, one) for one in (None, self.removal))
        share, fitted = after / before, 0
        if self.refitter is not None:
            fitted = int(share * self.refitter.bytes_on_disk(self.removal))
        freed = 0 if known is None else known.bytes_on_disk()
        loading = self.settings.loading()
        start.check_space(self.settings.out, loading, share=share, beside=fitted, freed=freed)

    def reach(self) -> planning.Cost | None:
        """Decide what was left to the model, and refuse a target that no importance can reach.

        Returns what the target counts; None for parameters.
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

    def make_plan(self, known: HiddenStates | None = None) -> None:
        """Decide what goes, round by round, and remove it; the last round not in a dry run.

        Args:
            known: what the first estimate sees of the dense model, for trials, refits and later
                runs of the same text; one of this run alone by default.
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
                # In later rounds the others do not have what is left of the model.
                processes = ALONE if number else self.processes
                keep = known if number == 0 and self.refitter is not None else None
                scores = self._scores_of(discovery, numbering, scored, processes, keep)
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
        self.plan = self._planned()
        if not settings.dry_run:
            self._check_space(known)
            self._cut(discovery, removal, self.removal, known, last=True)

    def _planned(self) -> planning.Plan:
        """Return what is removed as a plan that says how it came about."""
        return planning.Plan.from_removal(
            self.discovery,
            self.removal,
            package_version=__version__,
            model_name=self.loaded.name,
            revision=self.loaded.revision,
            settings=start.planned(
                self.settings,
                self.selection,
                self.criterion,
                samples=None if self.text is None else len(self.text.input_ids),
                refits=self.refits,
            ),
            text=None if self.text is None else self.text.settings["fingerprint"],
        )

    def _allocate(
        self,
        discovery: Discovery,
        scores: Scores,
        target: planning.Target,
        numbering: planning.Numbering,
        cost: planning.Cost | None,
        held_out: torch.Tensor | None,
    ) -> Removal:
        """Return what goes in a round: by the scores, with trials of layers if there is text."""
        asked = discovery, scores, self.selection
        if held_out is None:
            return planning.allocate(*asked, target, numbering, cost=cost)
        with mixed_precision(self.network):
            known = self.damage if discovery is self.discovery else {}
            damage = measure_layers(self.network, *asked, numbering, held_out, known)
            if discovery is self.discovery:  # what the dense model's do, for all targets
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
        read = None
        if self.processes.is_first:
            self.text = self.given[2] or read_calibration(
                self.loaded, self.settings, self.settings.seed, self.clock
            )
            read = self.text.input_ids
        tokens = self.processes.of_first(read)
        if not trials:
            return tokens, None
        held_out, scored = hold_out(tokens)
        return scored, held_out

    def _scores_of(
        self,
        discovery: Discovery,
        numbering: planning.Numbering,
        tokens: torch.Tensor | None,
        processes: Processes = ALONE,
        keep: HiddenStates | None = None,
    ) -> Scores:
        """Return the importance in all groups that may lose units and those that go with them."""
        names = planning.scored_groups(discovery, self.selection, numbering)
        seen = None if tokens is None else tokens[: self.settings.score_samples]
        if self.estimate is not None:
            scores = self.estimate(self.network, discovery, names, seen)
        else:
            seed = self.settings.seed
            with fast_matmul(self.network):
                scores = score(
                    self.network,
                    discovery,
                    self.criterion,
                    input_ids=seen,
                    seed=seed,
                    groups=names,
                    processes=processes,
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
        """Remove units of the model as it is, and refit after all that is gone of the dense one.

        Args:
            last: whether no further round starts from what comes out; only then is further text
                read.
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
        """Train the pruned model by what the dense one says, for as long as was asked."""
        if self.dense is None:
            return
        from llm_pruner.recovery import repair_  # what trains takes a second to import

        settings, seed = self.settings, self.settings.seed
        writer = replace(self.loaded, model=self.dense)
        self.text = (
            self.text or self.given[2] or read_calibration(writer, settings, seed, self.clock)
        )
        held_out, fitted = hold_out(self.text.input_ids)
        apart = [*held_out, *self.text.unseen]
        text = further_text(self.loaded, settings, fitted, torch.stack(apart), FURTHER, seed)
        dense, self.dense = self.dense, None
        try:
            done = repair_(
                self.network,
                dense,
                text,
                held_out,
                minutes=settings.repair_minutes,
                seed=seed,
                as_saved_=partial(round_, dtype=self.saved),
            )
        except (UserError, torch.OutOfMemoryError) as reason:
            # The model as the refit left it is what there is then.
            full = isinstance(reason, torch.OutOfMemoryError)
            _LOG.warning("no repair: %s", "the GPU has no room" if full else reason)
            self.clock.stop("repair")
            return
        del dense
        self.training = Training(
            before=done.before.loss,
            after=done.after.loss,
            gained=done.gained,
            steps=done.steps,
            best_step=done.run.evaluations[done.run.best].step,
            stopped=done.run.stopped,
            tokens=done.run.tokens,
            seconds=done.run.seconds,
        )
        self.clock.stop("repair")

    def _decide(self) -> None:
        """Complete the selection with what was left to the model and the machine."""
        settings = self.settings
        first, last = start.default_protection(self.discovery)
        if settings.protect_first == "auto" and not settings.uniform:
            self.selection = replace(self.selection, protect_first=first)
        if settings.protect_last == "auto" and not settings.uniform:
            self.selection = replace(self.selection, protect_last=last)
        if settings.round_to == "auto":
            if self.rounding is None:
                self.rounding = measured_rounding(
                    self.network, self.discovery, self.selection, self.saved
                )
                self.clock.stop("round")
            self.selection = replace(self.selection, round_to=self.rounding.multiple)
        elif isinstance(settings.round_to, str):
            self.selection = rounded_for(settings.round_to, self.discovery, self.selection)
        self.narrow()

    # ------------------------------------------------------------------------------ what is made

    def result(self) -> Pruned:
        """Return what was done so far."""
        assert self.plan is not None
        before = count_parameters(self.discovery)
        after = count_parameters(self.discovery, self.removal)
        verified, round_to = self.surgeon.verified, self.plan.settings.get("round_to")
        if self.settings.plan is None:
            round_to = self.selection.round_to
        return Pruned(
            model=self.plan.model.name,
            parameters_before=before,
            parameters_after=after,
            ratio=1 - after / before,
            layers=tuple(planning.explain(self.discovery, self.removal)),
            twin_difference=None if verified is None else verified.difference,
            twin_scenes=() if verified is None else verified.scenes,
            twin_skipped=() if verified is None else verified.skipped,
            round_to=round_to if isinstance(round_to, int) else None,
            rounding=self.rounding,
            refitted=() if self.refitter is None else tuple(self.refitter.done),
            repair=self.training,
            trials=tuple(self.trials),
            seconds=self.clock.seconds,
            path=self.settings.out,
        )

    def save(self, result: Pruned) -> Pruned:
        """Write the folder."""
        settings, network, plan = self.settings, self.network, self.plan
        assert plan is not None
        self.refitter = None  # and with it the dense weights
        give_back()
        if settings.dtype == "auto":
            keep_type_(network, self.saved)
        reloads = settings.verify and result.parameters_before <= RELOAD_LIMIT
        again = settings.loading(settings.out, dtype="auto").but(device=self.device)
        saved: SavedCheckpoint = save_checkpoint(
            network,
            settings.out,
            edits=self.surgeon.edits,
            plan_json=plan.to_json(),
            tokenizer=self.loaded.tokenizer,
            processor=self.loaded.processor,
            overwrite=settings.overwrite,
            max_shard_size=settings.max_shard_size,
            dense_config=self.dense_config,
            beside=partial(self._write_beside, result),
            check=self.surgeon.reload_check(self.discovery, again, self.room) if reloads else None,
        )
        self.clock.stop("save")
        return replace(
            result,
            path=saved.path,
            saved_as=saved.kind,
            needs=saved.needs,
            bytes=saved.bytes,
            report=page_in(saved.path),
        )

    def _write_beside(
        self, result: Pruned, folder: Path, kind: SavedAs, needs: tuple[str, ...]
    ) -> None:
        """Write what was asked for and the report beside the weights."""
        write_request(folder, self.settings)
        done = replace(result, saved_as=kind, needs=needs)
        write_report(folder, partial(self._report, done))

    def _after(self) -> dict[str, Any]:
        """Return what decided about what was done after the cut, by the names of the options."""
        settings, replayed = self.settings, self.settings.plan is not None
        found: dict[str, Any] = {}
        if replayed:
            found["compensation"] = settings.compensation if self.refits else "none"
        if replayed and self.text is not None:
            names = ("text_split", "text_field", "samples", "seq_len", "seed")
            read = {name: self.text.settings[name] for name in names}
            found |= {name: of for name, of in read.items() if of is not None}
            found["calibration"] = start.without_folders(settings.calibration)
        if self.refits:
            found["refit_text"] = settings.refit_text
        if self.repairs:
            found["repair_minutes"] = settings.repair_minutes
        return found

    def _report(self, done: Pruned) -> Report:
        settings, loaded, plan = self.settings, self.loaded, self.plan
        assert plan is not None
        # What a report has of the run, it has by the same names.
        shared = {name: of for name, of in vars(done).items() if name in Report.model_fields}
        return Report(
            **shared | {"layers": facts.layers_of(done.layers), "repair": facts.repair_of(done)},
            source=facts.source_of(
                settings.model, loaded.name, loaded.revision, self.network, loaded.fingerprint
            ),
            sizes={"dense": self.dense_size, "pruned": model_size(self.network)},
            importance=facts.importance_maps(self.discovery, self.scores, self.removal),
            criterion=facts.criterion_in_words(plan),
            compensation=settings.compensation
            if any(one.changed for one in done.refitted)
            else None,
            settings=facts.settings_of(
                plan,
                {"dtype": settings.dtype, "device": settings.device},
                self._after(),
                plan.text if self.text is None else self.text.settings["fingerprint"],
            ),
            versions=facts.versions(),
            command=self.command,
        )
