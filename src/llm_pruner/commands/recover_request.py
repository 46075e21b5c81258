"""What a recovery run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from llm_pruner.commands.evaluate import PerplexitySettings
from llm_pruner.commands.workdir import RECOVERING, busy, check_ours, folder_beside, is_busy
from llm_pruner.data.formatting import Template
from llm_pruner.data.text import SELF
from llm_pruner.errors import UserError
from llm_pruner.files.disk import tidy
from llm_pruner.files.outputs import Source, check_output
from llm_pruner.files.places import check_place, check_shard_size
from llm_pruner.recovery import DistillationSettings, RecoverySettings
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import MOST, check_number


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
        cache: folder that keeps what it wrote and said; by default it goes with the run.
    """

    model: ModelSettings
    distillation: DistillationSettings | None = field(default_factory=DistillationSettings)
    cache: Path | None = None


@dataclass(frozen=True)
class RecoverRequest:
    """A run: what is trained, on what, how, and where the result goes.

    Attributes:
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
        shard: have each of several processes hold a part of the model only.
        command: the command line of this run, for the report.
    """

    model: ModelSettings
    out: Path
    data: DataSettings
    settings: RecoverySettings
    teacher: TeacherSettings | None = None
    texts: tuple[str, ...] = ()
    text_settings: PerplexitySettings = field(default_factory=PerplexitySettings)
    resume: bool = False
    restart: bool = False
    overwrite: bool = False
    keep_adapter: bool = False
    max_shard_size: str = "5GB"
    shard: bool = False
    command: str | None = None

    @property
    def work(self) -> Path:
        """The folder of the run while it goes on."""
        return work_folder(self.out)

    @property
    def distillation(self) -> DistillationSettings | None:
        """How the teacher is listened to; None if nobody is."""
        return None if self.teacher is None else self.teacher.distillation

    @property
    def reads(self) -> list[Source]:
        """All that the run reads."""
        teacher = self.teacher
        taught = () if teacher is None else (teacher.model.source, teacher.cache)
        return [self.model.source, *taught, *self.data.sources, *self.texts]

    def check(self) -> None:
        """Refuse what can be refused without reading anything.

        Raises:
            UserError: says what must change.
        """
        self.settings.check()
        check_place(self.out, "--out")
        check_output(self.out, self.overwrite, self.reads)
        check_shard_size(self.max_shard_size)
        if self.distillation is not None:
            self.distillation.check()
        if self.teacher is not None and self.teacher.cache is not None:
            check_place(self.teacher.cache / "cache", "--teacher-cache")
        self._check_data()
        self._check_adapter()
        self._check_shards()
        if self.resume and self.restart:
            raise UserError("--resume and --restart say different things; give one of them")
        tidy(self.work)
        check_ours(self.work, RECOVERING)
        if is_busy(self.work):
            raise busy(self.work)
        if self.work.exists() and not (self.resume or self.restart):
            raise UserError(
                f"{self.work.name} holds a run that was interrupted; go on with --resume, or throw "
                "it away with --restart"
            )

    def _check_data(self) -> None:
        data = self.data
        if not data.sources:
            raise UserError("no data given; use --data SRC")
        if data.template not in get_args(Template):
            raise UserError(
                f"template {data.template!r} is unknown; use one of {', '.join(get_args(Template))}"
            )
        if data.held_out is not None and data.held_out < 1:
            raise UserError(
                f"--held-out {data.held_out} leaves nothing to judge by; use at least 1"
            )
        if SELF in data.sources and self.teacher is None:
            raise UserError(
                "--data self is text that the dense model writes; name that model with --teacher"
            )
        if data.samples is not None and data.samples < 2:
            raise UserError(
                f"--samples {data.samples} leaves nothing to train on or to judge by; use 2 or more"
            )
        check_number("--samples", data.samples, 2, MOST)

    def _check_adapter(self) -> None:
        if not self.keep_adapter:
            return
        method, start = self.settings.method, self.settings.lora.start
        if method != "lora":
            raise UserError(f"method {method} has no adapter to keep; leave --keep-adapter out")
        if start != "default":
            raise UserError(
                f"an adapter that started from {start} fits no model that is saved; leave out "
                "--keep-adapter or --lora-start"
            )

    def _check_shards(self) -> None:
        if not self.shard:
            return
        lora = self.settings.lora
        if self.settings.method == "lora" and (lora.dora or lora.start != "default"):
            raise UserError(
                "--dora and --lora-start read whole weights, and --shard (FSDP) spreads them; give "
                "one or the other"
            )


def work_folder(out: Path) -> Path:
    """Return the folder of a run that will end in ``out``: its name and ``.recovering``."""
    return folder_beside(out, "recovering")
