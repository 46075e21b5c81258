"""What a report says, as plain data: the content of ``report.json``.

Every part may be absent, and a part that is absent is not shown. The parts hold what was measured
and no text made from it, so that pages of a later version can be drawn from an old file.
"""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llm_pruner.errors import UserError
from llm_pruner.files.disk import read_json
from llm_pruner.report.text import (
    count,
    in_percent,
    measured,
    megabytes,
    number,
    percent,
    points,
    safe_json,
    visible,
)
from llm_pruner.types import Layer, Size, SplitTrial

FORMAT_VERSION: Literal[1] = 1
JSON_FILE, HTML_FILE, CARD_FILE = "report.json", "report.html", "README.md"

Variant = Literal["dense", "trimmed", "pruned", "recovered", "quantized"]
"""The model before, without some of its tokens, after removing units, after training what was left,
and with packed weights."""

SavedAs = Literal["stock", "remote_code", "recipe"]
"""``stock`` if a plain config describes a checkpoint, ``remote_code`` if our code lies there, and
``recipe`` if only this package reads it."""

VARIANTS: tuple[Variant, ...] = ("dense", "trimmed", "pruned", "recovered", "quantized")

BITS = "bits per byte"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        return _each_text(data)


def _each_text(data: Any) -> Any:
    """Return data with all its texts, keys included, made ``visible``."""
    if is_dataclass(data):
        data = vars(data)
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, dict):
        return {_each_text(key): _each_text(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_each_text(item) for item in data]
    return data


class Source(_Part):
    """The dense model.

    Attributes:
        name: hub id, or name of the folder or file.
        hub_id: the same where the model came from the hub, else None.
        license: identifier of its licence as the hub spells it, if known.
        fingerprint: of shapes, config and weights, see ``models.load.fingerprint``, if known.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    license: str | None = None
    fingerprint: str | None = None


class ImportanceRow(_Part):
    """Importance of the units of one group, sorted and averaged in bins of equally many units.

    Attributes:
        layer: number of the layer, or None.
        bins: mean importance in each bin, ascending; None where it is not finite.
    """

    layer: int | None
    units: int
    removed: int
    bins: tuple[float | None, ...]


class ImportanceMap(_Part):
    """Importance of all groups of one kind that were scored; higher means keep."""

    kind: str
    rows: tuple[ImportanceRow, ...]


class _Result(_Part):
    """One number that was measured; ``same`` names the fields that tell what it is of."""

    same: ClassVar[tuple[str, ...]]
    later: ClassVar[tuple[str, ...]] = ()
    """Those of ``same`` that earlier versions did not write."""

    def is_earlier(self, other: _Result) -> bool:
        """Whether another result is of the same, measured again."""
        both = zip(self.same, self.key, other.key, strict=True)
        return all(
            mine == theirs or (mine is None and name in self.later) for name, mine, theirs in both
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What must agree before two results may be compared."""
        return tuple(getattr(self, name) for name in self.same)


class Perplexity(_Result):
    """What is shown of ``evaluation.perplexity.PerplexityResult``; None is like nothing known."""

    model_config = ConfigDict(extra="ignore")
    same: ClassVar = ("corpus", "split", "protocol", "window", "tokens", "dtype", "ids_digest")

    perplexity: float
    stderr: float | None = None
    corpus: str
    split: str | None = None
    protocol: str | None = None
    window: int | None = None
    tokens: int | None = None
    bits_per_byte: float | None = None
    dtype: str | None = None
    max_tokens: int | None = None
    ids_digest: str | None = None
    text_digest: str | None = None

    @property
    def name(self) -> str:
        """The corpus with its split."""
        return self.corpus if self.split is None else f"{self.corpus}, {self.split}"

    @property
    def settings(self) -> str:
        """What a reader needs to compare it, in words."""
        parts = [
            None if self.protocol is None else f"{self.protocol} protocol",
            None if self.window is None else f"windows of {self.window:,}",
            None if self.tokens is None else f"{self.tokens:,} tokens",
            self.dtype,
        ]
        return ", ".join(part for part in parts if part)

    @property
    def label(self) -> str:
        """The row of a table."""
        return f"{self.name} ({self.settings})" if self.settings else self.name

    def __str__(self) -> str:
        return measured(self.perplexity, self.stderr)

    def since(self, dense: Perplexity) -> tuple[str, bool | None]:
        """Return the change from the dense model, and whether it is for the better."""
        if not dense.perplexity or not math.isfinite(self.perplexity / dense.perplexity):
            return "", None
        return f"× {self.perplexity / dense.perplexity:.2f}", self.perplexity <= dense.perplexity


class TaskScore(_Result):
    """One metric of one task, between 0 and 1.

    Attributes:
        in_mean: whether the mean over the tasks takes this metric.
        items: number of items, None if not known; so are the version of the task's definition, the
            examples in a prompt, the digest of the items, and the type that it was computed in.
    """

    same: ClassVar = ("task", "metric", "items", "version", "shots", "digest", "dtype")
    later: ClassVar = ("dtype",)

    task: str
    metric: str
    value: float
    stderr: float | None = None
    items: int | None = None
    in_mean: bool = True
    version: str | None = None
    shots: int | None = None
    digest: str | None = None
    dtype: str | None = None

    @property
    def name(self) -> str:
        """The task."""
        return self.task

    @property
    def settings(self) -> str:
        """What a reader needs to compare it, in words."""
        return ", ".join((f"{self.metric} in percent", *self._how))

    @property
    def label(self) -> str:
        """The row of a table."""
        how = f" ({', '.join(self._how)})" if self._how else ""
        return f"{self.task}, {self.metric}{how}"

    @property
    def _how(self) -> list[str]:
        counts = (("items", self.items), ("shots", self.shots or None))
        said = [f"{number:,} {name}" for name, number in counts if number is not None]
        return said if self.dtype is None else [*said, self.dtype]

    def __str__(self) -> str:
        """Return it in percent."""
        return in_percent(self.value, self.stderr)

    def since(self, dense: TaskScore) -> tuple[str, bool | None]:
        """Return the change from the dense model, and whether it is for the better."""
        return points(self.value - dense.value)


class Measurement(_Result):
    """A size, a speed, a mean or a share, and the spread around it.

    Attributes:
        name: what was measured, with the settings that tell it apart, such as ``decode, batch 1``.
        unit: such as ``tokens/s``, ``B`` or ``MACs``.
        low, high: the spread: of a speed, a median, the slowest and the fastest round; of a mean or
            a share one standard error either way.
        better: whether more is better; None if neither.
        of: digest of what it was measured on, such as a text or problems; None if nothing is known.
    """

    same: ClassVar = ("name", "unit", "of")
    later: ClassVar = ("of",)

    name: str
    unit: str = ""
    value: float
    low: float | None = None
    high: float | None = None
    better: Literal["higher", "lower"] | None = None
    of: str | None = None

    @property
    def label(self) -> str:
        """The name with the unit, where the number does not bring its own."""
        return self.name if self.unit in ("", "B", "MACs") else f"{self.name}, {self.unit}"

    def __str__(self) -> str:
        """Return the value in units of a fitting size."""
        return self._shown(self.value)

    @property
    def spread(self) -> str:
        """The value with the spread around it, where it is known."""
        if self.low is None or self.high is None:
            return str(self)
        return f"{self} ({self._shown(self.low)} to {self._shown(self.high)})"

    def _shown(self, value: float) -> str:
        if self.unit == "B":
            return megabytes(value) if value >= 1e5 else f"{value:,.0f} B"
        if self.unit == BITS:
            return f"{value:.4f}"
        return f"{count(value)} MACs" if self.unit == "MACs" else number(value)

    def since(self, dense: Measurement) -> tuple[str, bool | None]:
        """Return the change from the dense model, and whether it is for the better."""
        if not dense.value:
            return "", None
        ratio = self.value / dense.value
        neither = dense.better is None or ratio == 1
        return f"× {ratio:.2f}", None if neither else (ratio > 1) == (dense.better == "higher")


class Evaluation(_Part):
    """All that was measured of one model; ``samples`` maps prompts to what it wrote after them."""

    perplexity: tuple[Perplexity, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    samples: dict[str, str] = {}

    def per_byte(self) -> Evaluation:
        """Return it for a reader who compares models of different tokens, which perplexity cannot.

        In its place stand bits per byte, where they are known. They have other numbers of tokens of
        a text, so those that were asked for are told.
        """
        bits = (
            Measurement(
                name=one.model_copy(update={"tokens": one.max_tokens}).label,
                unit=BITS,
                value=one.bits_per_byte,
                better="lower",
                of=one.text_digest,
            )
            for one in self.perplexity
            if one.bits_per_byte is not None
        )
        changed = {"perplexity": (), "measurements": (*bits, *self.measurements)}
        return self.model_copy(update=changed)

    def with_newer(self, newer: Evaluation) -> Evaluation:
        """Return both; of what was measured twice with the same settings, the newer."""

        def both(part: str) -> tuple[Any, ...]:
            results: list[Any] = []
            for new in (*getattr(self, part), *getattr(newer, part)):
                first, *others = [i for i, one in enumerate(results) if one.is_earlier(new)] or [
                    len(results)
                ]
                results[first : first + 1] = [new]
                for i in reversed(others):
                    del results[i]
            return tuple(results)

        parts = {part: both(part) for part in ("perplexity", "tasks", "measurements")}
        return Evaluation(**parts, samples=self.samples | newer.samples)


class LossPoint(_Part):
    """Loss in nats per token after a step of training."""

    step: int
    train: float | None = None
    validation: float | None = None


class ControlRow(_Part):
    """One model of a control on one text; KL in nats from the dense model, which has none."""

    model: str
    perplexity: float
    stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    changed: float | None = None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What a table says of it, see ``ControlText.columns``."""
        kl = "-" if self.kl is None else measured(self.kl, self.kl_stderr, ".3f")
        changed = "-" if self.changed is None else percent(self.changed)
        return self.model, measured(self.perplexity, self.stderr), kl, changed


class ControlText(_Part):
    """The dense and the pruned model, each with and without the same training, on one text.

    ``damage``: perplexity of pruned + training as a ratio to dense + training.
    """

    columns: ClassVar = ("model", "perplexity", "KL, nats", "changed")

    text: str
    rows: tuple[ControlRow, ...]
    damage: float


class Recovery(_Part):
    """Training after the removal.

    Attributes:
        summary: method and data in words that follow "recovered by", such as
            ``LoRA of rank 8 on 2,000 examples of alpaca``.
        gained: whether its result was kept; if not, the model is as it came.
        control: the dense model with the same training beside it, on each text.
    """

    loss: tuple[LossPoint, ...] = ()
    seconds: float | None = None
    summary: str | None = None
    gained: bool = True
    control: tuple[ControlText, ...] = ()


class Report(_Part):
    """All that a run did and measured.

    Attributes:
        layers: what is left of each layer.
        importance: one map per kind of unit; scores of the first estimate, on the dense model.
        criterion: how importance was estimated, in words that follow "chosen by".
        compensation: how the weights that were kept were refitted, such as ``least-squares``.
        repair: how they were trained by what the dense model says, in words that follow "repaired
            by"; None if they were not, or without a gain.
        twin_difference, twin_scenes, twin_skipped, saved_as, needs: as in
            `records.Pruned`.
        tokens: that the dense model and this one have; None where all stayed.
        settings: heading -> setting -> value.
        card_digest: SHA-256 of the model card that was written with this report, by which a card
            that was edited since is told apart.
    """

    format_version: Literal[1] = FORMAT_VERSION
    source: Source
    sizes: dict[Variant, Size] = {}
    layers: tuple[Layer, ...] = ()
    importance: tuple[ImportanceMap, ...] = ()
    criterion: str | None = None
    compensation: str | None = None
    repair: str | None = None
    trials: tuple[SplitTrial, ...] = ()
    twin_difference: float | None = None
    twin_scenes: tuple[str, ...] = ()
    twin_skipped: tuple[str, ...] = ()
    saved_as: SavedAs | None = None
    needs: tuple[str, ...] = ()
    seconds: dict[str, float] = {}
    evaluations: dict[Variant, Evaluation] = {}
    recovery: Recovery | None = None
    tokens: tuple[int, int] | None = None
    settings: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    command: str | None = None
    card_digest: str | None = None

    @property
    def final(self) -> Variant:
        """The model that lies beside the report."""
        if "quantized" in self.sizes:
            return "quantized"
        if self.recovery is not None and self.recovery.gained:
            return "recovered"
        return "pruned" if self.was_pruned else "dense"

    @property
    def was_pruned(self) -> bool:
        """Whether it knows of a removal, or else of training alone."""
        return bool(
            self.recovery is None
            or self.criterion
            or self.layers
            or "pruned" in {*self.sizes, *self.evaluations}
        )

    def with_evaluation(self, variant: Variant, found: Evaluation) -> Report:
        """Return a report that also holds what was measured of one model."""
        old = self.evaluations.get(variant, Evaluation())
        evaluations = {**self.evaluations, variant: old.with_newer(found)}
        ordered = {name: evaluations[name] for name in VARIANTS if name in evaluations}
        return self.model_copy(update={"evaluations": ordered})

    def to_json(self) -> str:
        """Return the content of ``report.json``."""
        return safe_json(json.loads(self.model_dump_json()))


def read_report(file: Path) -> Report:
    """Return the report in a file; UserError if there is none of this version."""
    try:
        data = read_json(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{file} cannot be read: {reason}; prune again to write it anew") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {ascii(version)[:40]}, and this version of llm-pruner "
            f"reads {FORMAT_VERSION}; use the version that wrote it, or prune again"
        )
    try:
        return Report.model_validate(_upgraded(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(str(part) for part in first["loc"]).split())[:200]
        wrong = f"{where}: {first['msg']}"
    except RecursionError:
        wrong = "it is nested too deeply"
    raise UserError(f"{file} is no report: {wrong}; prune again to write it anew")


def report_in(folder: Path) -> Report:
    """Return the report of a folder; raise UserError if there is none that can be read."""
    file = folder / JSON_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {JSON_FILE}; name a folder that llm-pruner prune wrote")
    return read_report(file)


def known_report(folder: Path) -> Report | None:
    """Return the report of a folder; None if there is none that can be read."""
    try:
        return report_in(folder)
    except UserError:
        return None


_HEADINGS = {"Selection": "Where from"}
"""Heading of settings in reports of earlier versions -> its name now."""


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a report of an earlier version as this one writes it."""
    data.pop("searches", None)  # between layers
    settings = data.get("settings")
    if isinstance(settings, dict):
        data["settings"] = {_HEADINGS.get(name, name): of for name, of in settings.items()}
    return data
