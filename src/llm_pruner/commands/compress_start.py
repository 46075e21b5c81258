"""What a run of ``compress`` starts from: what is refused, what decides it, how time is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_pruner.commands.evaluate import check_tasks, read_texts
from llm_pruner.commands.prune_start import criterion_of, selection_of
from llm_pruner.data.examples import load_examples
from llm_pruner.data.files import BEGINNING
from llm_pruner.data.text import SELF, load_documents, sources_of
from llm_pruner.evaluation import result_cache
from llm_pruner.files.outputs import check_output
from llm_pruner.models.load import check
from llm_pruner.settings.common import OutputSettings
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.limits import check_seed
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.version import __version__

SHORTEST = 60.0
"""Seconds below which training is not begun."""

WRITING = 1 / 3
"""Share of the time for recovery in which the dense model may write text to train on."""

_STARTING = 10.0
"""Seconds for what is not timed: starting Python, and drawing the report."""


def check_settings(settings: CompressSettings) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        UserError: says what must change.
    """
    check_output(settings.out, settings.overwrite, settings.reads)
    check_seed(settings.seed)
    pruning = settings.pruning(settings.out)
    selection_of(pruning)
    criterion_of(pruning)
    if settings.recover:
        settings.trains().check()
        for source in settings.data:
            if source != SELF:
                load_examples(source, limit=BEGINNING)
    for source in sources_of(pruning.calibration):
        if source != SELF:
            load_documents(source, limit=BEGINNING)
    read_texts(settings.perplexity, PerplexitySettings())
    if settings.tasks is not None:
        check_tasks(settings)
    check(settings.loading())


def about(settings: CompressSettings) -> dict[str, Any]:
    """Return all that decides how a run goes, as plain values by the names of the options."""
    identity = result_cache.identify(settings.loading())
    placed = {*OutputSettings.model_fields, "restart", "revision", "trust_remote_code"}
    method = settings.pruning(settings.out).model_dump(
        mode="json", include=set(MethodSettings.model_fields), exclude={"kept", "preset"}
    )
    return settings.model_dump(mode="json", exclude=placed) | {
        "model": Path(settings.model).name,
        "model content": None if identity is None else identity.content,
        "preset": {"name": Path(settings.preset).name, **method},
        "data": [source if source == SELF else Path(source).name for source in settings.data],
        "training": settings.trains().model_dump(mode="json") if settings.recover else None,
        "llm_pruner": __version__,
    }


def time_to_recover(
    budget: float, spent: float, stages: Mapping[str, float], pruning: Mapping[str, float]
) -> float:
    """Return the seconds that writing text and training may take; negative if none are left.

    What is kept back: measuring the recovered model as long as the pruned one took; loading it with
    its teacher and reading it again if there was no gain; saving.

    Args:
        budget: for the whole run.
        spent: until now.
        stages: seconds of the stages until now.
        pruning: seconds of the parts of pruning.
    """
    around = 3 * pruning.get("load", 0.0) + pruning.get("save", 0.0)
    return budget - spent - 1.1 * stages.get("pruned", 0.0) - around - _STARTING


def chunks_in_time(
    there: int,
    most: int,
    seconds: float,
    write: Callable[[int], Any],
    clock: Callable[[], float],
    *,
    longest: float = 0.0,
) -> int:
    """Write chunks of text while time lasts, the first in any case; return how many there are then.

    Args:
        there: chunks that exist.
        most: chunks that are enough.
        seconds: time to write more.
        write: makes the chunk of this number.
        clock: seconds since some beginning.
        longest: seconds that a chunk takes, as far as that is known before.
    """
    begin = last = clock()
    while there < most and (there == 0 or last - begin + longest <= seconds):
        write(there)
        there += 1
        now = clock()
        longest, last = max(longest, now - last), now
    return there
