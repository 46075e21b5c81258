"""What a report says of a run, its model and what was measured of it."""

from __future__ import annotations

import math
import os
import platform
import re
import struct
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
from llm_pruner.models.checkpoint_files import DEFAULT, local_path
from llm_pruner.planning import Plan
from llm_pruner.planning.constraints import removed_layers
from llm_pruner.report import data
from llm_pruner.report.records import (
    Abilities,
    Control,
    Measured,
    Pruned,
    Recovered,
    Weighed,
    ZeroShot,
)
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

    Args:
        discovery: of the dense model.
        scores: the first estimate, on the dense model.
        removal: all that was removed; layers that went whole went with all units in them.
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


_LICENCE = re.compile(rb"\x0f\0{7}general\.license\x08\0{3}(.{8})", re.DOTALL)
_GENERAL = 2**16
"""Bytes at the start of a GGUF file in which its general entries lie."""


def licence_of(model: str, revision: str | None) -> str | None:
    """Return the identifier of a model's licence, or None if no file at hand states it."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        if model == DEFAULT or (model.endswith(".gguf") and not expanded(model).is_dir()):
            return _gguf_licence(local_path(model))
        folder = expanded(model)
        card: Any = folder / data.CARD_FILE
        if not folder.exists():
            card = try_to_load_from_cache(model, data.CARD_FILE, revision=revision)
        found = ModelCard.load(Path(card)).data.license
        return found if isinstance(found, str) else None
    except Exception:  # readers raise anything, and what cannot be read is not known
        return None


def _gguf_licence(file: Path) -> str | None:
    """Return what a GGUF file says among its general entries, which come first.

    An entry is the length of its key, the key, a type and a value; that of a string is its length
    and bytes, all numbers little-endian. The reader of the ``gguf`` package reads the whole
    vocabulary as well, which takes seconds.
    """
    with file.open("rb") as stream:
        found = _LICENCE.search(stream.read(_GENERAL))
    if found is None:
        return None
    (length,) = struct.unpack("<Q", found[1])
    return found.string[found.end() : found.end() + length].decode("utf-8", "replace")


def evaluation_of(found: Measured | Abilities) -> data.Evaluation:
    """Return what was measured of one model as a part of its report."""
    tasks = [] if found.zero_shot is None else [*_scores(found.zero_shot)]
    parts: dict[str, Any] = {"tasks": tasks, "measurements": [*_shares(found)]}
    if isinstance(found, Measured):
        parts["measurements"] += _measurements(found)
        parts |= {"perplexity": found.perplexity, "samples": found.samples}
    return data.Evaluation.model_validate(parts)


def dense_evaluation(found: Measured, source: data.Source, size: Size | None) -> data.Evaluation:
    """Return what was measured of the dense model (of this name, size, weights) beside another."""
    name = source.name
    if (
        size is None
        or size.total != found.parameters_against
        or source.fingerprint not in (None, found.fingerprint_against)
    ):
        return data.Evaluation()
    texts = [one for one in found.perplexity if one.divergence and one.divergence.against == name]
    beside = data.Evaluation.model_validate({"perplexity": [one.dense for one in texts]})
    if found.dense is None or found.dense.model != name:
        return beside
    return beside.with_newer(evaluation_of(found.dense))


def against(found: Measured) -> str | None:
    """Return the name of the model that another one was compared with, if it was."""
    names = [one.divergence.against for one in found.perplexity if one.divergence]
    return next(iter(names), None if found.dense is None else found.dense.model)


def shares(found: Measured | Abilities) -> Iterator[tuple[str, Share, str | None]]:
    """Yield the shares that tell of skills and of long answers: what each is of, it, and the digest
    of what the model was asked.
    """
    for skill in found.skills:
        name = f"{skill.name} {skill.metric}, {skill.solved.count} of {skill.total} problems"
        yield name, skill.solved, skill.digest
    if (long := found.health) is not None:
        of = f"answers of {long.new_tokens} tokens, {long.looping.count} prompts, {long.prompts}"
        yield f"looping {of}", long.looping, long.digest
        yield f"endless {of}", long.endless, long.digest


def _shares(found: Measured | Abilities) -> Iterator[data.Measurement]:
    """Yield skills, health and what is kept above chance, each with its standard error around."""
    skills = len(found.skills)
    for number, (name, one, of) in enumerate(shares(found)):
        yield _between(name, "share", one.value, one.stderr, number < skills, of)
    if isinstance(found, Measured) and (kept := found.kept):
        results = () if found.zero_shot is None else found.zero_shot.tasks
        counted = [result for result in results if result.task in kept.tasks]
        items = sum(result.documents for result in counted)
        tasks = f"{', '.join(kept.tasks)} ({items:,} items)"
        kind = None if found.zero_shot is None else found.zero_shot.dtype
        of = digest_of([result.digest for result in counted], kind, found.fingerprint_against)
        beside = f"against {kept.against}, {tasks}"
        if kept.value is not None:
            name = f"accuracy above chance kept {beside}"
            yield _between(name, "share", kept.value, kept.stderr, True, of)
        if kept.flips is not None:
            name = f"answered right by one of both alone (flips) {beside}"
            yield _between(name, "share", kept.flips, kept.flips_stderr, False, of)


def _between(
    name: str, unit: str, value: float, error: float | None, higher: bool, of: str | None = None
) -> data.Measurement:
    return data.Measurement(
        name=name,
        unit=unit,
        value=value,
        low=None if error is None else value - error,
        high=None if error is None else value + error,
        better="higher" if higher else "lower",
        of=of,
    )


def _scores(found: ZeroShot) -> Iterator[data.TaskScore]:
    """Yield the metrics of each task that are shares of which more is better, such as ``acc``."""
    for result in found.tasks:
        for name, metric in result.metrics.items():
            if metric.higher_is_better is not False and 0 <= metric.value <= 1:
                yield data.TaskScore(
                    task=result.task,
                    metric=name,
                    value=metric.value,
                    stderr=metric.stderr,
                    items=result.documents,
                    in_mean=name == result.paper_metric,
                    version=result.version,
                    shots=result.num_fewshot,
                    digest=result.digest,
                    dtype=found.dtype,
                )


def _measurements(found: Measured) -> Iterator[data.Measurement]:
    """Yield the size of the weights, the divergence with its standard error around it, and the
    speeds with their slowest and fastest round.
    """
    if isinstance(found, Weighed) and found.bytes:
        yield data.Measurement(name="size on disk", unit="B", value=found.bytes, better="lower")
    for text in found.perplexity:
        if (far := text.divergence) is not None:
            on = data.Perplexity.model_validate(text).label
            of = digest_of(text.ids_digest, found.fingerprint_against)
            for name, unit, value, error in (
                ("KL", "nats", far.kl, far.kl_stderr),
                ("likeliest token changed", "share", far.changed, far.changed_stderr),
            ):
                name = f"{name} against {far.against}, {on}"
                yield _between(name, unit, value, error, False, of)
    speed = found.speed
    if speed is None:
        return
    where = "" if speed.threads is None else f", {speed.threads} threads"
    how = "" if speed.dtype is None else f", {speed.dtype}, {speed.device}{where}"
    for stage, tokens, rate, rounds in (
        ("prefill", speed.prompt_tokens, speed.prefill_tokens_per_second, speed.prefill_seconds),
        ("decode", speed.new_tokens, speed.decode_tokens_per_second, speed.decode_seconds),
    ):
        read = tokens * speed.batch_size
        yield data.Measurement(
            name=f"{stage} ({tokens} tokens, batch {speed.batch_size}{how})",
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
    if earlier is None:
        came: data.Variant = "pruned" if pruned else "dense"
        before: data.Variant | None = came
        earlier = data.Report(source=source, sizes={came: size})
    else:
        # What trained a model that was trained already starts from no model of the three.
        before = None if earlier.final == "recovered" else earlier.final
    trained: dict[str, Any] = {}
    if done.gained or earlier.final != "recovered":  # else the model is what an earlier one left
        kept = {name: of for name, of in earlier.sizes.items() if name != "recovered"}
        trained = {
            "sizes": kept | ({"recovered": size} if done.gained else {}),
            "evaluations": {
                name: of for name, of in earlier.evaluations.items() if name != "recovered"
            },
            "recovery": data.Recovery(
                loss=_course(done),
                seconds=done.seconds,
                summary=_in_words(done),
                gained=done.gained,
                control=control_of(done.control),
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
    if done.perplexity:
        old, new = zip(*((one.before, one.after) for one in done.perplexity), strict=True)
        found_of: dict[data.Variant | None, Any] = {before: old}
        if done.gained or before is None:  # else it is the model that came in
            found_of[report.final] = new
        for variant, found in found_of.items():
            if variant is not None:
                measured = data.Evaluation.model_validate({"perplexity": found})
                report = report.with_evaluation(variant, measured)
    return report


def control_of(control: Control | None) -> tuple[data.ControlText, ...]:
    """Return the control on each text, for a page or a table."""
    texts = () if control is None else control.texts
    return tuple(
        data.ControlText(
            text=f"{text.dense.corpus}, {text.dense.tokens:,} tokens",
            rows=tuple(_control_row(name, found) for name, found in text.rows.items()),
            damage=text.damage,
        )
        for text in texts
    )


def _control_row(name: str, found: PerplexityResult) -> data.ControlRow:
    far = found.divergence
    of = {} if far is None else {"kl": far.kl, "kl_stderr": far.kl_stderr, "changed": far.changed}
    return data.ControlRow(model=name, perplexity=found.perplexity, stderr=found.stderr, **of)


def _course(done: Recovered) -> tuple[data.LossPoint, ...]:
    """Return the loss of each step and each score of the held-out samples, by step."""
    train = dict(enumerate(done.losses, start=1))
    held_out = {one.step: one.loss for one in done.evaluations}
    return tuple(
        data.LossPoint(
            step=step, train=_known(train.get(step)), validation=_known(held_out.get(step))
        )
        for step in sorted({*train, *held_out})
    )


def _in_words(done: Recovered) -> str:
    """Return how a model was trained, in words that follow "recovered by"."""
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


def _known(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
