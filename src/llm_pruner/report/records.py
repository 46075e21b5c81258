"""What the commands return: one type for each result, whose fields are what ``--json`` writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator
from pydantic_core import to_jsonable_python

from llm_pruner.compensation import Refitted
from llm_pruner.evaluation.health import Health
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.skills import Skill
from llm_pruner.evaluation.speed import Speed
from llm_pruner.evaluation.zero_shot import Kept, Mean, TaskResult
from llm_pruner.report.text import measured, percent
from llm_pruner.types import Layer, SplitTrial

T = TypeVar("T")

Variant = Literal["dense", "trimmed", "pruned", "recovered"]
"""The model before, without some of its tokens, after removing units, after training what was left,
and with packed weights."""

SavedAs = Literal["stock", "remote_code"]
"""``stock`` if a plain config describes a checkpoint, ``remote_code`` if its folder holds code that
does."""

Loss: TypeAlias = Annotated[float, BeforeValidator(lambda of: math.inf if of is None else of)]
"""In nats for each target token; JSON has no number for what is infinite."""

_OF_THE_FOLDER = {"saved_as", "path", "bytes", "needs", "report"}


@dataclass(frozen=True)
class Change(Generic[T]):
    """The same of the model that came in and of the one that was made."""

    before: T
    after: T


@dataclass(frozen=True)
class Pruned:
    """What a run of ``prune`` did.

    Attributes:
        bytes, saved_as, report: None of a plan alone.
    """

    model: str
    parameters_before: int
    parameters_after: int
    ratio: float
    layers: tuple[Layer, ...]
    twin_difference: float | None
    twin_scenes: tuple[str, ...]
    twin_skipped: tuple[str, ...]
    round_to: int | None
    refitted: tuple[Refitted, ...]
    repair: Training | None
    trials: tuple[SplitTrial, ...]
    seconds: dict[str, float]
    path: Path
    saved_as: SavedAs | None = None
    needs: tuple[str, ...] = ()
    bytes: int | None = None
    report: Path | None = None


@dataclass(frozen=True)
class ZeroShot:
    """Results of tasks and groups."""

    tasks: list[TaskResult]
    mean: Mean | None
    mean_without_boolq: Mean | None
    cached: list[str]
    data: str
    limit: int | None
    dtype: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Abilities:
    """What a model can do; of what was not asked for there is nothing."""

    model: str
    zero_shot: ZeroShot | None
    skills: list[Skill]
    health: Health | None


@dataclass(frozen=True)
class Measured:
    """What was measured of one model; what was not asked for is empty."""

    model: str
    parameters: int
    parameters_embedding: int | None
    parameters_blocks: int | None
    perplexity: list[PerplexityResult]
    zero_shot: ZeroShot | None = None
    speed: Speed | None = None
    samples: dict[str, str] = field(default_factory=dict)
    skills: list[Skill] = field(default_factory=list)
    health: Health | None = None
    dense: Abilities | None = None
    kept: Kept | None = None
    parameters_against: int | None = None
    fingerprint_against: str | None = None


@dataclass(frozen=True)
class Weighed(Measured):
    """The same of a stage of ``compress``, and the bytes of its weights; None if not known."""

    bytes: int | None = None


@dataclass(frozen=True)
class SourceResult:
    """One source; losses, of the model that came and of the saved one, in nats a target token."""

    name: str
    split: str | None
    train_samples: int
    held_out_samples: int
    held_out_tokens: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class StepLoss:
    """Loss in nats per target token after a step of training."""

    step: int
    loss: float


@dataclass(frozen=True)
class ControlText:
    """Four models on one text that none of them was trained on."""

    columns: ClassVar = ("model", "perplexity", "KL, nats", "changed")

    dense: PerplexityResult
    dense_trained: PerplexityResult
    pruned: PerplexityResult
    pruned_trained: PerplexityResult
    damage: float

    @property
    def title(self) -> str:
        """The text and how long it is."""
        return f"{self.dense.corpus}, {self.dense.tokens:,} tokens"

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Rows of a table under ``columns``."""
        rows: list[tuple[str, ...]] = []
        for name, found in (
            ("dense", self.dense),
            ("dense + training", self.dense_trained),
            ("pruned", self.pruned),
            ("pruned + training", self.pruned_trained),
        ):
            far = found.divergence
            kl = "-" if far is None else measured(far.kl, far.kl_stderr, ".3f")
            changed = "-" if far is None else percent(far.changed)
            rows.append((name, measured(found.perplexity, found.stderr), kl, changed))
        return rows


@dataclass(frozen=True)
class Control:
    """The dense model with the training of the pruned one; fields as in ``Recovered``."""

    model: str
    gained: bool
    loss: Change[Loss]
    steps: int
    best_step: int
    texts: tuple[ControlText, ...]


@dataclass(frozen=True)
class Recovered:
    """What a run of ``recover`` did.

    Attributes:
        loss: held-out loss in nats a target token; with a teacher, mixed with the distance to it.
            After is that of the model that was trained, whether it was kept or not.
    """

    model: str
    gained: bool
    loss: Change[float]
    sources: tuple[SourceResult, ...]
    perplexity: tuple[Change[PerplexityResult], ...]
    steps: int
    best_step: int
    stopped: str | None
    tokens: int
    seconds: float
    trained: int
    parameters: int
    packed: bool
    losses: list[float]
    evaluations: list[StepLoss]
    settings: dict[str, Any]
    path: Path
    control: Control | None = None
    saved_as: SavedAs = "stock"
    needs: tuple[str, ...] = ()
    bytes: int = 0
    report: Path | None = None

    def lasting(self) -> str:
        """Return the text of ``RECOVERY_FILE``: all but what the folder is like, pairs as lists."""
        values = as_json(self, exclude=_OF_THE_FOLDER)
        values["loss"] = list(values["loss"].values())
        for name in ("perplexity", "evaluations"):
            values[name] = [list(pair.values()) for pair in values[name]]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Training:
    """What training gave within another command; see ``Recovered`` for the fields."""

    before: Loss
    after: Loss
    gained: bool
    steps: int
    best_step: int
    stopped: str | None
    tokens: int
    seconds: float
    control: Control | None = None


@dataclass(frozen=True)
class Compressed:
    """What a run of ``compress`` did.

    Attributes:
        peak_bytes: most memory that one process held; 0 if not known.
    """

    path: Path
    model: str
    parameters: Change[int]
    ratio: float
    measured: dict[Variant, Weighed]
    recovery: Training | None
    notes: list[str]
    peak_bytes: int
    tokens: Change[int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    report: Path | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One size of a curve: what ``prune`` would leave, and how far it is from the dense model."""

    asked: float
    removed: float
    parameters: int
    plan: str
    measured: PerplexityResult
    perplexity_ratio: float
    split: dict[str, float] | None
    refitted: int
    seconds: dict[str, float]

    @property
    def kl(self) -> float:
        """KL divergence from the dense model, nats a token."""
        assert self.measured.divergence is not None
        return self.measured.divergence.kl


@dataclass(frozen=True)
class Smallest:
    """How small a model may be for a damage that was bounded.

    Attributes:
        limit: times the dense model's perplexity, or nats a token.
    """

    of: Literal["perplexity", "kl"]
    limit: float
    removed: float | None = None
    point: CurvePoint | None = None
    outside: str | None = None


@dataclass(frozen=True)
class Curve:
    """Damage against size; ``missed``: share that was asked for -> why it has no point."""

    model: str
    parameters: int
    points: tuple[CurvePoint, ...]
    missed: dict[str, str]
    smallest: Smallest | None
    preset: str | None
    calibration: str
    seconds: dict[str, float]
    path: Path
    report: Path | None = None

    def lasting(self) -> str:
        """Return the text of ``curve.json``: all but where the folder is."""
        values = as_json(self, exclude=_OF_THE_FOLDER)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def as_json(record: Any, **options: Any) -> Any:
    """Return a record as plain values for JSON.

    What is infinite or no number, which JSON has no number for, is None in what training gave: a
    loss may be. In what was measured it stays as it is, unless ``inf_nan_mode`` is given.
    """
    mode: Any = "null" if isinstance(record, Recovered) else "constants"
    return to_jsonable_python(record, **{"inf_nan_mode": mode, **options})
