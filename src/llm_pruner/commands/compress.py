"""Prune, measure, recover, measure and report, in stages that are each kept and done once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from transformers import AutoConfig

from llm_pruner.commands.compress_start import about, check_settings
from llm_pruner.commands.evaluate import measure_apart
from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.prune_start import target_of
from llm_pruner.commands.recover import recover_checkpoint
from llm_pruner.commands.vocab import RECORD, vocab
from llm_pruner.commands.workdir import (
    COMPRESSING,
    RECOVERING,
    Work,
    move_result,
    opened,
    read_values,
)
from llm_pruner.data.selfmade import CHUNK
from llm_pruner.data.text import DEMO_PROMPTS, SELF
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.disk import remove
from llm_pruner.files.outputs import RECOVERY_FILE, check_place, rewrite
from llm_pruner.models.checkpoint_files import stored_at, weight_names
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.load import load
from llm_pruner.recovery import Progress
from llm_pruner.recovery.checkpoint import last_checkpoint
from llm_pruner.report.data import Report, Source, Variant, known_report
from llm_pruner.report.facts import evaluation_of, source_of
from llm_pruner.report.records import Change, Compressed, Measured, Training, Weighed
from llm_pruner.report.write import page_in, write_report, write_request
from llm_pruner.runtime.processes import only_one
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import EvaluateSettings
from llm_pruner.settings.recover import RecoverSettings
from llm_pruner.types import Size

SAMPLES = 256
"""Texts that the dense model writes where there is no time budget; more if importance was estimated
on so many of them that none would be left to judge training by."""

MOST_SAMPLES = 2048
"""The same where there is one, however long."""

EPOCHS_IN_TIME = 3
"""Most passes over the data where there is a time budget."""

WINDOW = 512
"""Tokens in a window for perplexity, if the model reads so many: more windows than of its maximum,
so that short texts have a standard error."""

SHORTEST = 60.0
"""Seconds below which training is not begun."""

WRITING = 1 / 3
"""Share of the time for recovery in which the dense model may write text to train on."""

_STARTING = 10.0
"""Seconds for what is not timed: starting Python, and drawing the report."""

_RESULT = "result"

_TRAINING = Annotated[
    Training, BeforeValidator(lambda of: {**of, "before": of["loss"][0], "after": of["loss"][1]})
]
"""What a finished recovery wrote of itself."""


def compress(
    settings: CompressSettings,
    *,
    command: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    say: Callable[[Progress], None] = lambda _: None,
    going_on: Callable[[Path], None] = lambda _: None,
) -> Compressed:
    """Make a smaller model of ``settings.model`` in the folder ``settings.out``.

    Until it is done all lies in a folder beside ``out`` with the ending ``.compressing``. A run
    that was interrupted goes on there with the stages that are missing; without a time budget it
    ends with the same weights, plan and figures as one that was not.

    Args:
        tell: is told each stage as it begins.
        say: is told the course of the training.
        going_on: is told the folder of an interrupted run that goes on.

    Raises:
        UserError: something that was given must change.
    """
    only_one("compress")
    settings.check()
    out, work = settings.out, COMPRESSING.beside(settings.out)
    check_place(out, "--out")
    if not (work / f"{_RESULT}.json").is_file() or settings.restart:
        check_settings(settings, work)
    facts = about(settings)
    with opened(work, facts, restart=settings.restart) as run:
        if run.continued:
            going_on(work)
        stages = _Stages(settings, run, command, tell, say, facts)
        try:
            done = run.once(_RESULT, Compressed, stages.all, "report")
        except UserError:
            if not run.path("pruned").exists():
                run.remove()  # nothing was done that is worth going on with
            raise
        tell("moving the result into place")
        folder = run.path(last_stage(done.recovery))
        move_result(folder, out, settings.overwrite, settings.reads)
        seconds, peak = run.seconds, max(run.peak_bytes, done.peak_bytes)
        run.remove()
    notes = [*done.notes, *result_cache.shared_corpora(str(out), settings.perplexity)]
    return replace(done, report=page_in(out), notes=notes, seconds=seconds, peak_bytes=peak)


def last_stage(recovery: Training | None) -> str:
    """Return the name of the folder that becomes the result."""
    return "pruned" if recovery is None else "recovered"


@dataclass
class _Stages:
    """The stages of one run; each looks for its output first.

    Attributes:
        facts: see ``about``.
        start: the model with fewer tokens, which all later stages start from; None if all stay.
        before: what a report says of the model that had them all.
    """

    settings: CompressSettings
    run: Work
    command: str | None
    tell: Callable[[str], None]
    say: Callable[[Progress], None]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    start: Path | None = None
    before: Report | None = None

    def __post_init__(self) -> None:
        self.text = self.run.path("text")  # that the dense model wrote
        self.pruning = self.settings.pruning(self.run.path("pruned")).but(kept=self.text)
        self.training = self.settings.trains()

    def all(self) -> Compressed:
        """Do what is missing; return what is known of the result."""
        self.measure("dense")
        if self.settings.vocab_text:
            self.take_tokens()
        self.prune()
        measured: dict[Variant, Weighed] = {
            name: self._weighed(name) for name in ("dense", "pruned")
        }
        recovery = self.recover()
        if recovery is not None and recovery.gained:
            measured["recovered"] = self._weighed("recovered")
        return self.report(measured, recovery)

    def take_tokens(self) -> None:
        """Write the model with fewer tokens; only the rest of the size is pruned."""
        settings, dense = self.settings, load(self.settings.computing(), weights=False)
        as_stored = dense.stored_dtype if settings.dtype == "auto" else None
        target, size = target_of(self.pruning), model_size(dense.model, as_stored)
        assert target is not None
        asked = target.kept(size.total)
        source = source_of(settings.model, dense.name, dense.revision, dense.model)
        self.before = Report(source=source, sizes={"dense": size})
        self.start = self.run.path("vocab") / Path(dense.name).name  # so that it has that name
        if not self.start.is_dir():
            remove(self.start.parent)  # of a process that was killed
            self.tell("taking out tokens")
            vocab(settings.fewer_tokens(self.start))
            self.run.record_time("vocab")
        left = self._taken("parameters").after
        if left <= asked:
            raise UserError(
                f"without the tokens, {left:,} parameters are left, and {asked:,} are asked for: "
                "remove more by --ratio or --params, keep more tokens by --set vocab_size, or take "
                "tokens alone with llm-pruner vocab"
            )
        pruning = settings.pruning(self.run.path("pruned"), self.start)
        self.pruning = pruning.but(kept=self.text, ratio=None, params=asked)

    def _taken(self, what: str) -> Change[int]:
        """Return how many tokens, or parameters, the model had and has with fewer tokens."""
        assert self.start is not None
        return Change(**read_values(self.start / RECORD)[what])

    def _of_all_tokens(self, report: Report) -> Report:
        """Return the report of a model with fewer tokens as one of the model that had them all."""
        if self.before is None:
            return report
        left, tokens = dict(report.sizes), self._taken("tokens")
        sizes = {**self.before.sizes, "trimmed": left.pop("dense", Size(0)), **left}
        changed = {"sizes": sizes, "tokens": (tokens.before, tokens.after)}
        return report.model_copy(update={"source": self.before.source, **changed})

    def prune(self) -> None:
        """Write the folder ``pruned``."""
        if not self.pruning.out.is_dir():
            self.tell("pruning")
            PruneRun(self.pruning, command=self.command).carry_out()
            self.run.record_time("prune")

    def measure(self, variant: Variant) -> Measured:
        """Return what was measured of a model, in its own process."""

        def make() -> Measured:
            self.tell(f"measuring the {variant} model")
            settings, folder = self.settings, self.run.path(variant)
            asked = EvaluateSettings(
                **settings.computing(None if variant == "dense" else folder).written(),
                perplexity=settings.perplexity,
                tasks=settings.tasks,
                tasks_data=settings.tasks_data,
                limit=settings.limit,
                prompt=DEMO_PROMPTS,
                chat=False,
                speed=True,
            )
            return measure_apart(asked, WINDOW)

        return self.run.once(variant, Measured, make)

    def _dense(self) -> str:
        """Return the model that is pruned by one name, without a revision."""
        if self.start is not None:
            return str(self.start)
        if self.settings.revision is None:
            return self.settings.model
        stored = stored_at(self.settings.model, self.settings.revision)
        assert stored is not None  # since it was pruned
        return str(stored)

    def _weighed(self, variant: Variant) -> Weighed:
        """Return the same with the bytes of weight files; a packed ``.gguf`` says nothing."""
        settings, place, size = self.settings, self.run.path(variant), None
        if variant == "dense":
            place = stored_at(settings.model, settings.revision) or place
        if place.is_dir():
            size = sum((place / name).stat().st_size for name in weight_names(place))
        return Weighed(**vars(self.measure(variant)), bytes=size)

    def recover(self) -> Training | None:
        """Write the folder ``recovered``; return the course of it, None if nothing is trained."""
        if not self.settings.recover:
            return None
        out = self.run.path("recovered")
        try:
            amount = self._amount()
            if "skipped" in amount:
                self.notes.append(amount["skipped"])
                return None
            if not out.is_dir():
                self.tell("recovering")
                recover_checkpoint(self._recovering(amount), command=self.command, say=self.say)
                self.run.record_time("recover")
        except (UserError, torch.OutOfMemoryError) as error:
            full = isinstance(error, torch.OutOfMemoryError)
            # What was learned is not thrown away, unless there is no room to go on either.
            if last_checkpoint(RECOVERING.beside(out)) is not None and not (
                full and self.run.continued
            ):
                raise
            why = "the GPU has no room to train in" if full else error
            self.notes.append(f"recovery was refused, so the pruned model is the result: {why}")
            return None
        found: Training = read_values(out / RECOVERY_FILE, _TRAINING)
        if not found.gained:
            self.notes.append(
                f"training brought no gain (held-out loss {found.before:.4f} before, "
                f"{found.after:.4f} after), so the pruned model is the result; use more data or a "
                "longer --time-budget"
            )
        return found

    def _recovering(self, amount: Mapping[str, Any]) -> RecoverSettings:
        """Return how the pruned model is trained: by the least of what was asked and decided."""
        limits = {"max_minutes": amount.get("minutes"), "epochs": amount.get("epochs")}
        for name in limits.keys() & self.settings.training.keys():
            both = [getattr(self.training, name), limits[name]]
            limits[name] = min(one for one in both if one is not None)
        limits = {name: of for name, of in limits.items() if of is not None}
        training = self.training.but(seq_len=self._sample_length(), **limits)
        return RecoverSettings(
            **training.written(),
            **self.settings.loading(self.run.path("pruned")).written(),
            out=self.run.path("recovered"),
            data=self.settings.data,
            samples=amount.get("samples"),
            self_samples=amount.get("written"),
            kept=self.text,
            teacher=self._dense(),
            control=self._dense() if self.settings.control else None,
            resume=True,
            max_shard_size=self.settings.max_shard_size,
        )

    def _amount(self) -> dict[str, Any]:
        """Return how much is trained; where time decides it, the first decision holds."""
        samples, budget = self.settings.samples, self.settings.time_budget
        writes = SELF in self.settings.data
        if budget is None:
            count = samples or max(SAMPLES, self._calibrated() + CHUNK)
            return {"samples": samples, "written": count if writes else None}

        def decide() -> dict[str, Any]:
            report, settings = self._pruned_report(), self.settings
            left = budget - self.run.spent - self._around(report.seconds)
            times, sizes = 1.0, report.sizes
            if settings.control:  # is trained as well, which takes longer by its size
                times += sizes["dense"].total / sizes["pruned"].total if "dense" in sizes else 1.0
            count, writing = samples, 0.0
            if writes and samples is None:
                count, writing = self._texts_in(WRITING * left, report.seconds)
            seconds = (left - writing) / times
            if seconds < SHORTEST:
                return {
                    "skipped": f"the time budget leaves {max(seconds, 0):.0f} s for recovery, and "
                    f"less than {SHORTEST:.0f} s are not worth it: the pruned model is the result"
                }
            amount = {"samples": samples, "written": count if writes else None}
            return {**amount, "minutes": seconds / 60, "epochs": float(EPOCHS_IN_TIME)}

        return self.run.once("amount", dict[str, Any], decide, "recover")

    def _around(self, pruning: Mapping[str, float]) -> float:
        """Return the seconds after recovery, and for loading and saving around it."""
        measured = 1 + 2 * self.settings.control
        around = 3 * pruning.get("load", 0.0) + pruning.get("save", 0.0)
        return around + 1.1 * measured * self.run.seconds.get("pruned", 0.0) + _STARTING

    def _texts_in(self, seconds: float, pruning: Mapping[str, float]) -> tuple[int, float]:
        """Return how many texts are trained on, and the seconds that writing the rest takes.

        The model wrote text for its pruning, so the speed is known; else it is taken to write
        ``SAMPLES`` in that time.
        """
        there, took = self._calibrated(), pruning.get("calibration text", 0.0)
        if not there or not took:
            return SAMPLES, seconds
        chunks = int(max(1.0, min(seconds * there / took, MOST_SAMPLES - there) / CHUNK))
        return there + CHUNK * chunks, CHUNK * chunks * took / there

    def report(self, measured: dict[Variant, Weighed], recovery: Training | None) -> Compressed:
        """Write the report of all stages beside the weights."""
        self.tell("writing the report")
        before, *_, after = (found.parameters for found in measured.values())
        result = Compressed(
            path=self.settings.out,
            model=measured["dense"].model,
            parameters=Change(before, after),
            ratio=1 - after / before,
            measured=measured,
            recovery=recovery,
            notes=self.notes,
            peak_bytes=self.run.peak_bytes,
            tokens=None if self.start is None else self._taken("tokens"),
        )
        folder = self.run.path(last_stage(recovery))
        if self.start is not None:
            rewrite(folder, {RECORD: (self.start / RECORD).read_text(encoding="utf-8")})
        report = known_report(folder)
        if report is None:
            return result  # it could not be drawn before, which was said
        report = self._of_all_tokens(report)
        for variant, found in measured.items():
            report = report.with_evaluation(variant, evaluation_of(found))
        shown = self.facts
        budget, peak = self.settings.time_budget, result.peak_bytes
        run = {
            "preset": shown["preset"],
            "data": shown["data"] if recovery is not None else None,
            "time budget": budget and f"{budget:.0f} s",
            "seconds": {name: round(value, 1) for name, value in self.run.seconds.items()},
            "peak memory": f"{peak / 1e6:,.0f} MB" if peak else None,
        }
        if self.start is not None:
            run["vocab"] = {"text": shown["vocab_text"], "size": self.settings.vocab_size}
        settings = {"Run": run, **report.settings}
        report = report.model_copy(update={"settings": settings, "command": self.command})
        write_report(folder, lambda: report)
        write_request(folder, self.settings)
        return result

    def _pruned_report(self) -> Report:
        bare = Report(source=Source(name=self.settings.model))
        return known_report(self.run.path("pruned")) or bare

    def _sample_length(self) -> int:
        """Return the tokens in a sample: as in self-made calibration text, which is used again."""
        if self._calibrated():
            return self.pruning.seq_len
        config = AutoConfig.from_pretrained(
            self.run.path("pruned"), trust_remote_code=self.settings.trust_remote_code
        )
        longest, wanted = maximum_length(SimpleNamespace(config=config)), self.training.seq_len
        return wanted if longest is None else min(wanted, longest)

    def _calibrated(self) -> int:
        """Return how many of the texts to train on importance is estimated on, too."""
        shared = SELF in self.settings.data and self.pruning.calibration == SELF
        for name in ("seq_len", "seed"):
            own = getattr(self.pruning, name)
            shared &= self.settings.training.get(name, own) == own
        return self.pruning.samples if shared else 0
