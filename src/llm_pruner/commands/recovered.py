"""What a recovery run did, as it is returned and written beside the model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm_pruner.evaluation.perplexity import PerplexityResult

RECORD = "recovery.json"
"""What a recovered checkpoint says about its recovery."""

_OF_THE_FOLDER = ("kind", "path", "bytes", "needs", "report")


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

    def record(self) -> str:
        """Return ``RECORD``'s text: all but what the folder is like."""
        values = {key: value for key, value in asdict(self).items() if key not in _OF_THE_FOLDER}
        return json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """Return plain values in which what is infinite, which JSON has no number for, is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value
