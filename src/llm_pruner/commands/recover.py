"""Load a model and text, train, and save the model only if it became better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.commands.evaluate import PerplexitySettings, read_texts
from llm_pruner.commands.recover_request import RecoverRequest
from llm_pruner.commands.recover_start import (
    begin_or_go_on,
    facts_of,
    load_teacher,
    make_samples,
    read_examples,
    remove_finished,
)
from llm_pruner.commands.recovered import RECORD, Recovered, SourceResult
from llm_pruner.commands.space import check_space
from llm_pruner.commands.workdir import RECOVERING, begun, busy, empty, remove_run
from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.data.training import Samples
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    maximum_length,
    perplexity,
)
from llm_pruner.files.disk import new_folder
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.loading import check, load
from llm_pruner.planning.plan import read_plan
from llm_pruner.recovery import Outcome, Progress, Teacher, recover_
from llm_pruner.recovery.hidden import Kept
from llm_pruner.recovery.processes import Processes, joined, own_device, shards_asked_for
from llm_pruner.recovery.sharding import fill_, mesh_of, shard_, whole_weights
from llm_pruner.report.data import Recovery
from llm_pruner.report.facts import size_of, source_of
from llm_pruner.report.recovery import (
    course,
    earlier_report,
    in_words,
    recovery_report,
)
from llm_pruner.report.write import page_in, write_report
from llm_pruner.runtime.precision import multiplies_bfloat16
from llm_pruner.settings.common import ModelSettings
from llm_pruner.types import Edits


def recover_checkpoint(
    request: RecoverRequest, *, say: Callable[[Progress], None] = lambda _: None
) -> Recovered:
    """Train a checkpoint and save the result as a folder that loads as the input does.

    While it runs, checkpoints lie in a folder beside ``out``, see ``work_folder``, which goes away
    at the end.

    Of several processes that a launcher started, each calls this with the same arguments. The first
    one writes, and the others return the same without perplexities and what the folder is like.

    Args:
        request: what to do.
        say: called after each step.

    Raises:
        UserError: something that was given must change; ``out`` is as it was.
    """
    request = _on_this_machine(request)
    if not request.overwrite:
        remove_finished(request.work, request.out)
    request.check()
    with joined(request.model.device, shard=request.shard) as processes:
        processes.barrier()  # from here on, the folders that were looked at may change
        with _begun(request.work, processes):
            return _Run(request, processes, say).carry_out()


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


def _on_this_machine(request: RecoverRequest) -> RecoverRequest:
    """Return the request with this process's device, and how it multiplies, filled in."""
    model = replace(request.model, device=own_device(request.model.device))
    settings, teacher = request.settings, request.teacher
    if settings.bf16 is None:
        fast = model.dtype == "float32" and multiplies_bfloat16(model.device)
        settings = replace(settings, bf16=fast)
    if teacher is not None:
        device = own_device(teacher.model.device)
        teacher = replace(teacher, model=replace(teacher.model, device=device))
    shard = request.shard or shards_asked_for()
    return replace(request, model=model, settings=settings, teacher=teacher, shard=shard)


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
        self, request: RecoverRequest, processes: Processes, say: Callable[[Progress], None]
    ) -> None:
        self._request, self._processes, self._say = request, processes, say

    def carry_out(self) -> Recovered:
        request, processes = self._request, self._processes
        with processes.first():
            check_space(request.out, request.model)
            corpora = read_texts(request.texts, request.text_settings)
            examples = read_examples(request.data)
        if request.teacher is not None:  # which is loaded after the model
            check(request.teacher.model)
        material = self._material(examples)
        loaded = material.loaded
        if not processes.is_first and not processes.sharded:
            corpora = []
        before = _perplexities(loaded, corpora, request.text_settings)
        network, outcome = self._train(material)
        after = before
        if outcome.gained:
            kept = replace(loaded, model=network)
            after = _perplexities(kept, corpora, request.text_settings)
        network = self._whole(network, outcome.gained)
        perplexities = tuple(zip(before, after, strict=True))
        result = self._result(material, outcome, network, perplexities)
        if processes.is_first:
            result = self._save(result, material, outcome, network)
        processes.barrier()
        return result

    def _whole(self, network: Any, gained: bool) -> Any:
        """Return the model to be saved; it matters in the first process alone."""
        model, processes = self._request.model, self._processes
        if gained and not processes.sharded:
            return network
        weights = whole_weights(network, processes) if gained else None
        if not processes.is_first:
            return network
        device = "cpu" if processes.sharded else model.device
        plain = load(replace(model, device=device)).model  # as it came, to the last bit
        if weights is not None:
            fill_(plain, weights)
        return plain

    def _load(self) -> LoadedModel:
        model, processes = self._request.model, self._processes
        if not processes.sharded:
            return load(model)
        mesh = mesh_of(model.device, processes)
        with processes.in_turn():  # the model is whole in memory once
            loaded = load(replace(model, device="cpu"))
            shard_(loaded.model, model.device, mesh)
        return loaded

    def _material(self, examples: dict[str, Any]) -> _Material:
        request = self._request
        loaded = self._load()
        longest = maximum_length(loaded.model)
        if longest is not None and request.settings.seq_len > longest:
            raise UserError(
                f"--seq-len {request.settings.seq_len} is longer than the model's maximum; "
                f"use {longest} or less"
            )
        dense = None if request.teacher is None else load_teacher(request.teacher, loaded)
        if request.restart and self._processes.is_first:
            empty(request.work, RECOVERING)
        with self._processes.first():  # it writes what the others read
            samples = make_samples(request, loaded, dense, examples)
            facts = facts_of(request, loaded, dense, samples)
            writes = self._processes.is_first
            begin_or_go_on(request.work, facts, resume=request.resume, writes=writes)
        return _Material(loaded, dense, samples, facts)

    def _train(self, material: _Material) -> tuple[Any, Outcome]:
        request = self._request
        with self._processes.first():
            teacher, judge = (
                self._teacher(material.dense, some) for some in (material.train, material.held_out)
            )
        return recover_(
            material.loaded.model,
            material.train,
            material.held_out,
            request.settings,
            work=request.work,
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
        distillation = self._request.distillation
        if dense is None or distillation is None:
            return None
        assert self._request.teacher is not None
        return Teacher(
            dense.model,
            samples,
            distillation,
            self._request.teacher.cache or self._request.work / "teacher",
            identity=dense.fingerprint,
            seq_len=self._request.settings.seq_len,
            kept=_kept(self._request.model) if distillation.hidden else None,
        )

    @property
    def _adapter(self) -> Path | None:
        """Where the adapter waits for the model to be saved."""
        return self._request.work / "adapter" if self._request.keep_adapter else None

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
            path=self._request.out,
            bytes=0,
            needs=(),
            settings=material.facts,
        )

    def _save(
        self, result: Recovered, material: _Material, outcome: Outcome, network: Any
    ) -> Recovered:
        """Write the folder and throw the run's own away."""
        request, loaded, dense = self._request, material.loaded, material.dense
        for one in (loaded, dense):
            if one is not None:
                one.check_stored()
        plan = _plan_file(request.model)
        earlier = earlier_report(request.model.source)
        samples = [(each.name, each.train_samples) for each in result.sources]
        words = in_words(
            material.facts, samples, result.steps, None if dense is None else dense.name
        )

        def beside(folder: Path, kind: Literal["stock", "recipe"], needs: tuple[str, ...]) -> None:
            (folder / RECORD).write_text(result.record(), encoding="utf-8", newline="\n")
            if self._adapter is not None and outcome.gained:
                shutil.copytree(self._adapter, folder / "adapter")
            report = recovery_report(
                earlier,
                source=source_of(request.model.source, loaded.name, loaded.revision, network),
                pruned=plan is not None,
                size=size_of(network),
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
                command=request.command,
            )
            write_report(folder, report)

        saved = save_checkpoint(
            network,
            request.out,
            edits=Edits({}, {}, {}, {}),
            plan_json=None if plan is None else plan.read_text(encoding="utf-8"),
            tokenizer=loaded.tokenizer,
            overwrite=request.overwrite,
            max_shard_size=request.max_shard_size,
            beside=beside,
        )
        remove_run(request.work, RECOVERING)
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
            batch_size=settings.batch_size,
        )
        for text in corpora
    ]


def _plan_file(model: ModelSettings) -> Path | None:
    file = Path(model.source).expanduser() / "plan.json"
    return file if file.is_file() else None


def _kept(model: ModelSettings) -> Kept:
    """Return what a model has of the one that it was cut from, as its plan says."""
    file = _plan_file(model)
    if file is None:
        return Kept()
    plan = read_plan(file)
    return Kept(plan.kept("layers"), plan.kept("hidden"))
