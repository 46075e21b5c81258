"""What a recovery run starts from: the teacher, the samples, and what an earlier process left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_pruner.checkpoints import atomic_write_text
from llm_pruner.commands.recover_request import DataSettings, RecoverRequest, TeacherSettings
from llm_pruner.commands.recovered import RECORD, finite
from llm_pruner.commands.workdir import RECOVERING, RUN, is_busy, remove_run
from llm_pruner.data.examples import Examples, load_examples
from llm_pruner.data.text import SELF
from llm_pruner.data.training import (
    Samples,
    fingerprint_samples,
    self_made_samples,
    split_samples,
)
from llm_pruner.errors import UserError
from llm_pruner.files.json import read_json
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.loading import load

_CHANGEABLE = ("save_every", "report_to")
"""Settings that a resumed run may have otherwise."""


def read_examples(data: DataSettings) -> dict[str, Examples]:
    """Return the examples of each source but ``self``."""
    return {
        source: load_examples(
            source,
            split=data.split,
            text_field=data.text_field,
            limit=_reading_limit(source, data),
        )
        for source in data.sources
        if source != SELF
    }


def _reading_limit(source: str, data: DataSettings) -> int | None:
    # A local file is read whole and drawn from; of a dataset the beginning is fetched.
    return None if Path(source).expanduser().exists() else data.samples


def load_teacher(teacher: TeacherSettings, student: LoadedModel) -> LoadedModel:
    """Load the dense model.

    Raises:
        UserError: its vocabulary is not the student's.
    """
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


def make_samples(
    request: RecoverRequest,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    examples: dict[str, Examples],
) -> list[Samples]:
    """Return the samples of each source; the dense model writes those of ``self``."""
    data, settings = request.data, request.settings
    samples = []
    for number, source in enumerate(data.sources):
        options: dict[str, Any] = {
            "seq_len": settings.seq_len,
            "limit": data.samples,
            "held_out": data.held_out,
            "seed": settings.seed,
            "source": number,
        }
        if source == SELF:
            assert dense is not None
            writer = hashlib.sha256(dense.fingerprint.encode()).hexdigest()[:16]
            assert request.teacher is not None
            kept = data.kept or (request.teacher.cache or request.work) / f"self-{writer}"
            made = self_made_samples(dense.model, dense.tokenizer, kept, **options)
        else:
            made = split_samples(
                examples[source],
                loaded.tokenizer,
                template=data.template,
                mask_prompt=data.mask_prompt,
                **options,
            )
        samples.append(made)
    return samples


def facts_of(
    request: RecoverRequest,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    samples: Sequence[Samples],
) -> dict[str, Any]:
    """Return all that decides how a run goes."""
    data, distillation = request.data, request.distillation
    train = [one for each in samples for one in each.train]
    held_out = [one for each in samples for one in each.held_out]
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
        **asdict(request.settings),
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
    try:
        old = dict(read_json(file))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged; begin anew with --restart") from error
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
        result = json.loads((out / RECORD).read_text(encoding="utf-8"))
        finished = result["settings"] == finite(asked)
    except (OSError, ValueError, TypeError, KeyError):
        return
    if finished and not is_busy(work):
        with suppress(FileNotFoundError):  # of several processes, one is the first
            remove_run(work, RECOVERING)
