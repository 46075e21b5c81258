"""What a run of ``recover`` starts from: its settings, checked, its models and its text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_pruner.data.examples import Examples, load_examples
from llm_pruner.data.text import PRUNED, SELF, read_each
from llm_pruner.data.training import Samples, fingerprint_samples, self_made_samples, split_samples
from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import check_tokens
from llm_pruner.files.disk import short_digest
from llm_pruner.files.outputs import check_output, check_place
from llm_pruner.models.checkpoint_files import stored_size
from llm_pruner.models.forward import dtype_name, embedding_rows
from llm_pruner.models.load import LoadedModel, load, stored_dtype
from llm_pruner.recovery.arguments import check_names, training_arguments
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.precision import multiplies
from llm_pruner.runtime.processes import Processes, started
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.recover import DataSettings, RecoverSettings, TrainingSettings
from llm_pruner.surgery.vocabulary import with_tokens_of

_LOG = logging.getLogger(__name__)

_HOW_FAST = ("packing", "kernels")
"""Settings of which the result does not depend but for rounding."""

_ASIDE = ("save_steps", "report_to", "gradient_checkpointing", "activation_checkpointing")
"""Arguments of the Trainer that a resumed run may have otherwise."""

WRITTEN = (SELF, PRUNED)
"""Sources that a model writes."""


def check_data(settings: RecoverSettings) -> None:
    """Raise UserError if there is no data, or a source needs a teacher that was not named."""
    if not settings.data:
        raise UserError("no data given; use --data SRC")
    for source in WRITTEN if settings.teacher is None else ():
        if source in settings.data:
            raise UserError(
                f"--data {source} needs the dense model, which writes or judges the text; name it "
                "with --teacher"
            )


def read_examples(data: DataSettings) -> dict[str, Examples]:
    """Return the examples of each source that no model writes."""
    sources = [source for source in data.data if source not in WRITTEN]

    def read(source: str, text_field: str | None) -> Examples:
        how: Any = {"split": data.split, "limit": data.samples}
        return load_examples(source, text_field=text_field, **how)

    return read_each(read, sources, data.text_field)


def load_teacher(teacher: ModelSettings, student: LoadedModel) -> LoadedModel:
    """Load the dense model with the student's tokens; raise UserError if it lacks some of them."""
    return as_teacher(load(teacher), student)


def as_teacher(dense: LoadedModel, student: LoadedModel) -> LoadedModel:
    """Return a model with the student's tokens; raise UserError if it lacks some of them."""
    dense = with_tokens_of(dense, student)
    assert dense.tokenizer is not None
    assert student.tokenizer is not None
    ours, theirs = (embedding_rows(one.model) for one in (student, dense))
    if ours != theirs or student.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise UserError(
            f"{dense.name} has another vocabulary ({theirs} tokens) than {student.name} ({ours}); "
            "name the dense model that the student was cut from"
        )
    return dense


def make_samples(
    settings: RecoverSettings,
    work: Path,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    examples: dict[str, Examples],
) -> list[Samples]:
    """Return the samples of each source, those of ``self`` and ``pruned`` written by a model.

    Raises UserError if a source has too few, or the model lacks a token of them.
    """
    samples = []
    for number, source in enumerate(settings.data):
        options: dict[str, Any] = {
            "seq_len": settings.seq_len,
            "limit": settings.samples,
            "held_out": settings.held_out,
            "seed": settings.seed,
            "source": number,
        }
        if source in WRITTEN:
            writer = dense if source == SELF else loaded
            assert writer is not None
            kept = (settings.teacher_cache or work) / f"{source}-{short_digest(computing(writer))}"
            if source == SELF:
                kept = settings.kept or kept
                options["limit"] = settings.self_samples or settings.samples
            made = self_made_samples(writer.model, writer.tokenizer, kept, name=source, **options)
        else:
            made = split_samples(
                examples[source],
                loaded.tokenizer,
                template=settings.template,
                mask_prompt=settings.mask_prompt,
                **options,
            )
        samples.append(made)
    used = (one.input_ids.max() for each in samples for one in (*each.train, *each.held_out))
    check_tokens(loaded.model, int(max(used)))
    return samples


def computing(model: LoadedModel, bf16: bool | None = False) -> str:
    """Return what identifies a model with its types, of which its fingerprint knows nothing.

    ``bf16``: whether its modules multiply in bfloat16, whatever the type of its weights.
    """
    products = "bfloat16" if bf16 else "its own"
    return f"{model.fingerprint}, weights {dtype_name(model.model)}, products {products}"


def check_run(settings: RecoverSettings, work: Path) -> None:
    """Raise UserError for what would fail after the work; the run is in ``work``."""
    settings.check()
    check_names(settings)
    if started() == 1:  # several have yet to meet, on devices that are not known here
        training_arguments(settings)
    check_output(settings.out, settings.overwrite, settings.reads)
    check_data(settings)
    if settings.teacher_cache is not None:
        check_place(settings.teacher_cache / "cache", "--set teacher_cache")
    if work.exists() and not (settings.resume or settings.overwrite):
        raise UserError(
            f"{work.name} holds a run that was interrupted; go on with --resume, or throw it away "
            "with --overwrite"
        )


def ways_to_load(
    settings: RecoverSettings, processes: Processes, earlier: Mapping[str, Any] | None = None
) -> dict[str, ModelSettings]:
    """Return how ``model`` is loaded, and ``teacher`` and ``control`` if there are such.

    ``--dtype auto`` computes in float32. Beside adapters no weight of a model is trained, and none
    loses a small step: there each is computed as it is stored where the device multiplies that
    faster, or where float32 copies of all would not fit into its free memory. FSDP2 wants one type.

    Args:
        earlier: the facts of an interrupted run that goes on, in whose types it does.

    Raises:
        UserError: one of them cannot be loaded.
    """
    named = {"model": None, "teacher": settings.teacher, "control": settings.control}
    ways = {of: settings.loading(name) for of, name in named.items() if name or of == "model"}
    stored = {of: stored_dtype(way) for of, way in ways.items()}
    if settings.dtype != "auto":
        return ways
    adapts = settings.method == "lora" and not processes.sharded
    short = adapts and bool(processes.from_first(_is_short(ways.values(), settings.device)))
    for of, kept in stored.items():
        name, fast = str(kept).removeprefix("torch."), multiplies(kept, settings.device)
        half = adapts and kept.itemsize == 2 and (short or fast)
        used = (earlier or {}).get(f"{of}_dtype", name if half else "float32")
        ways[of] = ways[of].but(dtype=used)
        if half and used == name and not fast and processes.is_first:
            _LOG.warning(
                "float32 copies of all models do not fit into the free memory: the %s is computed "
                "in %s",
                of,
                name,
            )
    return ways


def _is_short(models: Iterable[ModelSettings], device: str) -> bool:
    """Whether float32 copies of all do not fit; of what is still on the hub nothing is known."""
    sizes = [stored_size(one.model, one.revision, "float32") for one in models]
    return sum(size[1] for size in sizes if size) > free_bytes(device)


def facts_of(
    settings: RecoverSettings,
    loaded: LoadedModel,
    dense: LoadedModel | None,
    samples: Sequence[Samples],
) -> dict[str, Any]:
    """Return all that decides how a run goes."""
    decides = set(TrainingSettings.model_fields) - set(_HOW_FAST)
    distillation = {
        "temperature": settings.temperature,
        "weight": settings.distill_weight,
        "top_k": settings.teacher_top_k,
    }
    train = [one for each in samples for one in each.train]
    held_out = [one for each in samples for one in each.held_out]
    return {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "teacher": None if dense is None else dense.name,
        "teacher_fingerprint": None if dense is None else dense.fingerprint,
        "distillation": distillation if settings.distils else None,
        "data": [one if one in WRITTEN else Path(one).name for one in settings.data],
        "template": settings.template,
        "mask_prompt": settings.mask_prompt,
        "held_out_samples": len(held_out),
        "data_fingerprint": fingerprint_samples([*train, *held_out]),
        **settings.model_dump(mode="json", include=decides),
        "trainer": {k: v for k, v in settings.trainer.items() if k not in _ASIDE},
    }
