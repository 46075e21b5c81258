"""What a report says of a run, its model and what was measured of it."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_pruner.data.text import CHAT, PRUNED, SELF
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.skills import Share, digest_of
from llm_pruner.files.disk import expanded
from llm_pruner.models.checkpoint_files import DEFAULT
from llm_pruner.planning import Plan
from llm_pruner.planning.constraints import removed_layers
from llm_pruner.report import data
from llm_pruner.report.records import Abilities, Measured, Pruned, Recovered, Weighed, ZeroShot
from llm_pruner.settings.common import CALIBRATION
from llm_pruner.settings.options import option_of
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.types import Discovery, FloatArray, Group, Layer, Removal, Scores, Size
from llm_pruner.version import __version__

BINS = 24
"""Most bins of an importance map; a group with fewer units has a bin for each."""

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
_METHODS = {
    "full": "training of all weights",
    "blocks": "training of all weights but the embeddings",
}
"""Method of recovery -> its words; of all others: LoRA."""

_NAMES = {"fisher": "Fisher", "taylor": "Taylor", "wanda": "Wanda"}
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def importance_maps(
    discovery: Discovery, scores: Scores, removal: Removal
) -> tuple[data.ImportanceMap, ...]:
    """Return the importance of all scored groups by kind, in the order of the layers.

    Groups of one kind in one layer, such as those of its experts, are taken together.
    """
    gone = removed_layers(discovery.by_name, removal)
    found: dict[str, dict[int | None, list[Group]]] = {}
    for group in discovery.groups:
        # What follows another kind is removed with it, whatever its own importance.
        if group.name in scores and group.frozen is None and group.kind != "value_dim":
            found.setdefault(group.kind, {}).setdefault(group.layer, []).append(group)
    maps = []
    for kind, layers in found.items():
        rows = []
        for layer, groups in layers.items():
            units = sum(group.size for group in groups)
            removed = sum(
                group.size if group.place in gone else len(removal.get(group.name, ()))
                for group in groups
            )
            bins = _bins(np.concatenate([scores[group.name] for group in groups]))
            rows.append(data.ImportanceRow(layer=layer, units=units, removed=removed, bins=bins))
        maps.append(data.ImportanceMap(kind=kind, rows=tuple(rows)))
    return tuple(maps)


def _bins(scores: FloatArray) -> tuple[float | None, ...]:
    parts = np.array_split(np.sort(scores), min(BINS, len(scores)) or 1)
    means = [float(part.mean()) if part.size else np.nan for part in parts]
    return tuple(float(f"{mean:.4g}") if np.isfinite(mean) else None for mean in means)


def layers_of(rows: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return what is left of each layer; groups that differ by a number, as experts, are added."""
    layers = []
    for row in rows:
        sizes: dict[str, tuple[int, int]] = {}
        for name, (kept, dense) in row.sizes.items():
            shown = _NUMBER.sub("*", name)
            before = sizes.get(shown, (0, 0))
            sizes[shown] = (before[0] + kept, before[1] + dense)
        layers.append(Layer(layer=row.layer, removed=row.removed, sizes=sizes))
    return tuple(layers)


def source_of(
    model: str, name: str, revision: str | None, network: Any, fingerprint: str | None = None
) -> data.Source:
    """Return where a model came from, of which the user gave ``model`` and ``name`` is short."""
    local = model == DEFAULT or model.endswith(".gguf") or expanded(model).exists()
    return data.Source(
        name=name,
        hub_id=None if local else model,
        revision=revision,
        architecture=type(network).__name__,
        license=licence_of(model, revision),
        fingerprint=fingerprint,
    )


def criterion_in_words(plan: Plan) -> str | None:
    """Return how units were chosen, in words that follow "chosen by"."""
    said_by = plan.settings
    name = str(said_by.get("criterion", ""))
    if not name:
        return None
    chosen = {key: said_by[key] for key in ("order", "reduction", "aggregate") if key in said_by}
    if name == "random":
        return "chance"
    said = f"{name.upper() if len(name) <= 3 else _NAMES.get(name, name)} importance"
    if chosen:
        said += f" ({', '.join(f'{key} {value}' for key, value in chosen.items())})"
    match said_by:  # of a plan that was edited, a part may be gone
        case {"samples": int(samples), "seq_len": int(length), "calibration": str(sources)}:
            own = {SELF: "text that it wrote itself", CHAT: "chats that it wrote itself"}
            where = " and ".join(own.get(part, part) for part in sources.split(","))
            said += f" on {samples:,} × {length:,} tokens of {where}"
    return said


def repair_of(done: Pruned) -> str | None:
    """Return how the pruned weights were trained, in words that follow "repaired by"."""
    if done.repair is None or not done.repair.gained:
        return None
    minutes = f"{done.repair.seconds / 60:.1f} minutes"
    return (
        f"{done.repair.best_step:,} steps of training in {minutes}, with the dense model's "
        "predictions as the aim"
    )


def settings_of(
    plan: Plan, model: Mapping[str, Any], after: Mapping[str, Any], text: str | None
) -> dict[str, dict[str, Any]]:
    """Return all settings of a run, and how the model was loaded, by the headings of the help.

    ``after`` decided about what was done after the cut, by option; ``text`` is a fingerprint.
    """
    sections: dict[str, dict[str, Any]] = {"Model": {**plan.model.model_dump(), **model}}
    for name, value in {**plan.settings, **after}.items():
        field = PruneSettings.model_fields.get(name)
        panel = None if field is None else option_of(field).panel
        heading = (panel or "Plan").partition(" (")[0]
        sections.setdefault(heading, {})[name] = value
    if text is not None:
        sections.setdefault(CALIBRATION, {})["digest"] = text
    return {heading: spaced(values) for heading, values in sections.items()}


def spaced(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with their names as people write them."""
    return {name.replace("_", " "): value for name, value in settings.items()}


def versions() -> dict[str, str]:
    """Return versions of the package, of libraries and of the machine."""
    cores = f"{os.cpu_count()} cores, PyTorch with {torch.get_num_threads()} threads"
    return {
        "llm-pruner": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
    }


def licence_of(model: str, revision: str | None) -> str | None:
    """Return the licence that the model's card states, if the card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        card: Any = expanded(model) / data.CARD_FILE
        if not card.exists():
            card = try_to_load_from_cache(model, data.CARD_FILE, revision=revision)
        found = ModelCard.load(Path(card)).data.license
        return found if isinstance(found, str) else None
    except Exception:  # readers raise anything, and what cannot be read is not known
        return None


def evaluation_of(found: Measured | Abilities) -> data.Evaluation:
    """Return what was measured of one model as a part of its report."""
    results = [*_shares(found)]
    if found.zero_shot is not None:
        results += _scores(found.zero_shot)
    if not isinstance(found, Measured):
        return data.Evaluation(results=(*results,))
    for text in found.perplexity:
        results += _results_on(text, found.fingerprint_against)
    results += _measurements(found)
    return data.Evaluation(results=(*results,), samples=found.samples)


def on_texts(texts: Sequence[PerplexityResult]) -> data.Evaluation:
    """Return what was measured of one model on texts alone."""
    return data.Evaluation(results=tuple(one for text in texts for one in _results_on(text)))


def _results_on(text: PerplexityResult, against: str | None = None) -> Iterator[data.Result]:
    """Yield perplexity, bits a byte, and the divergence from a dense model with a fingerprint."""
    name = text.corpus if text.split is None else f"{text.corpus}, {text.split}"
    how = f"{text.protocol} protocol, windows of {text.window:,}"
    kind = "" if text.dtype is None else f", {text.dtype}"
    settings = f"{how}, {text.tokens:,} tokens{kind}"
    common: dict[str, Any] = {"name": name, "settings": settings, "better": "lower"}
    yield data.Result(
        part="perplexity", value=text.perplexity, stderr=text.stderr, of=text.ids_digest, **common
    )
    if text.bits_per_byte is not None:
        # The number of tokens differs between models; the number that was asked for does not.
        asked = "" if text.max_tokens is None else f", {text.max_tokens:,} tokens"
        yield data.Result(
            part="bits",
            value=text.bits_per_byte,
            unit="bits per byte",
            of=text.text_digest,
            **common | {"settings": f"{how}{asked}{kind}"},
        )
    if (far := text.divergence) is not None:
        of = digest_of(text.ids_digest, against)
        for what, unit, value, stderr in (
            ("KL", "nats", far.kl, far.kl_stderr),
            ("likeliest token changed", "%", far.changed, far.changed_stderr),
        ):
            common["name"] = f"{what} against {far.against}, {name}"
            yield data.Result(
                part="measured", value=value, stderr=stderr, unit=unit, of=of, **common
            )


def dense_evaluation(found: Measured, report: data.Report) -> data.Evaluation | None:
    """Return what was measured of the dense model beside another one; None of any other model."""
    dense, name = report.sizes.get("dense"), report.source.name
    if (
        dense is None
        or dense.total != found.parameters_against
        or report.source.fingerprint not in (None, found.fingerprint_against)
        or against(found) != name
    ):
        return None
    texts = [one.dense for one in found.perplexity if one.dense]
    beside = on_texts(texts)
    return beside if found.dense is None else beside.with_newer(evaluation_of(found.dense))


def against(found: Measured) -> str | None:
    """Return the name of the model that another one was compared with, if it was."""
    names = [one.divergence.against for one in found.perplexity if one.divergence]
    return next(iter(names), None if found.dense is None else found.dense.model)


def shares(found: Measured | Abilities) -> Iterator[tuple[str, str, Share, str | None]]:
    """Yield for each skill and each fault of long answers: its name, how it was measured, the share
    and the digest of the prompts.
    """
    for skill in found.skills:
        of = f"{skill.solved.count} of {skill.total} problems"
        yield f"{skill.name} {skill.metric}", of, skill.solved, skill.digest
    if (long := found.health) is not None:
        of = f"{long.new_tokens} tokens, {long.looping.count} prompts, {long.prompts}"
        yield "looping answers", of, long.looping, long.digest
        yield "endless answers", of, long.endless, long.digest


def _shares(found: Measured | Abilities) -> Iterator[data.Result]:
    def result(
        name: str, settings: str, value: float, stderr: float | None, of: str | None, more: bool
    ) -> data.Result:
        return data.Result(
            part="measured",
            name=name,
            settings=settings,
            value=value,
            stderr=stderr,
            unit="%",
            better="higher" if more else "lower",
            of=of,
        )

    for number, (name, how, one, of) in enumerate(shares(found)):
        yield result(name, how, one.value, one.stderr, of, number < len(found.skills))
    if isinstance(found, Measured) and found.zero_shot and (kept := found.kept):
        counted = [one for one in found.zero_shot.tasks if one.task in kept.tasks]
        items = sum(one.documents for one in counted)
        how = f"{', '.join(kept.tasks)}: {items:,} items"
        digests = [one.digest for one in counted]
        of = digest_of(digests, found.zero_shot.dtype, found.fingerprint_against)
        for name, value, stderr, more in (
            ("accuracy above chance kept", kept.value, kept.stderr, True),
            ("answered right by one of both alone (flips)", kept.flips, kept.flips_stderr, False),
        ):
            if value is not None:
                yield result(f"{name} against {kept.against}", how, value, stderr, of, more)


def _scores(found: ZeroShot) -> Iterator[data.Result]:
    for task in found.tasks:
        shots = f", {task.num_fewshot} shots" if task.num_fewshot else ""
        for name, metric in task.metrics.items():
            share = metric.higher_is_better is not False and 0 <= metric.value <= 1
            if task.paper_metric == name if task.paper_metric in task.metrics else share:
                yield data.Result(
                    part="tasks",
                    name=f"{task.task}, {name}",
                    settings=f"{task.documents:,} items{shots}, {found.dtype}",
                    value=metric.value,
                    stderr=metric.stderr,
                    unit="%",
                    better="higher",
                    of=f"{task.version} {task.digest}",
                    in_mean=name == task.paper_metric,
                )


def _measurements(found: Measured) -> Iterator[data.Result]:
    if isinstance(found, Weighed) and found.bytes:
        yield data.Result(
            part="measured", name="size on disk", unit="B", value=found.bytes, better="lower"
        )
    if (speed := found.speed) is None:
        return
    where = "" if speed.threads is None else f", {speed.threads} threads"
    for stage, tokens, rate, rounds in (
        ("prefill", speed.prompt_tokens, speed.prefill_tokens_per_second, speed.prefill_seconds),
        ("decode", speed.new_tokens, speed.decode_tokens_per_second, speed.decode_seconds),
    ):
        read = tokens * speed.batch_size
        yield data.Result(
            part="measured",
            name=stage,
            settings=f"{tokens} tokens, batch {speed.batch_size}, {speed.dtype}, {speed.device}"
            + where,
            unit="tokens/s",
            value=rate,
            low=read / max(rounds) if len(rounds) > 1 else None,
            high=read / min(rounds) if len(rounds) > 1 else None,
            better="higher",
        )


def recovery_report(
    done: Recovered,
    earlier: data.Report | None,
    *,
    source: data.Source,
    pruned: bool,
    size: Size,
    command: str | None,
) -> data.Report:
    """Return the report of a recovered model, which carries on the ``earlier`` one.

    That is left as it is if the model was recovered before and it brought no gain. ``source`` and
    ``pruned`` say what it does not; ``size`` is the model's.
    """
    came: data.Variant = "pruned" if pruned else "dense"
    before: data.Variant | None = came
    if earlier is None:
        earlier = data.Report(source=source, sizes={came: size})
    else:
        # A second training starts from none of the models that a report has.
        before = None if earlier.final == "recovered" else earlier.final
    trained: dict[str, Any] = {}
    if done.gained or earlier.final != "recovered":  # else the model is what an earlier one left
        sizes, found = (
            {name: one for name, one in of.items() if name != "recovered"}
            for of in (earlier.sizes, earlier.evaluations)
        )
        trained = {
            "sizes": sizes | ({"recovered": size} if done.gained else {}),
            "evaluations": found,
            "recovery": data.Recovery(
                loss=_course(done),
                seconds=done.seconds,
                summary=_in_words(done),
                gained=done.gained,
                control=() if done.control is None else done.control.texts,
            ),
            "settings": {**earlier.settings, "Recovery": spaced(done.settings)},
            "seconds": {**earlier.seconds, "training": done.seconds},
        }
    report = earlier.model_copy(
        update={
            **trained,
            "saved_as": done.saved_as,
            "needs": done.needs,
            "versions": versions(),
            "command": " && ".join(dict.fromkeys(filter(None, (earlier.command, command)))) or None,
            "card_digest": None,
        }
    )
    measured: dict[data.Variant | None, Any] = {before: [one.before for one in done.perplexity]}
    if done.gained or before is None:  # else the model is the one that came in
        measured[report.final] = [one.after for one in done.perplexity]
    for variant, texts in measured.items():
        if variant is not None and texts:
            report = report.with_evaluation(variant, on_texts(texts))
    return report


def _course(done: Recovered) -> tuple[data.LossPoint, ...]:
    train = dict(enumerate(done.losses, start=1))
    held_out = {one.step: one.loss for one in done.evaluations}

    def known(loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None

    steps = sorted({*train, *held_out})
    points = ((step, known(train.get(step)), known(held_out.get(step))) for step in steps)
    return tuple(data.LossPoint(step=n, train=own, validation=other) for n, own, other in points)


def _in_words(done: Recovered) -> str:
    settings = done.settings
    teacher = settings["teacher"]
    said = _METHODS.get(settings["method"]) or f"LoRA of rank {settings['lora_r']}"
    wrote = {SELF: f"texts that {teacher} wrote", PRUNED: "texts that it wrote itself"}
    texts = [
        f"{one.train_samples:,} {wrote.get(one.name, f'samples of {one.name}')}"
        for one in done.sources
    ]
    said += f" on {' and '.join(texts)}, {done.steps:,} steps"
    if settings["distillation"] and teacher is not None:
        whose = "its" if SELF in {one.name for one in done.sources} else f"{teacher}'s"
        said += f", with {whose} predictions as the aim"
    return said
