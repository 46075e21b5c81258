"""Load a model and text, train, and save the model only if it became better."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.save import keep_type_, round_
from llm_pruner.commands import workdir
from llm_pruner.commands.evaluate import read_texts
from llm_pruner.commands.prune_start import check_space
from llm_pruner.data.examples import Examples, load_examples
from llm_pruner.data.sequences import TrainingSequence, added_tokens
from llm_pruner.data.text import PRUNED, SELF, EvaluationText, read_each
from llm_pruner.data.training import (
    Samples,
    fingerprint_samples,
    held_out_windows,
    self_made_samples,
    split_samples,
    without_held_out,
)
from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import (
    PerplexityResult,
    check_tokens,
    check_windows,
    perplexity,
    perplexity_of_windows,
)
from llm_pruner.files.disk import remove, short_digest
from llm_pruner.files.outputs import (
    RECOVERY_FILE,
    check_output,
    check_place,
    write_output,
)
from llm_pruner.models.checkpoint_files import dtype_named, local_path, records_of, stored_size
from llm_pruner.models.forward import check_length, dtype_name, embedding_rows
from llm_pruner.models.load import LoadedModel, load, stored_dtype
from llm_pruner.recovery import Outcome, Progress, Teacher, recover_
from llm_pruner.recovery.arguments import check_names, training_arguments
from llm_pruner.recovery.callbacks import EndAt
from llm_pruner.recovery.methods.full import check_type
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
from llm_pruner.runtime.memory import free_bytes, give_back
from llm_pruner.runtime.precision import multiplies, multiplies_bfloat16
from llm_pruner.runtime.processes import (
    Processes,
    check_trains,
    is_sharded,
    joined,
    own_device,
    started,
)
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.options import option_name
from llm_pruner.settings.recover import (
    DataSettings,
    DistillationSettings,
    RecoverSettings,
    TrainingSettings,
)
from llm_pruner.surgery.vocabulary import with_tokens_of
from llm_pruner.types import Edits
from llm_pruner.version import __version__

_LOG = logging.getLogger(__name__)

_HOW_FAST = ("packing", "kernels")
"""Settings of which the result does not depend but for rounding."""

_ASIDE = ("save_steps", "report_to", "gradient_checkpointing", "activation_checkpointing")
"""Arguments of the Trainer that a resumed run may have otherwise."""

_WRITTEN = (SELF, PRUNED)
"""Sources that a model writes."""

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
        with _begun(work, processes):
            return _Run(here, settings, command, processes, say).carry_out()


@contextmanager
def _begun(work: Path, processes: Processes) -> Iterator[None]:
    """Have the first process hold the folder of the run; all end alike if it cannot be had."""
    with ExitStack() as held:
        refused = None
        if processes.is_first:
            try:
                held.enter_context(workdir.begun(work))
            except UserError as error:
                refused = error
        if processes.from_first(float(refused is not None)):
            raise refused or workdir.busy(work)
        yield


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
        if settings.restart and writes:
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


def _is_same(one: str, other: str) -> bool:
    """Whether two names are of one model; of folders and files, of one place."""
    return one == other or local_path(one).resolve() == local_path(other).resolve()


def check_run(settings: RecoverSettings, work: Path) -> None:
    """Raise UserError for what can be refused without reading anything; the run is in ``work``."""
    check_training(settings)
    check_output(settings.out, settings.overwrite, settings.reads)
    if settings.teacher_cache is not None:
        if settings.teacher is None:
            raise UserError(
                f"--teacher-cache {settings.teacher_cache} keeps what a teacher says; name that "
                "with --teacher, or leave it out"
            )
        check_place(settings.teacher_cache / "cache", "--teacher-cache")
        place = settings.teacher_cache.resolve()
        for taken in (settings.out.resolve(), work.resolve()):
            if taken in (place, *place.parents):
                raise UserError(
                    f"--teacher-cache {settings.teacher_cache} lies in {taken.name}, which this "
                    "run writes; name a folder of its own"
                )
    for name in DistillationSettings.model_fields:
        if name in settings.given and settings.teacher is None:
            raise UserError(
                f"{option_name(name)} {getattr(settings, name):g} is about a teacher; name that "
                "with --teacher, or leave it out"
            )
    measures = settings.perplexity or settings.control
    if settings.perplexity_seq_len is not None and not measures:
        raise UserError(
            f"--perplexity-seq-len {settings.perplexity_seq_len} is about texts that are measured; "
            "add --perplexity SRC or leave it out"
        )
    check_data(settings)
    if settings.control is not None and _is_same(settings.control, settings.model):
        raise UserError(
            f"--control {settings.control} is the model that is recovered; name the dense model "
            "that it was cut from"
        )
    if settings.method != "lora" and isinstance(kind := dtype_named(settings.dtype), torch.dtype):
        check_type(settings.method, kind)
    if settings.keep_adapter and settings.method != "lora":
        raise UserError(f"method {settings.method} has no adapter to keep; leave keep_adapter out")
    if settings.resume and settings.restart:
        raise UserError("--resume and --restart say different things; give one of them")
    if work.exists() and not (settings.resume or settings.restart):
        raise UserError(
            f"{work.name} holds a run that was interrupted; go on with --resume, or throw "
            "it away with --set restart=true"
        )


def check_training(settings: TrainingSettings) -> None:
    """Raise UserError for an argument of the Trainer that it refuses, or a missing package."""
    settings.check()
    check_names(settings)
    if started() == 1:  # several have yet to meet, on devices that are not known here
        training_arguments(settings)


def check_data(settings: RecoverSettings) -> None:
    """Raise UserError if there is no data, or a source needs a teacher that was not named."""
    if not settings.data:
        raise UserError("no data given; use --data SRC")
    if SELF in settings.data and settings.teacher is None:
        raise UserError(
            "--data self is text that the dense model writes; name that model with --teacher"
        )
    mute = settings.teacher is not None and not settings.distils
    if mute and SELF not in settings.data:
        raise UserError(
            "--distill-weight 0 leaves the teacher nothing to do; add --data self, which it "
            "writes, or leave --teacher out"
        )
    for name in ("temperature", "teacher_top_k") if mute else ():
        if name in settings.given:
            raise UserError(
                f"{option_name(name)} is about what the teacher says, of which --distill-weight 0 "
                "hears nothing; leave one of them out"
            )
    if PRUNED in settings.data:
        if settings.teacher is None:
            raise UserError(
                "--data pruned is text that the dense model judges; name that model with --teacher"
            )
        if settings.distill_weight < 1:
            raise UserError(
                f"--distill-weight {settings.distill_weight:g} leaves the rest to a text that the "
                "pruned model wrote itself, which teaches it nothing; use 1 with --data pruned"
            )


def read_examples(data: DataSettings) -> dict[str, Examples]:
    """Return the examples of each source that no model writes."""
    sources = [source for source in data.data if source not in _WRITTEN]

    def read(source: str, text_field: str | None) -> Examples:
        how: Any = {"split": data.split, "limit": data.samples}
        return load_examples(source, text_field=text_field, **how)

    return read_each(read, sources, data.text_field)


def ways_to_load(
    settings: RecoverSettings, processes: Processes, earlier: Mapping[str, Any] | None = None
) -> dict[str, ModelSettings]:
    """Return how ``model`` is loaded, and ``teacher`` and ``control`` if there are such.

    ``--dtype auto`` computes in float32. Beside adapters no weight of a model is trained, and none
    loses a small step: there each is computed as it is stored where the device multiplies that
    faster, or where float32 copies of all would not fit into its free memory. FSDP2 wants one type.

    Args:
        earlier: the facts of an interrupted run that goes on, in whose types it does.

    Raises:
        UserError: one of them cannot be loaded.
    """
    named = {"model": None, "teacher": settings.teacher, "control": settings.control}
    ways = {of: settings.loading(name) for of, name in named.items() if name or of == "model"}
    stored = {of: stored_dtype(way) for of, way in ways.items()}
    if settings.dtype != "auto":
        return ways
    adapts = settings.method == "lora" and not processes.sharded
    short = adapts and bool(processes.from_first(_is_short(ways.values(), settings.device)))
    for of, kept in stored.items():
        name, fast = str(kept).removeprefix("torch."), multiplies(kept, settings.device)
        half = adapts and kept.itemsize == 2 and (short or fast)
        used = (earlier or {}).get(f"{of}_dtype", name if half else "float32")
        ways[of] = ways[of].but(dtype=used)
        if half and used == name and not fast and processes.is_first:
            _LOG.warning(
                "float32 copies of all models do not fit into the free memory: the %s is computed "
                "in %s",
                of,
                name,
            )
    return ways


def _is_short(models: Iterable[ModelSettings], device: str) -> bool:
    """Whether float32 copies of all do not fit; of what is still on the hub nothing is known."""
    sizes = [stored_size(one.model, one.revision, "float32") for one in models]
    return sum(size[1] for size in sizes if size) > free_bytes(device)


def load_teacher(teacher: ModelSettings, student: LoadedModel) -> LoadedModel:
    """Load the dense model with the student's tokens; raise UserError if it lacks some of them."""
    return as_teacher(load(teacher), student)


def as_teacher(dense: LoadedModel, student: LoadedModel) -> LoadedModel:
    """Return a model with the student's tokens; raise UserError if it lacks some of them."""
    dense = with_tokens_of(dense, student)
    assert dense.tokenizer is not None
    assert student.tokenizer is not None
    ours, theirs = (embedding_rows(one.model) for one in (student, dense))
    if ours != theirs or student.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise UserError(
            f"{dense.name} has another vocabulary ({theirs} tokens) than {student.name} ({ours}); "
            "name the dense model that the student was cut from"
        )
    return dense


def make_samples(
    settings: RecoverSettings,
    work: Path,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    examples: dict[str, Examples],
) -> list[Samples]:
    """Return the samples of each source, those of ``self`` and ``pruned`` written by a model.

    Raises UserError if a source has too few, or the model lacks a token of them.
    """
    if settings.mask_prompt and not any(
        example.turns for each in examples.values() for example in each.examples
    ):
        raise UserError(
            "--mask-prompt is for examples that someone asks and someone answers, and none of "
            f"{', '.join(settings.data)} has such; leave it out"
        )
    samples = []
    for number, source in enumerate(settings.data):
        options: dict[str, Any] = {
            "seq_len": settings.seq_len,
            "limit": settings.samples,
            "held_out": settings.held_out,
            "seed": settings.seed,
            "source": number,
        }
        if source in _WRITTEN:
            writer = dense if source == SELF else loaded
            assert writer is not None
            kept = (settings.teacher_cache or work) / f"{source}-{short_digest(computing(writer))}"
            if source == SELF:
                kept = settings.kept or kept
                options["limit"] = settings.self_samples or settings.samples
            made = self_made_samples(writer.model, writer.tokenizer, kept, name=source, **options)
        else:
            made = split_samples(
                examples[source],
                loaded.tokenizer,
                template=settings.template,
                mask_prompt=settings.mask_prompt,
                **options,
            )
        samples.append(made)
    samples = without_held_out(samples)
    used = (one.input_ids.max() for each in samples for one in (*each.train, *each.held_out))
    check_tokens(loaded.model, int(max(used)))
    return samples


def computing(model: LoadedModel, bf16: bool | None = False) -> str:
    """Return what identifies a model with its types, of which its fingerprint knows nothing.

    ``bf16``: whether its modules multiply in bfloat16, whatever the type of its weights.
    """
    products = "bfloat16" if bf16 else "its own"
    return f"{model.fingerprint}, weights {dtype_name(model.model)}, products {products}"


def facts_of(
    settings: RecoverSettings,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    samples: Sequence[Samples],
) -> dict[str, Any]:
    """Return all that decides how a run goes."""
    decides = set(TrainingSettings.model_fields) - set(_HOW_FAST)
    distillation = {
        "temperature": settings.temperature,
        "weight": settings.distill_weight,
        "top_k": settings.teacher_top_k,
    }
    train = [one for each in samples for one in each.train]
    held_out = [one for each in samples for one in each.held_out]
    return {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "teacher": None if dense is None else dense.name,
        "teacher_fingerprint": None if dense is None else dense.fingerprint,
        "distillation": distillation if settings.distils else None,
        "data": [one if one in _WRITTEN else Path(one).name for one in settings.data],
        "template": settings.template,
        "mask_prompt": settings.mask_prompt,
        "held_out_samples": len(held_out),
        "data_fingerprint": fingerprint_samples([*train, *held_out]),
        **settings.model_dump(mode="json", include=decides),
        "trainer": {k: v for k, v in settings.trainer.items() if k not in _ASIDE},
    }
