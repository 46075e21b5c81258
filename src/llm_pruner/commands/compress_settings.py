"""What a run of ``compress`` is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_pruner import __version__
from llm_pruner.commands.by_preset import calibration_of, prune_arguments
from llm_pruner.commands.evaluate import PerplexitySettings, read_texts
from llm_pruner.commands.zero_shot import ZeroShotSettings
from llm_pruner.commands.zero_shot import check as check_tasks
from llm_pruner.data.examples import load_examples
from llm_pruner.data.text import SELF, load_documents, sources_of
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.files.outputs import Source, check_output
from llm_pruner.models.loading import check
from llm_pruner.planning import Target
from llm_pruner.recovery import RecoverySettings, preset
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import check_seed
from llm_pruner.settings.presets import read_recipe, recipe_file


@dataclass(frozen=True)
class CompressSettings:
    """What a run is asked to do.

    Attributes:
        model: the dense model.
        target: how much to remove.
        recipe: how; name or YAML file.
        calibration: text that importance is estimated on; None for that of the recipe, or ``self``.
        data: text to train on; ``self`` is written by the dense model, which is the teacher too.
        samples: examples of each source, at most; None for ``SAMPLES`` of ``self`` and all others,
            or with a time budget for what fits.
        recovery: how to train; None to leave the pruned model as it is. Its length of samples gives
            way to that of self-made calibration text, which both then share.
        time_budget: seconds for everything; None for one pass over the data.
        perplexity: corpora to measure.
        zero_shot: tasks to measure.
        seed: of all that is drawn.
    """

    model: ModelSettings
    target: Target
    recipe: str = "best"
    calibration: str | None = None
    data: tuple[str, ...] = (SELF,)
    samples: int | None = None
    recovery: RecoverySettings | None = None
    time_budget: float | None = None
    perplexity: tuple[str, ...] = ("demo",)
    zero_shot: ZeroShotSettings | None = None
    seed: int = 0


def default_recovery(seed: int = 0, **changes: Any) -> RecoverySettings:
    """Return how ``compress`` trains: the preset ``quick``, with adapters."""
    return preset("quick", "lora", seed=seed, **changes)


def check_settings(settings: CompressSettings, out: Path, overwrite: bool) -> None:
    """Refuse what can be refused before a model is loaded."""
    check_output(out, overwrite, reads_of(settings))
    check_seed(settings.seed)
    recipe = read_recipe(settings.recipe)
    prune_arguments(recipe)
    if settings.recovery is not None:
        settings.recovery.check()
        if not settings.data:
            raise UserError("no data given; use --data SRC, or --no-recover")
        for source in settings.data:
            if source != SELF:
                load_examples(source, limit=_beginning(source))
    calibration = calibration_of(recipe, source=settings.calibration)
    for source in sources_of(calibration.source):
        if source != SELF:
            load_documents(source, limit=_beginning(source))
    read_texts(settings.perplexity, PerplexitySettings())
    if settings.zero_shot is not None:
        check_tasks(settings.zero_shot)
    check(settings.model)


def reads_of(settings: CompressSettings) -> list[Source]:
    """Return all that a run reads."""
    tasks = settings.zero_shot
    return [
        settings.model.source,
        *sources_of(settings.calibration or SELF),
        *settings.data,
        *settings.perplexity,
        None if tasks is None else tasks.data,
        recipe_file(settings.recipe),
    ]


def _beginning(source: str) -> int | None:
    """Return how much of a source is read to see that it is there: local files are read whole."""
    return None if Path(source).expanduser().exists() else 1000


def about(settings: CompressSettings) -> dict[str, Any]:
    """Return all that decides how a run goes, as plain values by the names of the options."""
    identity = result_cache.identify(settings.model)
    recovery = settings.recovery
    tasks = settings.zero_shot
    return {
        "model": Path(settings.model.source).name,
        "model content": None if identity is None else identity.content,
        "dtype": settings.model.dtype,
        "device": settings.model.device,
        "ratio": settings.target.ratio,
        "params": settings.target.params,
        "recipe": {
            "name": Path(settings.recipe).name,
            **read_recipe(settings.recipe).model_dump(mode="json", exclude_none=True),
        },
        "calibration": settings.calibration,
        "recover": recovery is not None,
        "data": [source if source == SELF else Path(source).name for source in settings.data],
        "samples": settings.samples,
        "training": None if recovery is None else asdict(recovery),
        "time budget": settings.time_budget,
        "perplexity": list(settings.perplexity),
        "tasks": None if tasks is None else list(tasks.tasks),
        "tasks data": None if tasks is None or tasks.data is None else str(tasks.data),
        "limit": None if tasks is None else tasks.limit,
        "seed": settings.seed,
        "llm_pruner": __version__,
    }
