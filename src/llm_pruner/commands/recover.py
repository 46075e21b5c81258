"""Load a model and text, train, and save the model only if it became better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.commands.evaluate import read_texts
from llm_pruner.commands.prune import keep_type_
from llm_pruner.commands.recover_start import (
    begin_or_go_on,
    check_run,
    facts_of,
    load_teacher,
    make_samples,
    read_examples,
    remove_finished,
)
from llm_pruner.commands.recovered import RECORD, Recovered, SourceResult
from llm_pruner.commands.request import write_request
from llm_pruner.commands.space import check_space
from llm_pruner.commands.workdir import (
    RECOVERING,
    begun,
    busy,
    empty,
    folder_beside,
    remove_run,
)
from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.data.training import Samples
from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    perplexity,
)
from llm_pruner.files.disk import new_folder
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import LoadedModel, check, load
from llm_pruner.recovery import Outcome, Progress, Teacher, recover_
from llm_pruner.recovery.processes import Processes, joined, own_device
from llm_pruner.report.data import Recovery
from llm_pruner.report.facts import source_of
from llm_pruner.report.recovery import (
    course,
    earlier_report,
    in_words,
    recovery_report,
)
from llm_pruner.report.write import page_in, write_report
from llm_pruner.runtime.precision import multiplies_bfloat16
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.types import Edits


def work_folder(out: Path) -> Path:
    """Return the folder of a run that will end in ``out``: its name and ``.recovering``."""
    return folder_beside(out, "recovering")


def recover_checkpoint(
    settings: RecoverSettings,
    *,
    command: str | None = None,
    say: Callable[[Progress], None] = lambda _: None,
) -> Recovered:
    """Train a checkpoint and save the result as a folder that loads as the input does.

    While it runs, checkpoints lie in a folder beside ``out``, see ``work_folder``, which goes away
    at the end.

    Of several processes that a launcher started, each calls this with the same arguments. The first
    one writes, and the others return the same without perplexities and what the folder is like.

    Args:
        settings: what to do.
        command: the command line of this run, for the report.
        say: called after each step.

    Raises:
        UserError: something that was given must change; ``out`` is as it was.
    """
    device = own_device(settings.device)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = settings.dtype in ("float32", "auto") and multiplies_bfloat16(device)
    here = settings.but(device=device, bf16=bf16)
    work = work_folder(settings.out)
    if not settings.overwrite:
        remove_finished(work, settings.out)
    check_run(here, work)
    with joined(device) as processes:
        processes.barrier()  # from here on, the folders that were looked at may change
        with _begun(work, processes):
            return _Run(here, settings, command, processes, say).carry_out()


@contextmanager
def _begun(work: Path, processes: Processes) -> Iterator[None]:
    """Have the first process hold the folder of the run; all end alike if it cannot be had."""
    with ExitStack() as held:
        refused = None
        if processes.is_first:
            try:
                held.enter_context(begun(work, RECOVERING))
            except UserError as error:
                refused = error
        if processes.from_first(float(refused is not None)):
            raise refused or busy(work)
        yield


@dataclass(frozen=True)
class _Material:
    """What a run has loaded and read.

    Attributes:
        loaded: the model that is trained.
        dense: the teacher.
        samples: of each source.
        facts: all that decides how the run goes.
    """

    loaded: LoadedModel
    dense: LoadedModel | None
    samples: list[Samples]
    facts: dict[str, Any]

    @property
    def train(self) -> list[TrainingSequence]:
        return [one for each in self.samples for one in each.train]

    @property
    def held_out(self) -> list[TrainingSequence]:
        return [one for each in self.samples for one in each.held_out]


class _Run:
    """One run, in one process."""

    def __init__(
        self,
        settings: RecoverSettings,
        asked: RecoverSettings,
        command: str | None,
        processes: Processes,
        say: Callable[[Progress], None],
    ) -> None:
        self._settings, self._asked, self._command = settings, asked, command
        self._processes, self._say = processes, say
        self._work = work_folder(settings.out)
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        self._loading = settings.loading(dtype=dtype)
        self._measuring = PerplexitySettings(seq_len=settings.perplexity_seq_len)

    def carry_out(self) -> Recovered:
        settings, processes = self._settings, self._processes
        teacher = None
        if settings.teacher is not None:
            teacher = self._loading.loading(settings.teacher)
        with processes.first():
            check_space(settings.out, settings.loading())
            corpora = read_texts(settings.perplexity, self._measuring)
            examples = read_examples(settings)
        if teacher is not None:  # which is loaded after the model
            check(teacher)
        material = self._material(examples, teacher)
        loaded = material.loaded
        if not processes.is_first:
            corpora = []
        before = _perplexities(loaded, corpora, self._measuring)
        network, outcome = self._train(material)
        after = before
        if outcome.gained:
            after = _perplexities(replace(loaded, model=network), corpora, self._measuring)
        elif processes.is_first:
            network = load(self._loading).model  # as it came, to the last bit
        perplexities = tuple(zip(before, after, strict=True))
        result = self._result(material, outcome, network, perplexities)
        if processes.is_first:
            result = self._save(result, material, outcome, network)
        processes.barrier()
        return result

    def _material(self, examples: dict[str, Any], teacher: ModelSettings | None) -> _Material:
        settings = self._settings
        loaded = load(self._loading)
        longest = maximum_length(loaded.model)
        if longest is not None and settings.seq_len > longest:
            raise UserError(
                f"--seq-len {settings.seq_len} is longer than the model's maximum; "
                f"use {longest} or less"
            )
        dense = None if teacher is None else load_teacher(teacher, loaded)
        if settings.restart and self._processes.is_first:
            empty(self._work, RECOVERING)
        with self._processes.first():  # it writes what the others read
            samples = make_samples(settings, self._work, loaded, dense, examples)
            facts = facts_of(settings, loaded, dense, samples)
            writes = self._processes.is_first
            begin_or_go_on(self._work, facts, resume=settings.resume, writes=writes)
        return _Material(loaded, dense, samples, facts)

    def _train(self, material: _Material) -> tuple[Any, Outcome]:
        with self._processes.first():
            teacher, judge = (
                self._teacher(material.dense, some) for some in (material.train, material.held_out)
            )
        return recover_(
            material.loaded.model,
            material.train,
            material.held_out,
            self._settings,
            work=self._work,
            folder=new_folder,
            sources=len(material.samples),
            teacher=teacher,
            judge=judge,
            say=self._say,
            keep_adapter=self._adapter,
            processes=self._processes,
        )

    def _teacher(
        self, dense: LoadedModel | None, samples: Sequence[TrainingSequence]
    ) -> Teacher | None:
        settings = self._settings
        if dense is None or not settings.distils:
            return None
        return Teacher(
            dense.model,
            samples,
            settings,
            settings.teacher_cache or self._work / "teacher",
            identity=dense.fingerprint,
            seq_len=settings.seq_len,
        )

    @property
    def _adapter(self) -> Path | None:
        """Where the adapter waits for the model to be saved."""
        return self._work / "adapter" if self._settings.keep_adapter else None

    def _result(
        self,
        material: _Material,
        outcome: Outcome,
        network: Any,
        perplexities: tuple[tuple[PerplexityResult, PerplexityResult], ...],
    ) -> Recovered:
        best = outcome.after if outcome.gained else outcome.before
        return Recovered(
            model=material.loaded.name,
            gained=outcome.gained,
            loss=(outcome.before.loss, outcome.after.loss),
            sources=tuple(
                SourceResult(
                    each.name,
                    each.split,
                    len(each.train),
                    len(each.held_out),
                    sum(one.targets for one in each.held_out),
                    outcome.before.by_source[number],
                    best.by_source[number],
                )
                for number, each in enumerate(material.samples)
            ),
            perplexity=perplexities,
            steps=outcome.steps,
            best_step=outcome.run.evaluations[outcome.run.best].step,
            stopped=outcome.run.stopped,
            tokens=outcome.run.tokens,
            seconds=outcome.run.seconds,
            trained=outcome.trained,
            parameters=sum(one.numel() for one in network.parameters()),
            packed=outcome.packed,
            losses=outcome.losses,
            evaluations=[(one.step, one.loss) for one in outcome.run.evaluations],
            kind="stock",
            path=self._settings.out,
            bytes=0,
            needs=(),
            settings=material.facts,
        )

    def _save(
        self, result: Recovered, material: _Material, outcome: Outcome, network: Any
    ) -> Recovered:
        """Write the folder and throw the run's own away."""
        settings, loaded, dense = self._settings, material.loaded, material.dense
        for one in (loaded, dense):
            if one is not None:
                one.check_stored()
        plan = _plan_file(settings.model)
        earlier = earlier_report(settings.model)
        samples = [(each.name, each.train_samples) for each in result.sources]
        words = in_words(
            material.facts, samples, result.steps, None if dense is None else dense.name
        )

        def beside(folder: Path, kind: Literal["stock", "recipe"], needs: tuple[str, ...]) -> None:
            write_request(folder, self._asked)
            (folder / RECORD).write_text(result.record(), encoding="utf-8", newline="\n")
            if self._adapter is not None and outcome.gained:
                shutil.copytree(self._adapter, folder / "adapter")
            report = recovery_report(
                earlier,
                source=source_of(settings.model, loaded.name, loaded.revision, network),
                pruned=plan is not None,
                size=model_size(network),
                recovery=Recovery(
                    loss=tuple(course(result.losses, result.evaluations)),
                    seconds=result.seconds,
                    summary=words,
                    gained=result.gained,
                ),
                perplexity=result.perplexity,
                settings=material.facts,
                saved_as=kind,
                needs=needs,
                command=self._command,
            )
            write_report(folder, report)

        if settings.dtype == "auto":
            keep_type_(network, loaded.stored_dtype)
        saved = save_checkpoint(
            network,
            settings.out,
            edits=Edits({}, {}, {}, {}),
            plan_json=None if plan is None else plan.read_text(encoding="utf-8"),
            tokenizer=loaded.tokenizer,
            overwrite=settings.overwrite,
            max_shard_size=settings.max_shard_size,
            beside=beside,
        )
        remove_run(self._work, RECOVERING)
        return replace(
            result,
            kind=saved.kind,
            bytes=saved.bytes,
            needs=saved.needs,
            report=page_in(saved.path),
        )


def _perplexities(
    loaded: LoadedModel, corpora: Sequence[EvaluationText], settings: PerplexitySettings
) -> list[PerplexityResult]:
    return [
        perplexity(
            loaded.model,
            loaded.tokenizer,
            text,
            protocol=settings.protocol,
            seq_len=settings.seq_len,
            max_tokens=settings.max_tokens,
            batch_size=settings.sequences,
        )
        for text in corpora
    ]


def _plan_file(model: str) -> Path | None:
    file = Path(model).expanduser() / "plan.json"
    return file if file.is_file() else None
