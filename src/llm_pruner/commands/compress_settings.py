"""What a run of ``compress`` reads, and what decides how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_pruner.commands.evaluate import read_texts
from llm_pruner.commands.prune import criterion_of, selection_of
from llm_pruner.commands.zero_shot import check as check_tasks
from llm_pruner.data.examples import load_examples
from llm_pruner.data.text import SELF, load_documents, sources_of
from llm_pruner.evaluation import result_cache
from llm_pruner.files.outputs import Source, check_output
from llm_pruner.models.load import check
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.limits import check_seed
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.version import __version__


def check_settings(settings: CompressSettings) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        UserError: says what must change.
    """
    check_output(settings.out, settings.overwrite, reads_of(settings))
    check_seed(settings.seed)
    pruning = settings.pruning(settings.out)
    selection_of(pruning)
    criterion_of(pruning)
    if settings.recover:
        settings.trains().check()
        for source in settings.data:
            if source != SELF:
                load_examples(source, limit=_beginning(source))
    for source in sources_of(pruning.calibration):
        if source != SELF:
            load_documents(source, limit=_beginning(source))
    read_texts(settings.perplexity, PerplexitySettings())
    if settings.tasks is not None:
        check_tasks(settings)
    check(settings.loading())


def reads_of(settings: CompressSettings) -> list[Source]:
    """Return all that a run reads."""
    preset = None if settings.preset in MethodSettings.presets else settings.preset
    return [
        settings.model,
        *sources_of(settings.calibration or SELF),
        *settings.data,
        *settings.perplexity,
        settings.tasks_data,
        preset,
    ]


def _beginning(source: str) -> int | None:
    """Return how much of a source is read to see that it is there: local files are read whole."""
    return None if Path(source).expanduser().exists() else 1000


def about(settings: CompressSettings) -> dict[str, Any]:
    """Return all that decides how a run goes, as plain values by the names of the options."""
    identity = result_cache.identify(settings.loading())
    method = settings.pruning(settings.out).model_dump(
        mode="json", include=set(MethodSettings.model_fields), exclude={"kept", "preset"}
    )
    training = settings.trains().model_dump(mode="json")
    return {
        "model": Path(settings.model).name,
        "model content": None if identity is None else identity.content,
        "dtype": settings.dtype,
        "device": settings.device,
        "ratio": settings.ratio,
        "params": settings.params,
        "preset": {"name": Path(settings.preset).name, **method},
        "calibration": settings.calibration,
        "recover": settings.recover,
        "data": [source if source == SELF else Path(source).name for source in settings.data],
        "samples": settings.samples,
        "training": training if settings.recover else None,
        "time budget": settings.time_budget,
        "perplexity": list(settings.perplexity),
        "tasks": None if settings.tasks is None else list(settings.tasks),
        "tasks data": None if settings.tasks_data is None else str(settings.tasks_data),
        "limit": settings.limit,
        "seed": settings.seed,
        "llm_pruner": __version__,
    }
