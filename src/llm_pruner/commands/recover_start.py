"""What a recovery run starts from: the teacher, the samples, and what an earlier process left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from llm_pruner.checkpoints import atomic_write_text
from llm_pruner.commands.workdir import (
    RECOVERING,
    RUN,
    busy,
    check_ours,
    is_busy,
    read_values,
    remove_run,
)
from llm_pruner.data.examples import Examples, load_examples
from llm_pruner.data.text import SELF
from llm_pruner.data.training import Samples, fingerprint_samples, self_made_samples, split_samples
from llm_pruner.errors import UserError
from llm_pruner.files.disk import tidy
from llm_pruner.files.outputs import check_output, check_place, check_shard_size
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.recovery.trainer import trainer_arguments
from llm_pruner.report.records import RECOVERY_FILE
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import MOST, check_number
from llm_pruner.settings.recover import DataSettings, RecoverSettings, TrainingSettings

_CHANGEABLE = ("save_every", "report_to")
"""Settings that a resumed run may have otherwise."""


_HOW_FAST = ("packing", "kernels")
"""Settings of which the result does not depend but for rounding."""


def check_run(settings: RecoverSettings, work: Path) -> None:
    """Refuse what can be refused without reading anything.

    Args:
        settings: what is asked for.
        work: folder of the run.

    Raises:
        UserError: says what must change.
    """
    settings.check()
    trainer_arguments(settings)
    check_output(settings.out, settings.overwrite, settings.reads)
    check_shard_size(settings.max_shard_size)
    if settings.distils:
        settings.check_teacher()
    if settings.teacher_cache is not None:
        if settings.teacher is None:
            raise UserError(
                f"--teacher-cache {settings.teacher_cache} keeps what a teacher says; name that "
                "with --teacher, or leave it out"
            )
        check_place(settings.teacher_cache / "cache", "--teacher-cache")
    _check_data(settings)
    if settings.keep_adapter and settings.method != "lora":
        raise UserError(
            f"method {settings.method} has no adapter to keep; leave --keep-adapter out"
        )
    if settings.resume and settings.restart:
        raise UserError("--resume and --restart say different things; give one of them")
    tidy(work)
    check_ours(work, RECOVERING)
    if is_busy(work):
        raise busy(work)
    if work.exists() and not (settings.resume or settings.restart):
        raise UserError(
            f"{work.name} holds a run that was interrupted; go on with --resume, or throw "
            "it away with --restart"
        )


def _check_data(settings: RecoverSettings) -> None:
    if not settings.data:
        raise UserError("no data given; use --data SRC")
    if settings.held_out is not None and settings.held_out < 1:
        raise UserError(
            f"--held-out {settings.held_out} leaves nothing to judge by; use at least 1"
        )
    if SELF in settings.data and settings.teacher is None:
        raise UserError(
            "--data self is text that the dense model writes; name that model with --teacher"
        )
    if settings.samples is not None and settings.samples < 2:
        raise UserError(
            f"--samples {settings.samples} leaves nothing to train on or to judge by; use 2 or more"
        )
    check_number("--samples", settings.samples, 2, MOST)


def read_examples(data: DataSettings) -> dict[str, Examples]:
    """Return the examples of each source but ``self``."""
    return {
        source: load_examples(
            source,
            split=data.split,
            text_field=data.text_field,
            limit=data.samples,
        )
        for source in data.data
        if source != SELF
    }


def load_teacher(teacher: ModelSettings, student: LoadedModel) -> LoadedModel:
    """Load the dense model.

    Raises:
        UserError: its vocabulary is not the student's.
    """
    dense = load(teacher)
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


def make_samples(
    settings: RecoverSettings,
    work: Path,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    examples: dict[str, Examples],
) -> list[Samples]:
    """Return the samples of each source; the dense model writes those of ``self``."""
    samples = []
    for number, source in enumerate(settings.data):
        options: dict[str, Any] = {
            "seq_len": settings.seq_len,
            "limit": settings.samples,
            "held_out": settings.held_out,
            "seed": settings.seed,
            "source": number,
        }
        if source == SELF:
            assert dense is not None
            writer = hashlib.sha256(dense.fingerprint.encode()).hexdigest()[:16]
            kept = settings.kept or (settings.teacher_cache or work) / f"self-{writer}"
            made = self_made_samples(dense.model, dense.tokenizer, kept, **options)
        else:
            made = split_samples(
                examples[source],
                loaded.tokenizer,
                template=settings.template,
                mask_prompt=settings.mask_prompt,
                **options,
            )
        samples.append(made)
    return samples


def facts_of(
    settings: RecoverSettings,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    samples: Sequence[Samples],
) -> dict[str, Any]:
    """Return all that decides how a run goes."""
    decides = set(TrainingSettings.model_fields) - set(_HOW_FAST)
    training = settings.model_dump(mode="json", include=decides)
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
        "data": [source if source == SELF else Path(source).name for source in settings.data],
        "template": settings.template,
        "mask_prompt": settings.mask_prompt,
        "data_fingerprint": fingerprint_samples([*train, *held_out]),
        **training,
    }


def begin_or_go_on(work: Path, facts: dict[str, Any], *, resume: bool, writes: bool) -> None:
    """Write what a run is asked to do, or compare it with what the interrupted one was.

    Args:
        work: folder of the run.
        facts: as from ``facts_of``.
        resume: go on with what is there.
        writes: whether this process does.

    Raises:
        UserError: the interrupted run was asked for something else.
    """
    file = work / RUN
    if not (resume and file.is_file()):
        if writes:
            atomic_write_text(file, json.dumps(facts, indent=2) + "\n")
        return
    old = read_values(file)
    for key, value in facts.items():
        if key not in _CHANGEABLE and old.get(key) != json.loads(json.dumps(value)):
            raise UserError(
                f"the interrupted run has {key}={old.get(key)} and this one {key}={value}; give "
                "the same options, or begin anew with --restart"
            )


def remove_finished(work: Path, out: Path) -> None:
    """Remove a run that was killed after its result took its place."""
    try:
        asked = json.loads((work / RUN).read_text(encoding="utf-8"))
        result = json.loads((out / RECOVERY_FILE).read_text(encoding="utf-8"))
        finished = result["settings"] == to_jsonable_python(asked, inf_nan_mode="null")
    except (OSError, ValueError, TypeError, KeyError):
        return
    if finished and not is_busy(work):
        with suppress(FileNotFoundError):  # of several processes, one is the first
            remove_run(work, RECOVERING)
