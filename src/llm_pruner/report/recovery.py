"""What a recovery did, as a report that carries on that of the model it started from."""

from __future__ import annotations

import math
from pathlib import Path

from llm_pruner.data.text import SELF
from llm_pruner.errors import UserError
from llm_pruner.report.data import (
    JSON_FILE,
    Evaluation,
    LossPoint,
    Recovery,
    Report,
    Source,
    Variant,
    read_report,
)
from llm_pruner.report.facts import spaced, versions
from llm_pruner.report.records import Recovered
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
    done: Recovered,
    earlier: Report | None,
    *,
    source: Source,
    pruned: bool,
    size: Size,
    command: str | None,
) -> Report:
    """Return the report of a recovered model.

    Args:
        done: what the run did.
        earlier: of the model that came in, which is carried on.
        source: of the model that came in; read where nothing is known of it.
        pruned: the same: whether it was pruned.
        size: of the model, which recovery leaves as it is.
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
    recovery = Recovery(
        loss=_course(done), seconds=done.seconds, summary=_in_words(done), gained=done.gained
    )
    report = earlier.model_copy(
        update={
            "sizes": sizes | ({"recovered": size} if done.gained else {}),
            "evaluations": evaluations,
            "recovery": recovery,
            "saved_as": done.saved_as,
            "needs": done.needs,
            "settings": {**earlier.settings, "Recovery": spaced(done.settings)},
            "seconds": {**earlier.seconds, "training": done.seconds},
            "versions": versions(),
            "command": " && ".join(dict.fromkeys(filter(None, (earlier.command, command)))) or None,
            "card_digest": None,
        }
    )
    if done.perplexity:
        old, new = zip(*((one.before, one.after) for one in done.perplexity), strict=True)
        for variant, found in ((before, old), (report.final, new)):
            if variant is not None:
                measured = Evaluation.model_validate({"perplexity": found})
                report = report.with_evaluation(variant, measured)
    return report


def _course(done: Recovered) -> tuple[LossPoint, ...]:
    """Return the loss of each step and each score of the held-out samples, by step."""
    train = dict(enumerate(done.losses, start=1))
    held_out = {one.step: one.loss for one in done.evaluations}
    return tuple(
        LossPoint(step=step, train=_known(train.get(step)), validation=_known(held_out.get(step)))
        for step in sorted({*train, *held_out})
    )


def _in_words(done: Recovered) -> str:
    """Return how a model was trained, in words that follow "recovered by"."""
    settings = done.settings
    teacher = settings["teacher"]
    said = _METHODS.get(settings["method"]) or f"LoRA of rank {settings['lora_r']}"
    texts = [
        f"{one.train_samples:,} texts that {teacher} wrote"
        if one.name == SELF
        else f"{one.train_samples:,} samples of {one.name}"
        for one in done.sources
    ]
    said += f" on {' and '.join(texts)}, {done.steps:,} steps"
    if settings["distillation"] and teacher is not None:
        whose = "its" if SELF in {one.name for one in done.sources} else f"{teacher}'s"
        said += f", with {whose} predictions as the aim"
    return said


def _known(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
