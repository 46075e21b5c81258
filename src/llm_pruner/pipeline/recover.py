"""Load a model and text, train, and save the model only if it became better."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llm_pruner.checkpoints import (
    atomic_directory,
    atomic_write_text,
    check_output,
    save_checkpoint,
)
from llm_pruner.data.examples import Examples, load_examples
from llm_pruner.data.formatting import Template
from llm_pruner.data.text import SELF
from llm_pruner.data.training import (
    Samples,
    fingerprint_samples,
    self_made_samples,
    split_samples,
)
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import (
    EvaluationText,
    PerplexityResult,
    maximum_length,
    perplexity,
)
from llm_pruner.pipeline.evaluate import PerplexitySettings, read_texts
from llm_pruner.pipeline.facts import size_of, source_of
from llm_pruner.pipeline.loading import load
from llm_pruner.pipeline.matmul import multiplies_bfloat16
from llm_pruner.pipeline.recovery_report import (
    course,
    earlier_report,
    in_words,
    recovery_report,
)
from llm_pruner.pipeline.report import page_in, write_report
from llm_pruner.pipeline.settings import ModelSettings
from llm_pruner.pipeline.work import folder_beside
from llm_pruner.planning.plan import read_plan
from llm_pruner.recovery import (
    DistillationSettings,
    Progress,
    RecoverySettings,
    Teacher,
    recover_,
)
from llm_pruner.recovery.hidden import Kept
from llm_pruner.recovery.processes import Processes, joined, own_device
from llm_pruner.report.data import Recovery
from llm_pruner.sources import LoadedModel
from llm_pruner.types import Edits

RECORD = "recovery.json"
"""What a recovered checkpoint says about its recovery."""

_RUN = "run.json"
_CHANGEABLE = ("save_every", "report_to")
"""Settings that a resumed run may have otherwise."""


@dataclass(frozen=True)
class DataSettings:
    """Text to train on.

    Attributes:
        sources: ``self`` for text that the teacher writes, hub datasets, or local files.
        samples: examples of each source, at most; None for all (512 texts of ``self``).
        split: split of hub datasets.
        text_field: field that holds a plain text.
        template: how chats and instructions are written; see ``encode_examples``.
        mask_prompt: learn only the answers.
        held_out: examples of each source that are scored and not trained on; None for one in 20.
        kept: folder that keeps the text of ``self``; by default it goes with the run.
    """

    sources: tuple[str, ...]
    samples: int | None = None
    split: str | None = None
    text_field: str | None = None
    template: Template = "auto"
    mask_prompt: bool = False
    held_out: int | None = None
    kept: Path | None = None


@dataclass(frozen=True)
class TeacherSettings:
    """A dense model to learn from.

    Attributes:
        model: how it is loaded.
        distillation: how it is listened to; None if it only writes text for ``self``.
        cache: folder that keeps what it said; by default it goes with the run.
    """

    model: ModelSettings
    distillation: DistillationSettings | None = field(default_factory=DistillationSettings)
    cache: Path | None = None


@dataclass(frozen=True)
class SourceResult:
    """One source; negative log-likelihood of what is held out of it, in nats a learned token.

    ``loss_before`` is that of the model that came and ``loss_after`` of the one that is saved.
    """

    name: str
    split: str | None
    train_samples: int
    held_out_samples: int
    held_out_tokens: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Recovered:
    """What a run did.

    Attributes:
        model: name of the model.
        gained: whether the held-out loss fell; if not, the saved model is the one that came in.
        loss: held-out loss before and after, in nats for each learned token, by what training
            minimizes: with a teacher, mixed with the distance to it. After is that of the model
            that was trained, whether it was kept or not.
        sources: what each source gave, and how well the text that was held out is foreseen.
        perplexity: the same of each corpus asked for.
        steps: steps that were done.
        best_step: the one whose weights were kept.
        stopped: why it ended early, if it did.
        tokens: tokens trained on.
        seconds: of training, evaluations included, earlier processes too.
        trained: number of parameters that were trained.
        parameters: all parameters.
        packed: whether samples shared rows; else they were padded in buckets of like length.
        losses: training loss of each step.
        evaluations: (step, held-out loss), in order.
        kind: how the checkpoint loads.
        path: the folder.
        bytes: its size.
        needs: what loading it needs besides transformers, such as ``import llm_pruner``.
        settings: what was asked for.
        report: the page that shows all this; None if none was written.
    """

    model: str
    gained: bool
    loss: tuple[float, float]
    sources: tuple[SourceResult, ...]
    perplexity: tuple[tuple[PerplexityResult, PerplexityResult], ...]
    steps: int
    best_step: int
    stopped: str | None
    tokens: int
    seconds: float
    trained: int
    parameters: int
    packed: bool
    losses: list[float]
    evaluations: list[tuple[int, float]]
    kind: Literal["stock", "recipe"]
    path: Path
    bytes: int
    needs: tuple[str, ...]
    settings: dict[str, Any]
    report: Path | None = None


def recover_checkpoint(
    model: ModelSettings,
    out: Path,
    data: DataSettings,
    settings: RecoverySettings,
    *,
    teacher: TeacherSettings | None = None,
    texts: Sequence[str] = (),
    text_settings: PerplexitySettings | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    keep_adapter: bool = False,
    max_shard_size: str = "5GB",
    say: Callable[[Progress], None] = lambda _: None,
    command: str | None = None,
) -> Recovered:
    """Train a checkpoint and save the result as a folder that loads as the input does.

    While it runs, checkpoints lie in a folder beside ``out``, see ``work_folder``, which goes away
    at the end.

    Of several processes that a launcher started, each calls this with the same arguments. The first
    one writes, and the others return the same without perplexities and what the folder is like.

    Args:
        model: what to train, pruned or not.
        out: the folder to write.
        data: text to train on.
        settings: how to train.
        teacher: the dense model, for distillation and for ``self``.
        texts: corpora whose perplexity is measured before and after.
        text_settings: how it is measured.
        resume: go on with an interrupted run of ``out``; if there is none, begin.
        restart: throw an interrupted run away.
        overwrite: replace what ``out`` holds.
        keep_adapter: with ``lora``, save the adapter in the subfolder ``adapter``; it belongs to
            the model that came in.
        max_shard_size: largest weight file.
        say: called after each step.
        command: the command line of this run, for the report.

    Raises:
        UserError: something that was given must change; ``out`` is as it was.
    """
    settings.check()
    model = replace(model, device=own_device(model.device))
    if settings.bf16 is None:
        fast = model.dtype == "float32" and multiplies_bfloat16(model.device)
        settings = replace(settings, bf16=fast)
    if teacher is not None:
        device = own_device(teacher.model.device)
        teacher = replace(teacher, model=replace(teacher.model, device=device))
    work = work_folder(out)
    with joined(model.device) as processes:
        found = work.exists()
        try:
            return _recover(
                model,
                out,
                data,
                settings,
                teacher,
                texts,
                text_settings,
                resume,
                restart,
                overwrite,
                keep_adapter,
                max_shard_size,
                say,
                work,
                command,
                processes,
            )
        except UserError:
            if processes.is_first and not found and _holds_nothing(work):
                shutil.rmtree(work)
            raise


def _recover(
    model: ModelSettings,
    out: Path,
    data: DataSettings,
    settings: RecoverySettings,
    teacher: TeacherSettings | None,
    texts: Sequence[str],
    text_settings: PerplexitySettings | None,
    resume: bool,
    restart: bool,
    overwrite: bool,
    keep_adapter: bool,
    max_shard_size: str,
    say: Callable[[Progress], None],
    work: Path,
    command: str | None,
    processes: Processes,
) -> Recovered:
    _check(model, out, data, settings, teacher, resume, restart, overwrite, keep_adapter, work)
    processes.barrier()  # from here on, the folders that were looked at may change
    with processes.first():
        corpora = read_texts(texts, text_settings or PerplexitySettings())
        examples = {
            source: load_examples(
                source,
                split=data.split,
                text_field=data.text_field,
                limit=_reading_limit(source, data),
            )
            for source in data.sources
            if source != SELF
        }
    loaded = load(model)
    longest = maximum_length(loaded.model)
    if longest is not None and settings.seq_len > longest:
        raise UserError(
            f"--seq-len {settings.seq_len} is longer than the model's maximum; "
            f"use {longest} or less"
        )
    dense = None if teacher is None else _load_teacher(teacher, loaded)
    if restart and processes.is_first:
        shutil.rmtree(work, ignore_errors=True)
    with processes.first():  # it writes what the others read
        samples = _samples(loaded, dense, examples, data, settings, work)
        train = [one for each in samples for one in each.train]
        held_out = [one for each in samples for one in each.held_out]
        about = _about(loaded, dense, train, held_out, data, settings, teacher)
        _begin_or_go_on(work, about, resume, processes.is_first)
    if not processes.is_first:
        corpora = []
    before = _perplexities(loaded, corpora, text_settings)
    listening = judge = None
    if teacher is not None and dense is not None and teacher.distillation is not None:
        with processes.first():
            listening, judge = (
                Teacher(
                    dense.model,
                    some,
                    teacher.distillation,
                    teacher.cache or work / "teacher",
                    identity=dense.fingerprint,
                    seq_len=settings.seq_len,
                    kept=_kept(model) if teacher.distillation.hidden else None,
                )
                for some in (train, held_out)
            )
    adapter = work / "adapter" if keep_adapter else None
    network, outcome = recover_(
        loaded.model,
        train,
        held_out,
        settings,
        work=work,
        folder=lambda path: atomic_directory(path, overwrite=False),
        sources=len(samples),
        teacher=listening,
        judge=judge,
        say=say,
        keep_adapter=adapter,
        processes=processes,
    )
    if not outcome.gained and processes.is_first:
        network = load(model).model  # as it came, to the last bit
    kept = LoadedModel(network, loaded.tokenizer, loaded.name, loaded.revision, loaded.fingerprint)
    after = _perplexities(kept, corpora, text_settings) if outcome.gained else before
    result = Recovered(
        model=loaded.name,
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
                (outcome.after if outcome.gained else outcome.before).by_source[number],
            )
            for number, each in enumerate(samples)
        ),
        perplexity=tuple(zip(before, after, strict=True)),
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
        path=out,
        bytes=0,
        needs=(),
        settings=about,
    )

    if not processes.is_first:
        processes.barrier()
        return result
    earlier = earlier_report(model.source)
    teacher_name = None if dense is None else dense.name

    def beside(folder: Path, kind: Literal["stock", "recipe"], needs: tuple[str, ...]) -> None:
        record = {
            key: value
            for key, value in asdict(result).items()
            if key not in ("kind", "path", "bytes", "needs", "report")
        }
        text = json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8", newline="\n")
        if adapter is not None and outcome.gained:
            shutil.copytree(adapter, folder / "adapter")
        write_report(
            folder,
            recovery_report(
                earlier,
                source=source_of(model.source, loaded.name, loaded.revision, network),
                pruned=plan_json is not None,
                size=size_of(network),
                recovery=Recovery(
                    loss=tuple(course(result.losses, result.evaluations)),
                    seconds=result.seconds,
                    summary=in_words(
                        about,
                        [(each.name, each.train_samples) for each in result.sources],
                        result.steps,
                        teacher_name,
                    ),
                    gained=result.gained,
                ),
                perplexity=result.perplexity,
                settings=about,
                saved_as=kind,
                needs=needs,
                command=command,
            ),
        )

    plan = _plan_file(model)
    plan_json = None if plan is None else plan.read_text(encoding="utf-8")
    saved = save_checkpoint(
        network,
        out,
        edits=Edits({}, {}, {}, {}),
        plan_json=plan_json,
        tokenizer=loaded.tokenizer,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        beside=beside,
    )
    shutil.rmtree(work, ignore_errors=True)
    processes.barrier()
    return replace(
        result,
        kind=saved.kind,
        bytes=saved.bytes,
        needs=saved.needs,
        report=page_in(saved.path),
    )


def _holds_nothing(work: Path) -> bool:
    """Whether nothing was done that is worth going on with."""
    return work.is_dir() and {path.name for path in work.iterdir()} <= {_RUN}


def work_folder(out: Path) -> Path:
    """Return the folder of a run that will end in ``out``: its name and ``.recovering``."""
    return folder_beside(out, "recovering")


def _check(
    model: ModelSettings,
    out: Path,
    data: DataSettings,
    settings: RecoverySettings,
    teacher: TeacherSettings | None,
    resume: bool,
    restart: bool,
    overwrite: bool,
    keep_adapter: bool,
    work: Path,
) -> None:
    """Refuse what can be refused without reading anything."""
    check_output(out, overwrite)
    named = {"the model that is to be recovered": model.source}
    if teacher is not None:
        named["the teacher"] = teacher.model.source
        if teacher.distillation is not None:
            teacher.distillation.check()
    for what, source in named.items():
        if out.exists() and out.resolve() == Path(source).expanduser().resolve():
            raise UserError(f"{out} is {what}; give another --out")
    if not data.sources:
        raise UserError("no data given; use --data SRC")
    if SELF in data.sources and teacher is None:
        raise UserError(
            "--data self is text that the dense model writes; name that model with --teacher"
        )
    if data.samples is not None and data.samples < 2:
        raise UserError(
            f"--samples {data.samples} leaves nothing to train on or to judge by; use 2 or more"
        )
    if keep_adapter and settings.method != "lora":
        raise UserError(
            f"method {settings.method} has no adapter to keep; leave --keep-adapter out"
        )
    if keep_adapter and settings.lora.start != "default":
        raise UserError(
            f"an adapter that started from {settings.lora.start} fits no model that is saved; "
            "leave out --keep-adapter or --lora-start"
        )
    if resume and restart:
        raise UserError("--resume and --restart say different things; give one of them")
    if work.exists() and not (resume or restart):
        raise UserError(
            f"{work.name} holds a run that was interrupted; go on with --resume, or throw it away "
            "with --restart"
        )


def _reading_limit(source: str, data: DataSettings) -> int | None:
    # A local file is read whole and drawn from; of a dataset the beginning is fetched.
    return None if Path(source).expanduser().exists() else data.samples


def _load_teacher(teacher: TeacherSettings, student: LoadedModel) -> LoadedModel:
    dense = load(teacher.model)
    assert dense.tokenizer is not None
    assert student.tokenizer is not None
    ours, theirs = (
        int(one.model.get_input_embeddings().weight.shape[0]) for one in (student, dense)
    )
    if ours != theirs or student.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise UserError(
            f"{dense.name} has another vocabulary ({theirs} tokens) than {student.name} ({ours}); "
            "name the dense model that the student was cut from"
        )
    return dense


def _samples(
    loaded: LoadedModel,
    dense: LoadedModel | None,
    examples: dict[str, Examples],
    data: DataSettings,
    settings: RecoverySettings,
    work: Path,
) -> list[Samples]:
    samples = []
    for number, source in enumerate(data.sources):
        if source == SELF:
            assert dense is not None
            writer = hashlib.sha256(dense.fingerprint.encode()).hexdigest()[:16]
            made = self_made_samples(
                dense.model,
                dense.tokenizer,
                data.kept or work / f"self-{writer}",
                seq_len=settings.seq_len,
                limit=data.samples,
                held_out=data.held_out,
                seed=settings.seed,
                source=number,
            )
        else:
            made = split_samples(
                examples[source],
                loaded.tokenizer,
                seq_len=settings.seq_len,
                template=data.template,
                mask_prompt=data.mask_prompt,
                limit=data.samples,
                held_out=data.held_out,
                seed=settings.seed,
                source=number,
            )
        samples.append(made)
    return samples


def _about(
    loaded: LoadedModel,
    dense: LoadedModel | None,
    train: Sequence[Any],
    held_out: Sequence[Any],
    data: DataSettings,
    settings: RecoverySettings,
    teacher: TeacherSettings | None,
) -> dict[str, Any]:
    """Return all that decides how a run goes."""
    distillation = None if teacher is None else teacher.distillation
    return {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "teacher": None if dense is None else dense.name,
        "teacher_fingerprint": None if dense is None else dense.fingerprint,
        "distillation": None if distillation is None else asdict(distillation),
        "data": [source if source == SELF else Path(source).name for source in data.sources],
        "template": data.template,
        "mask_prompt": data.mask_prompt,
        "data_fingerprint": fingerprint_samples([*train, *held_out]),
        **asdict(settings),
    }


def _begin_or_go_on(work: Path, about: dict[str, Any], resume: bool, writes: bool) -> None:
    file = work / _RUN
    if not (resume and file.is_file()):
        if writes:
            atomic_write_text(file, json.dumps(about, indent=2) + "\n")
        return
    try:
        old = dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file} is damaged; begin anew with --restart") from error
    for key, value in about.items():
        if key not in _CHANGEABLE and old.get(key) != json.loads(json.dumps(value)):
            raise UserError(
                f"the interrupted run has {key}={old.get(key)} and this one {key}={value}; give "
                "the same options, or begin anew with --restart"
            )


def _perplexities(
    loaded: LoadedModel, corpora: Sequence[EvaluationText], settings: PerplexitySettings | None
) -> list[PerplexityResult]:
    settings = settings or PerplexitySettings()
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


def finite(value: Any) -> Any:
    """Return plain values in which what is infinite, which JSON has no number for, is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value
