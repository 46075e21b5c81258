"""What a report says, as plain data: the content of ``report.json``; absent parts are not shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_pruner.errors import UserError
from llm_pruner.files.disk import read_json
from llm_pruner.report.records import ControlText
from llm_pruner.report.records import SavedAs as SavedAs
from llm_pruner.report.records import Variant as Variant
from llm_pruner.report.text import in_percent, measured, megabytes, number, points
from llm_pruner.types import Layer, Size, SplitTrial

JSON_FILE, HTML_FILE, CARD_FILE = "report.json", "report.html", "README.md"

VARIANTS: tuple[Variant, ...] = ("dense", "trimmed", "pruned", "recovered")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True, ser_json_inf_nan="strings")


class Source(_Part):
    """The dense model.

    Attributes:
        fingerprint: of shapes, config and weights, see ``models.load.fingerprint``, if known.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    license: str | None = None
    fingerprint: str | None = None


class ImportanceRow(_Part):
    """Importance of the units of one layer, sorted and averaged in bins of equally many units."""

    layer: int | None
    units: int
    removed: int
    bins: tuple[float | None, ...]


class ImportanceMap(_Part):
    """Importance of all groups of one kind that were scored; higher means keep."""

    kind: str
    rows: tuple[ImportanceRow, ...]


class Result(_Part):
    """One number that was measured of a model.

    Attributes:
        unit: such as ``tokens/s``, ``nats`` or ``B``; a share has ``%``.
    """

    part: Literal["perplexity", "bits", "tasks", "measured"]
    name: str
    settings: str = ""
    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    of: str | None = None
    in_mean: bool = False

    @property
    def key(self) -> tuple[str | None, ...]:
        """What must agree before two results may be compared."""
        return self.part, self.name, self.settings, self.unit, self.of

    @property
    def title(self) -> str:
        """The name with the unit, where the number does not bring its own."""
        return self.name if self.unit in ("", "B") else f"{self.name}, {self.unit}"

    @property
    def label(self) -> str:
        """The row of a table."""
        return f"{self.title} ({self.settings})" if self.settings else self.title

    def __str__(self) -> str:
        """Return the value with what is known of its spread."""
        if self.unit == "B":
            return megabytes(self.value)
        if self.unit == "%":
            return in_percent(self.value, self.stderr)
        if self.part == "measured" and self.stderr is None:
            said = number(self.value)
        else:
            said = measured(self.value, self.stderr, ".4f" if self.part == "bits" else "")
        if self.low is None or self.high is None:
            return said
        return f"{said} ({number(self.low)} to {number(self.high)})"

    def since(self, dense: Result) -> tuple[str, bool | None]:
        """Return the change from the dense model, and whether it is for the better."""
        if self.unit == "%":
            said, more = points(self.value - dense.value)
        elif not dense.value or not math.isfinite(self.value / dense.value):
            return "", None
        else:
            ratio = self.value / dense.value
            said, more = f"× {ratio:.2f}", None if ratio == 1 else ratio > 1
        neither = more is None or self.better is None
        return said, None if neither else more == (self.better == "higher")


class Evaluation(_Part):
    """All that was measured of one model; ``samples`` maps prompts to what it wrote after them."""

    results: tuple[Result, ...] = ()
    samples: dict[str, str] = {}

    def of(self, part: str) -> list[Result]:
        """Return the results of one table."""
        return [one for one in self.results if one.part == part]

    def with_newer(self, newer: Evaluation) -> Evaluation:
        """Return both; of what was measured twice with the same settings, the newer."""
        results = {one.key: one for one in (*self.results, *newer.results)}
        return Evaluation(results=(*results.values(),), samples=self.samples | newer.samples)


class LossPoint(_Part):
    """Loss in nats per token after a step of training."""

    step: int
    train: float | None = None
    validation: float | None = None


class Recovery(_Part):
    """Training after the removal."""

    loss: tuple[LossPoint, ...] = ()
    seconds: float | None = None
    summary: str | None = None
    gained: bool = True
    control: tuple[ControlText, ...] = ()


class Report(_Part):
    """All that a run did and measured."""

    format_version: Literal[2] = 2
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
        if self.recovery is not None and self.recovery.gained:
            return "recovered"
        return "pruned" if self.was_pruned else "dense"

    @property
    def was_pruned(self) -> bool:
        """Whether it knows of a removal, or else of training alone."""
        known = "pruned" in {*self.sizes, *self.evaluations}
        return bool(self.recovery is None or self.criterion or self.layers or known)

    def with_evaluation(self, variant: Variant, found: Evaluation) -> Report:
        """Return a report that also holds what was measured of one model."""
        old = self.evaluations.get(variant, Evaluation())
        evaluations = {**self.evaluations, variant: old.with_newer(found)}
        ordered = {name: evaluations[name] for name in VARIANTS if name in evaluations}
        return self.model_copy(update={"evaluations": ordered})

    def to_json(self) -> str:
        """Return the content of ``report.json``."""
        return json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n"


def read_report(file: Path) -> Report:
    """Return the report in a file; UserError if there is none."""
    try:
        found = read_json(file)
        if found.get("format_version") == 1:  # which held measurements otherwise
            found = found | {"format_version": 2, "evaluations": {}}
        return Report.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"{file} is no report that can be read ({reason}); prune again to write it")


def report_in(folder: Path) -> Report:
    """Return the report of a folder; UserError if there is none."""
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
