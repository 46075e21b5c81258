"""What a run of ``compress`` starts from: its settings, checked, and what decides how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_pruner.commands.abilities import prepare_tasks
from llm_pruner.commands.evaluate import read_texts
from llm_pruner.commands.prune_start import check_space, criterion_of, target_of
from llm_pruner.commands.recover_start import read_examples
from llm_pruner.commands.workdir import (
    content,
    contents,
)
from llm_pruner.data.calibration import check_calibration
from llm_pruner.data.files import BEGINNING
from llm_pruner.data.text import SELF, shares_of
from llm_pruner.evaluation import result_cache
from llm_pruner.files.outputs import (
    check_output,
)
from llm_pruner.models.load import check
from llm_pruner.runtime.processes import check_trains
from llm_pruner.settings.common import OutputSettings
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.version import __version__


def check_settings(settings: CompressSettings, work: Path) -> None:
    """Raise UserError for places, texts and models that cannot be used."""
    check_output(settings.out, settings.overwrite, settings.reads)
    pruning = settings.pruning(settings.out)
    criterion_of(pruning)
    if not work.is_dir():
        # With fewer tokens, pruned, recovered.
        copies = bool(settings.vocab_text) + 1 + settings.recover
        check_space(settings.out, settings.loading(), target_of(pruning), copies=copies)
    if settings.recover:
        check_trains(settings.device)
        trained = RecoverSettings(model=settings.model, data=settings.data, out=settings.out)
        read_examples(trained.but(samples=BEGINNING))
    read_texts(settings.perplexity, PerplexitySettings())
    if settings.tasks is not None:
        prepare_tasks(settings)
    check(settings.loading())
    # With fewer tokens the same text gives more of them.
    check_calibration(pruning)


def about(settings: CompressSettings) -> dict[str, Any]:
    """Return all that decides how a run goes, as plain values by the names of the options."""
    identity = result_cache.identify(settings.loading())
    placed = {*OutputSettings.model_fields} - {"max_shard_size"}
    placed |= {"restart", "revision", "trust_remote_code"}
    pruning, data = settings.pruning(settings.out), settings.tasks_data
    items = () if data is None else (str(data / f"{name}.jsonl") for name in settings.tasks or ())
    method = pruning.model_dump(
        mode="json", include=set(MethodSettings.model_fields), exclude={"kept", "preset"}
    )
    return settings.model_dump(mode="json", exclude=placed) | {
        "model": Path(settings.model).name,
        "model content": None if identity is None else identity.content,
        "preset": {"name": Path(settings.preset).name, **method},
        "data": [source if source == SELF else Path(source).name for source in settings.data],
        "vocab_text": [Path(source).name for source in settings.vocab_text],
        "vocab content": [content(source) for source in settings.vocab_text],
        "data content": [content(source) for source in settings.data],
        **contents((*shares_of(pruning.calibration), *settings.perplexity, *items)),
        "training": settings.trains().model_dump(mode="json") if settings.recover else None,
        "llm_pruner": __version__,
    }
