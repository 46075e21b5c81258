"""What a recovery did, as a report that carries on that of the model it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from llm_pruner.data.text import SELF
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.report.data import (
    JSON_FILE,
    LossPoint,
    Recovery,
    Report,
    Source,
    Variant,
    read_report,
)
from llm_pruner.report.facts import as_evaluation, versions
from llm_pruner.types import Size

_METHODS = {"full": "training of all weights"}


def earlier_report(model: str) -> Report | None:
    """Return the report in the folder of a model; None if there is none that can be read."""
    file = Path(model).expanduser() / JSON_FILE
    try:
        return read_report(file) if file.is_file() else None
    except UserError:
        return None


def recovery_report(
    earlier: Report | None,
    *,
    source: Source,
    pruned: bool,
    size: Size,
    recovery: Recovery,
    perplexity: Sequence[tuple[PerplexityResult, PerplexityResult]],
    settings: Mapping[str, Any],
    saved_as: Literal["stock", "recipe"],
    needs: tuple[str, ...],
    command: str | None,
) -> Report:
    """Return the report of a recovered model.

    Args:
        earlier: of the model that came in, which is carried on.
        source: of the model that came in; read where nothing is known of it.
        pruned: the same: whether it was pruned.
        size: of the model, which recovery leaves as it is.
        recovery: the course of the training.
        perplexity: of each corpus, before and after.
        settings: all that decided how the run went.
        saved_as: how the folder loads.
        needs: what loading it needs.
        command: the command line of this run.
    """
    if earlier is None:
        before: Variant | None = "pruned" if pruned else "dense"
        earlier = Report(source=source)
    else:
        # What trained a model that was trained already starts from no model of the three.
        before = None if earlier.final == "recovered" else earlier.final
    evaluations = {name: of for name, of in earlier.evaluations.items() if name != "recovered"}
    sizes = {name: of for name, of in earlier.sizes.items() if name != "recovered"}
    report = earlier.model_copy(
        update={
            "sizes": sizes | ({"recovered": size} if recovery.gained else {}),
            "evaluations": evaluations,
            "recovery": recovery,
            "saved_as": saved_as,
            "needs": needs,
            "settings": {**earlier.settings, "Recovery": _shown(settings)},
            "seconds": {**earlier.seconds, "training": recovery.seconds or 0.0},
            "versions": versions(),
            "command": " && ".join(dict.fromkeys(filter(None, (earlier.command, command)))) or None,
            "card_digest": None,
        }
    )
    if perplexity:
        old, new = zip(*perplexity, strict=True)
        for variant, found in ((before, old), (report.final, new)):
            if variant is not None:
                data = {"perplexity": [asdict(one) for one in found]}
                report = report.with_evaluation(variant, as_evaluation(data))
    return report


def course(losses: Sequence[float], evaluations: Sequence[tuple[int, float]]) -> list[LossPoint]:
    """Return the loss of each step and each score of the held-out samples, by step."""
    train: dict[int, float] = dict(enumerate(losses, start=1))
    held_out = dict(evaluations)
    return [
        LossPoint(step=step, train=_known(train.get(step)), validation=_known(held_out.get(step)))
        for step in sorted({*train, *held_out})
    ]


def in_words(
    settings: Mapping[str, Any], samples: Sequence[tuple[str, int]], steps: int, teacher: str | None
) -> str:
    """Return how a model was trained, in words that follow "recovered by".

    Args:
        settings: as ``TrainingSettings`` has them, and ``distillation``.
        samples: name of each source and its number of training samples.
        steps: that were done.
        teacher: name of the dense model, if it wrote or taught.
    """
    method = str(settings["method"])
    said = _METHODS.get(method) or f"LoRA of rank {settings['lora_r']}"
    texts = [
        f"{count:,} texts that {teacher} wrote" if name == SELF else f"{count:,} samples of {name}"
        for name, count in samples
    ]
    said += f" on {' and '.join(texts)}, {steps:,} steps"
    if settings.get("distillation") and teacher is not None:
        whose = "its" if SELF in dict(samples) else f"{teacher}'s"
        said += f", with {whose} predictions as the aim"
    return said


def _known(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in settings.items()}
