"""Load a model and text, train, and save the model only if it became better."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.save import keep_type_, round_
from llm_pruner.commands import workdir
from llm_pruner.commands.evaluate import read_texts
from llm_pruner.commands.prune_start import check_space
from llm_pruner.commands.recover_start import (
    check_run,
    computing,
    facts_of,
    load_teacher,
    make_samples,
    read_examples,
    ways_to_load,
)
from llm_pruner.data.examples import Examples
from llm_pruner.data.sequences import TrainingSequence, added_tokens
from llm_pruner.data.text import EvaluationText
from llm_pruner.data.training import (
    held_out_windows,
)
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import (
    PerplexityResult,
    check_windows,
    perplexity,
    perplexity_of_windows,
)
from llm_pruner.files.disk import remove, short_digest
from llm_pruner.files.outputs import (
    RECOVERY_FILE,
    write_output,
)
from llm_pruner.models.checkpoint_files import records_of
from llm_pruner.models.forward import check_length
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.recovery import Outcome, Progress, Teacher, recover_
from llm_pruner.recovery.callbacks import EndAt
from llm_pruner.report.data import SavedAs, known_report
from llm_pruner.report.facts import recovery_report, source_of
from llm_pruner.report.records import (
    Change,
    Control,
    ControlText,
    Recovered,
    SourceResult,
    StepLoss,
)
from llm_pruner.report.write import page_in, write_report, write_request
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.precision import multiplies_bfloat16
from llm_pruner.runtime.processes import (
    Processes,
    check_trains,
    is_sharded,
    joined,
    own_device,
)
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.types import Edits
from llm_pruner.version import __version__

_LOG = logging.getLogger(__name__)

_OF_SAMPLES = {"samples", "self_samples", "held_out", "split", "text_field"}
"""Options that decide which samples there are, of which nothing else in a run's facts tells."""


def recover_checkpoint(
    settings: RecoverSettings,
    *,
    command: str | None = None,
    say: Callable[[Progress], None] = lambda _: None,
) -> Recovered:
    """Train a checkpoint and save the result as a folder that loads as the input does.

    While it runs, checkpoints lie in a folder beside ``out`` with the ending ``.recovering``, which
    goes away at the end.

    Of several processes that a launcher started, each calls this with the same arguments. The first
    one writes, and the others return the same without perplexities and what the folder is like.

    Raises:
        UserError: something that was given must change; ``out`` is as it was.
    """
    device = own_device(settings.device)
    check_trains(settings.device)
    bf16 = settings.bf16
    if bf16 is None:
        where = "cuda" if is_sharded() else device
        bf16 = settings.dtype in ("float32", "auto") and multiplies_bfloat16(where)
    here = settings.but(device=device).with_trainer(bf16=bf16)
    work = workdir.RECOVERING.beside(settings.out)
    check_run(here, work)
    with joined(device) as processes:
        processes.barrier()  # from here on, the folders that were looked at may change
        with workdir.begun(work) if processes.is_first else nullcontext():
            return _Run(here, settings, command, processes, say).carry_out()


@dataclass
class _Run:
    """One run, in one process: what it was asked for, and what it has loaded and read.

    Attributes:
        settings: as they hold on this machine.
        asked: as they were given.
        loading: how the model is loaded that is trained.
        made: folder with what says how it was pruned.
        dense: the teacher; None without one.
        controlling: how the dense model is loaded that is trained, too; None if none is.
        facts: all that decides how the run goes.
    """

    settings: RecoverSettings
    asked: RecoverSettings
    command: str | None
    processes: Processes
    say: Callable[[Progress], None]
    loaded: LoadedModel = field(init=False)

    def __post_init__(self) -> None:
        self.work = workdir.RECOVERING.beside(self.settings.out)
        # Where the adapter waits for the model to be saved.
        self.adapter = self.work / "adapter" if self.settings.keep_adapter else None
        self.measuring = PerplexitySettings(seq_len=self.settings.perplexity_seq_len)

    def carry_out(self) -> Recovered:
        settings, first = self.settings, self.processes.is_first
        with self.processes.first():
            check_space(settings.out, settings.loading())
            self.corpora = read_texts(settings.perplexity, self.measuring)
            examples = read_examples(settings)
        dense = self._load(examples)
        before = self._measure(self.loaded, dense)
        del dense  # no other model is in memory while one trains, but for a teacher
        network, outcome = self._train(self.loaded.model, self.loading, settings, self.work)
        self.loaded = replace(self.loaded, model=network)
        after = before
        if outcome.gained:
            dense = None if self.controlling is None else self._reference(self.controlling)
            after = self._measure(self.loaded, dense)
            del dense
        elif first:
            # As it came, to the last bit; in place of what was trained, which may fill a GPU.
            self.loaded = replace(self.loaded, model=None)
            del network
            give_back()
            network = load(self.loading.but(device="cpu")).model
            self.loaded = replace(self.loaded, model=network)
        pairs = list(zip(before, after, strict=True))[: len(self.corpora)]
        result = self._result(outcome, network, tuple(Change(old, new) for old, new in pairs))
        if self.controlling is not None:
            control = self._control(self.controlling, outcome, before, after)
            result = replace(result, control=control)
        if first:
            result = self._save(result, network)
        self.processes.barrier()
        return result

    def _load(self, examples: dict[str, Examples]) -> LoadedModel | None:
        """Load the models and make the samples as in an interrupted run; return the control."""
        settings = self.settings
        earlier = workdir.read_values(self.work / workdir.RUN) if settings.resume else None
        ways = ways_to_load(settings, self.processes, earlier)
        self.loading, self.controlling = ways["model"], ways.get("control")
        self.loaded = load(self.loading)
        self.made = records_of(settings.model, self.loaded.revision)
        check_length(self.loaded.model, settings.seq_len)
        model, tokenizer, option = self.loaded.model, self.loaded.tokenizer, "perplexity_seq_len"
        for text in self.corpora:
            check_windows(model, tokenizer, text, self.measuring, option)
        self.dense = load_teacher(ways["teacher"], self.loaded) if "teacher" in ways else None
        control = None if self.controlling is None else self._reference(self.controlling)
        writes = self.processes.is_first
        if writes and not settings.resume:
            workdir.empty(self.work)
        with self.processes.first():  # it writes what the others read
            self.samples = make_samples(settings, self.work, self.loaded, self.dense, examples)
            self.facts = facts_of(settings, self.loaded, self.dense, self.samples)
            if control is not None:
                self.facts |= {"control": control.name, "control_fingerprint": control.fingerprint}
            types = {"dtype": settings.dtype} | {f"{of}_dtype": ways[of].dtype for of in ways}
            asked = settings.model_dump(mode="json", include=_OF_SAMPLES)
            facts = {"llm_pruner": __version__} | asked | self.facts | types
            workdir.begin_or_go_on(self.work, facts, resume=settings.resume, writes=writes)
        return control

    def _measure(self, loaded: LoadedModel, dense: LoadedModel | None) -> list[PerplexityResult]:
        """Return perplexities, and how far the model is from the dense one; the first process does.

        They are those on the corpora, and with a control on the samples that are held out.
        """
        if not self.processes.is_first:
            return []
        found = [
            perplexity(loaded.model, loaded.tokenizer, text, self.measuring, dense)
            for text in self.corpora
        ]
        if self.controlling is not None:
            prefix, _ = added_tokens(self.loaded.tokenizer)
            rows = held_out_windows(self.samples, self.settings.seq_len, prefix)
            text, skipped = EvaluationText("held-out samples", None, ""), max(1, len(prefix))
            about = (loaded.model, rows, text, self.measuring, dense)
            found.append(perplexity_of_windows(*about, skipped=skipped))
        return found

    def _control(
        self,
        loading: ModelSettings,
        pruned: Outcome,
        before: Sequence[PerplexityResult],
        after: Sequence[PerplexityResult],
    ) -> Control:
        """Train the dense model as the pruned one was; it is measured and thrown away.

        Args:
            pruned: how that went. It ends no later than that, and the learning rate falls towards
                the same end, which a clock may have decided.
            before, after: what was measured of the pruned model.
        """
        settings = self.settings
        if settings.max_minutes is not None:
            settings = settings.but(max_minutes=None).with_trainer(
                max_steps=max(pruned.run.total, 1)
            )
        dense = self._loaded(loading)
        alone = self._measure(dense, None)
        work = self.work / f"control-{short_digest(dense.fingerprint)}"
        network, outcome = self._train(dense.model, loading, settings, work, pruned.steps)
        trained = self._measure(replace(dense, model=network), self._reference(loading))
        return Control(
            model=dense.name,
            gained=outcome.gained,
            loss=Change(outcome.before.loss, outcome.after.loss),
            steps=outcome.steps,
            best_step=outcome.run.evaluations[outcome.run.best].step,
            texts=tuple(
                ControlText(*models, damage=models[3].perplexity / models[1].perplexity)
                for models in zip(alone, trained, before, after, strict=True)
            ),
        )

    def _train(
        self,
        model: Any,
        loading: ModelSettings,
        settings: RecoverSettings,
        work: Path,
        steps: int | None = None,
    ) -> tuple[Any, Outcome]:
        """Train a model, for so many steps at most; the pruned one's adapter may be kept."""
        control = loading is not self.loading
        train = [one for each in self.samples for one in each.train]
        held_out = [one for each in self.samples for one in each.held_out]
        with self.processes.first():
            teacher, judge = self._teacher(train), self._teacher(held_out)
        return recover_(
            model,
            train,
            held_out,
            settings,
            work=work,
            teacher=teacher,
            judge=judge,
            say=lambda progress: self.say(replace(progress, control=control)),
            keep_adapter=None if control else self.adapter,
            processes=self.processes,
            again=lambda: self._loaded(loading).model,
            as_saved_=self._round_,
            callbacks=[] if steps is None else [EndAt(steps)],
        )

    def _round_(self, network: Any) -> None:
        """Round weights to the type in which they are saved; they keep the one they have."""
        if self.settings.dtype == "auto":
            round_(network, self.loaded.stored_dtype)

    def _loaded(self, loading: ModelSettings) -> LoadedModel:
        """Load the model that is recovered, or the control, as it came."""
        return load(loading) if loading is self.loading else load_teacher(loading, self.loaded)

    def _reference(self, loading: ModelSettings) -> LoadedModel:
        """Return the control to compare with: the teacher, where it is that, or loaded."""
        if self.dense is not None and self.settings.control == self.settings.teacher:
            return self.dense
        return load_teacher(loading, self.loaded)

    def _teacher(self, samples: Sequence[TrainingSequence]) -> Teacher | None:
        settings, dense = self.settings, self.dense
        if dense is None or not settings.distils:
            return None
        return Teacher(
            dense.model,
            samples,
            settings,
            settings.teacher_cache or self.work / "teacher",
            identity=computing(dense, settings.bf16),
            seq_len=settings.seq_len,
        )

    def _result(
        self, outcome: Outcome, network: Any, perplexity: tuple[Change[PerplexityResult], ...]
    ) -> Recovered:
        run, best = outcome.run, outcome.after if outcome.gained else outcome.before
        return Recovered(
            model=self.loaded.name,
            gained=outcome.gained,
            loss=Change(outcome.before.loss, outcome.after.loss),
            sources=tuple(
                SourceResult(
                    name=each.name,
                    split=each.split,
                    train_samples=len(each.train),
                    held_out_samples=len(each.held_out),
                    held_out_tokens=sum(one.targets for one in each.held_out),
                    loss_before=outcome.before.by_source[number],
                    loss_after=best.by_source[number],
                )
                for number, each in enumerate(self.samples)
            ),
            perplexity=perplexity,
            steps=outcome.steps,
            best_step=run.evaluations[run.best].step,
            stopped=run.stopped,
            tokens=run.tokens,
            seconds=run.seconds,
            trained=outcome.trained,
            parameters=sum(one.numel() for one in network.parameters()),
            packed=outcome.packed,
            losses=outcome.losses,
            evaluations=[StepLoss(one.step, one.loss) for one in run.evaluations],
            settings=self.facts,
            path=self.settings.out,
        )

    def _save(self, result: Recovered, network: Any) -> Recovered:
        """Write the folder and throw the run's own away."""
        settings, loaded = self.settings, self.loaded
        plan, earlier = self.made / "plan.json", known_report(self.made)

        def beside(folder: Path, kind: SavedAs, needs: tuple[str, ...]) -> None:
            nonlocal result
            result = replace(result, saved_as=kind, needs=needs)
            write_request(folder, self.asked)
            write_output(folder / RECOVERY_FILE, result.lasting())
            if self.adapter is not None and result.gained:
                shutil.copytree(self.adapter, folder / "adapter")
            report = recovery_report(
                result,
                earlier,
                source=source_of(
                    settings.model, loaded.name, loaded.revision, network, loaded.fingerprint
                ),
                pruned=plan.is_file(),
                size=model_size(network),
                command=self.command,
            )
            write_report(folder, lambda: report)

        if settings.dtype == "auto":
            keep_type_(network, loaded.stored_dtype)
        saved = save_checkpoint(
            network,
            settings.out,
            edits=Edits({}, {}, {}, {}),
            plan_json=plan.read_text(encoding="utf-8") if plan.is_file() else None,
            tokenizer=loaded.tokenizer,
            processor=loaded.processor,
            overwrite=settings.overwrite,
            max_shard_size=settings.max_shard_size,
            beside=beside,
        )
        remove(self.work)
        return replace(result, bytes=saved.bytes, report=page_in(saved.path))
