"""Prune, measure, recover, measure and report, in stages that are each kept and done once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from transformers import AutoConfig

from llm_pruner.checkpoints import packed
from llm_pruner.commands.abilities import prepare_tasks
from llm_pruner.commands.evaluate import measure_apart, read_texts
from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.prune_start import check_space, criterion_of, selection_of, target_of
from llm_pruner.commands.publish import check_push
from llm_pruner.commands.recover import (
    check_training,
    read_examples,
    recover_checkpoint,
    ways_to_load,
)
from llm_pruner.commands.vocab import RECORD, vocab
from llm_pruner.commands.workdir import (
    COMPRESSING,
    RECOVERING,
    RUN,
    Work,
    content,
    contents,
    move_result,
    opened,
    read_values,
)
from llm_pruner.data.calibration import check_calibration
from llm_pruner.data.examples import Examples
from llm_pruner.data.files import BEGINNING
from llm_pruner.data.selfmade import CHUNK, write_text_cached
from llm_pruner.data.text import DEMO_PROMPTS, PRUNED, SELF, shares_of
from llm_pruner.data.training import check_samples
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import check_windows
from llm_pruner.files.disk import remove, tidy
from llm_pruner.files.outputs import (
    RECOVERY_FILE,
    check_output,
    check_place,
    check_shard_size,
    rewrite,
    write_output,
)
from llm_pruner.models.checkpoint_files import (
    stored_at,
    stored_size,
    weight_names,
)
from llm_pruner.models.forward import embedding_rows, maximum_length
from llm_pruner.models.layers import has_recipe
from llm_pruner.models.load import check, load, load_tokenizer
from llm_pruner.recovery import Progress
from llm_pruner.recovery.checkpoint import last_checkpoint
from llm_pruner.report.data import Report, Source, Variant, known_report
from llm_pruner.report.facts import evaluation_of, source_of
from llm_pruner.report.records import Change, Compressed, Measured, Training, Weighed
from llm_pruner.report.write import page_in, write_report, write_request
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.processes import ALONE, check_trains, only_one, own_device
from llm_pruner.settings.common import OutputSettings
from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.evaluate import EvaluateSettings, PerplexitySettings
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.settings.recover import RecoverSettings, TrainingSettings
from llm_pruner.types import Size
from llm_pruner.version import __version__

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
_TAKES_LONG = ("pruned", "dense.json", "text")
"""What a run has that took it long."""

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
    first: Callable[[Measured], None] | None = None,
) -> Compressed:
    """Make a smaller model of ``settings.model`` in the folder ``settings.out``.

    Until it is done all lies in a folder beside ``out`` with the ending ``.compressing``. A run
    that was interrupted goes on from there with the stages that are missing; without a time budget
    it ends with the same weights, plan and figures, speeds and times apart, as one that was not.
    With one, what was decided by measured speed is decided once.

    Args:
        tell: is told each stage as it begins.
        going_on: is told the folder of an interrupted run that goes on.
        first: is told the size and the perplexities of the dense model before anything is pruned;
            without it they are measured after pruning, which may find that the settings cannot be
            met.

    Raises:
        UserError: something that was given must change.
    """
    only_one("compress")
    settings.check()
    out, restart = settings.out, settings.restart
    check_place(out, "--out")
    check_push(settings)
    work = COMPRESSING.beside(out)
    tidy(work)
    if not work.is_dir():
        # The model with fewer tokens, the pruned one, the recovered one and the quantized one.
        copies = bool(settings.vocab_text) + 1 + settings.recover + (settings.quantize != "none")
        check_space(out, settings.loading(), target_of(settings.pruning(out)), copies=copies)
    if not (work / f"{_RESULT}.json").is_file() or restart:
        check_settings(settings)
    facts = about(settings)
    with opened(work, facts, restart=restart) as run:
        if run.continued:
            going_on(work)
        stages = _Stages(settings, run, command, tell, say, first, facts)
        try:
            done = run.once(_RESULT, Compressed, stages.all, "report")
        except UserError:
            if not any(run.path(name).exists() for name in _TAKES_LONG):
                run.remove()  # nothing was done that is worth going on with
            raise
        tell("moving the result into place")
        folder = run.path(last_stage(done.measured, done.recovery))
        move_result(folder, out, settings.overwrite, settings.reads)
        seconds, peak = run.seconds, max(run.peak_bytes, done.peak_bytes)
        run.remove()
    notes = [*done.notes, *result_cache.shared_corpora(str(out), settings.perplexity)]
    return replace(done, report=page_in(out), notes=notes, seconds=seconds, peak_bytes=peak)


def check_settings(settings: CompressSettings) -> None:
    """Raise UserError for what can be refused before a model is loaded."""
    check_output(settings.out, settings.overwrite, settings.reads)
    pruning = settings.pruning(settings.out)
    selection_of(pruning)
    criterion_of(pruning)
    found: list[Examples] = []
    if settings.recover:
        check_trains(settings.device)
        trains, minutes = settings.trains(), (settings.time_budget or 0) / 60
        check_training(trains.but(max_minutes=trains.max_minutes or minutes) if minutes else trains)
        _require_room(settings)
        if PRUNED in settings.data:
            raise UserError(
                "--data pruned is for recover --distill-weight 1, which teaches by the dense model "
                "alone; use self, or prune first and then recover"
            )
        trained = RecoverSettings(model=settings.model, data=settings.data, out=settings.out)
        found = [*read_examples(trained.but(samples=BEGINNING)).values()]
    check_calibration(pruning)
    texts = read_texts(settings.perplexity, PerplexitySettings())
    check_shard_size(settings.max_shard_size)
    if settings.tasks is not None:
        prepare_tasks(settings)
    config = check(settings.loading())  # None of a .gguf file, which transformers knows
    own = config is not None and not type(config).__module__.startswith("transformers.")
    if settings.quantize != "none" and own:
        raise UserError(
            f"--quantize {settings.quantize} is for models whose code is in transformers, and "
            f"{settings.model} has its own; leave --quantize out"
        )
    if settings.quantize != "none" and not has_recipe(config):  # whose config alone says nothing
        model = load(settings.loading().but(device="cpu"), weights=False).model
        packed.check_packs(model, settings.model)
    tokenizer = load_tokenizer(settings.loading())
    if not settings.vocab_text:  # of fewer tokens a text gives more
        with _said_of_presets():
            check_calibration(pruning, settings.loading())
    shell = SimpleNamespace(config=config)
    windows = PerplexitySettings(seq_len=min(WINDOW, maximum_length(shell) or WINDOW))
    for text in texts:
        check_windows(shell, tokenizer, text, windows, option=None)
    for one in found:  # a chat template may refuse what is only trained on after pruning
        check_samples(one, tokenizer, seq_len=settings.trains().seq_len)


def _require_room(settings: CompressSettings) -> None:
    """Raise UserError if the teacher alone is larger than the memory: recovery has it whole."""
    size = stored_size(settings.model, settings.revision, settings.dtype)
    free = free_bytes(own_device(settings.device))
    if size is not None and size[1] > free:
        raise UserError(
            f"{settings.model} takes {size[1] / 1e9:.1f} GB, where {free / 1e9:.1f} GB of memory "
            "are free, and recovery has it there whole, as the teacher, beside the pruned model; "
            "add --no-recover, or run it where there is more memory"
        )


@contextmanager
def _said_of_presets() -> Iterator[None]:
    """Say of options of ``prune`` that are asked for where they come from here."""
    try:
        yield
    except UserError as error:
        if re.search(r"--(samples|seq-len)\b", str(error)):
            where = "compress has that from its --preset: name another, or a YAML file"
            raise UserError(f"{error} ({where})") from error
        raise


def last_stage(measured: Collection[Variant], recovery: Training | None) -> str:
    """Return the name of the folder that becomes the result."""
    if "quantized" in measured:
        return "quantized"
    return "pruned" if recovery is None else "recovered"


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
    first: Callable[[Measured], None] | None
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
        if self.first is not None:
            self.measure("dense", self.first)
        if self.settings.vocab_text:
            self.take_tokens()
        self.prune()
        measured: dict[Variant, Weighed] = {
            name: self._weighed(name) for name in ("dense", "pruned")
        }
        recovery = self.recover()
        if recovery is not None and recovery.gained:
            measured["recovered"] = self._weighed("recovered")
            self._note_higher_perplexity(measured)
        if self.quantize(last_stage(measured, recovery)):
            measured["quantized"] = self._weighed("quantized")
        return self.report(measured, recovery)

    def take_tokens(self) -> None:
        """Write the model with fewer tokens, and ask of pruning what is missing then, if any."""
        settings, dense = self.settings, load(self.settings.computing(), weights=False)
        as_stored = dense.stored_dtype if settings.dtype == "auto" else None
        target, size = target_of(self.pruning), model_size(dense.model, as_stored)
        assert target is not None
        asked = target.kept(size.total)
        source = source_of(settings.model, dense.name, dense.revision, dense.model)
        self.before = Report(source=source, sizes={"dense": size})
        self.start = self.run.path("vocab") / Path(dense.name).name  # so that it has that name
        if not self.start.is_dir():
            if (tokens := settings.vocab_size) is not None:
                rows = embedding_rows(dense.model)
                gone = (size.embedding or 0) // rows * (rows - tokens)
                _check_rest(asked, size.total - gone)
            remove(self.start.parent)  # of a process that was killed as it wrote
            self.tell("taking out tokens")
            vocab(settings.fewer_tokens(self.start))
            self.run.record_time("vocab")
        _check_rest(asked, self._taken("parameters").after)
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
        if self.pruning.out.is_dir():
            return
        if self.settings.recover:
            _require_room(self.settings)  # of a model that has just been downloaded
        self.tell("pruning")
        with _said_of_presets():
            PruneRun(self.pruning, command=self.command).carry_out()
        self.run.record_time("prune")

    def measure(
        self, variant: Variant, first: Callable[[Measured], None] = lambda _: None
    ) -> Measured:
        """Return what was measured of a model, in its own process; tell what is known first."""

        def make() -> Measured:
            self.tell(f"measuring the {variant} model")
            settings, folder = self.settings, self.run.path(variant)
            # What packing costs is told apart from what pruning does by the distance of both.
            compared = settings.quantize != "none" and variant != "dense"
            against = self._dense() if compared else None
            asked = EvaluateSettings(
                **settings.computing(None if variant == "dense" else folder).written(),
                perplexity=settings.perplexity,
                tasks=settings.tasks,
                tasks_data=settings.tasks_data,
                limit=settings.limit,
                prompt=DEMO_PROMPTS,
                chat=False,
                speed=True,
                against=against,
            )
            return measure_apart(asked, WINDOW, first, strict=False)

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
        try:
            plan = self._amount()
        except (UserError, torch.OutOfMemoryError) as error:
            self._note_refusal(error)
            return None
        if "skipped" in plan:
            self.notes.append(plan["skipped"])
            return None
        out = self.run.path("recovered")
        if not out.is_dir():
            self.tell("recovering")
            limits: dict[str, Any] = {"max_minutes": plan["minutes"], "epochs": plan["epochs"]}
            for name in limits.keys() & self.settings.training.keys():  # the less of both holds
                own = getattr(self.training, name)
                limits[name] = own if limits[name] is None else min(own, limits[name])
            training = self.training.but(seq_len=self._sample_length(), **limits)
            settings = self._recovering(training)
            settings = settings.but(samples=plan["samples"], self_samples=plan.get("written"))
            kept = RECOVERING.beside(out)
            if (kept / RUN).is_file() and last_checkpoint(kept) is None:
                # Nothing was trained, so it may begin with other samples than it was to have.
                write_output(kept / RUN, "{}\n")
            try:
                recover_checkpoint(settings, command=self.command, say=self.say)
            except (UserError, torch.OutOfMemoryError) as error:
                # What was learned is not thrown away, unless going on ends for want of room again.
                full = isinstance(error, torch.OutOfMemoryError) and self.run.continued
                if last_checkpoint(kept) is not None and not full:
                    raise
                self._note_refusal(error)
                return None
            self.run.record_time("recover")
        found: Training = read_values(out / RECOVERY_FILE, _TRAINING)
        if not found.gained:
            self.notes.append(
                f"training brought no gain (held-out loss {found.before:.4f} before, "
                f"{found.after:.4f} after), so the pruned model is the result; use more data or a "
                "longer --time-budget"
            )
        return found

    def _recovering(self, training: TrainingSettings) -> RecoverSettings:
        return RecoverSettings(
            **training.written(),
            **self.settings.loading(self.run.path("pruned")).written(),
            out=self.run.path("recovered"),
            data=self.settings.data,
            kept=self.text,
            teacher=self._dense(),
            control=self._dense() if self.settings.control else None,
            resume=True,
            max_shard_size=self.settings.max_shard_size,
        )

    def _note_refusal(self, error: Exception) -> None:
        full = isinstance(error, torch.OutOfMemoryError)
        why = "the GPU has no room to train in" if full else error
        self.notes.append(f"recovery was refused, so the pruned model is the result: {why}")

    def quantize(self, stage: str) -> bool:
        """Write the folder ``quantized``; return whether it is asked for and not refused."""
        source, out = self.run.path(stage), self.run.path("quantized")
        if out.is_dir() or self.settings.quantize == "none":
            return out.is_dir()
        self.tell("quantizing")

        def beside(folder: Path, model: Any) -> None:
            if (report := known_report(folder)) is not None:
                changed = {"sizes": report.sizes | {"quantized": model_size(model)}}
                write_report(folder, lambda: report.model_copy(update=changed))

        size = self.settings.max_shard_size
        try:
            packed.save_packed(source, out, max_shard_size=size, beside=beside)
        except UserError as error:
            self.notes.append(f"weights were not packed, so they are as they were: {error}")
            return False
        self.run.record_time("quantize")
        return True

    def _amount(self) -> dict[str, Any]:
        """Return how much is trained; where time decides it, the first decision holds."""
        samples, budget = self.settings.samples, self.settings.time_budget
        writes = SELF in self.settings.data
        if budget is None:
            count = samples or max(SAMPLES, self._calibrated() + CHUNK)
            amount = {"minutes": None, "epochs": self.training.epochs}
            return {"samples": samples, "written": count if writes else None, **amount}

        def decide() -> dict[str, Any]:
            left = time_to_recover(
                budget,
                self.run.spent,
                self.run.seconds,
                self._pruned_report().seconds,
                measured=1 + (self.settings.quantize != "none") + 2 * self.settings.control,
            )
            times = trainings(self._pruned_report().sizes, self.settings.control)
            least = SHORTEST * times
            if left < least:
                return {
                    "skipped": f"the time budget leaves {max(left, 0):.0f} s for recovery, and less"
                    f" than {least:.0f} s are not worth it: the pruned model is the result"
                }
            end = self.run.spent + left
            count = None
            if writes and samples is None:
                self.tell("writing text to train on")
                count = self._write(WRITING * left)
            minutes = max((end - self.run.spent) / times, SHORTEST / 2) / 60
            amount = {"samples": samples, "written": count}
            return {**amount, "minutes": minutes, "epochs": float(EPOCHS_IN_TIME)}

        return self.run.once("amount", dict[str, Any], decide, "text" if writes else "recover")

    def _write(self, seconds: float) -> int:
        """Have the dense model write for a time; return the number of texts."""
        here = self._recovering(self.training).but(device=own_device(self.settings.device))
        loaded = load(ways_to_load(here, ALONE)["teacher"])  # in which recovery has it
        seq_len, seed = self._sample_length(), self.training.seed

        def write(number: int) -> None:
            size = {"samples": CHUNK * (number + 1), "seq_len": seq_len, "seed": seed}
            write_text_cached(loaded.model, loaded.tokenizer, self.text, source=SELF, **size)

        there = len(list(self.text.glob(f"{seq_len}-{seed}-*.safetensors")))
        chunks = -(-self._calibrated() // CHUNK)
        took = self._pruned_report().seconds.get("calibration text", 0.0)
        longest, most = took / chunks if chunks else 0.0, MOST_SAMPLES // CHUNK
        return CHUNK * chunks_in_time(there, most, seconds, write, longest=longest)

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
        folder = self.run.path(last_stage(measured, recovery))
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

    def _note_higher_perplexity(self, measured: dict[Variant, Weighed]) -> None:
        pairs = zip(measured["pruned"].perplexity, measured["recovered"].perplexity, strict=True)
        for before, after in pairs:
            if after.perplexity > before.perplexity:
                self.notes.append(
                    f"perplexity on {after.corpus} rose from {before.perplexity:.2f} to "
                    f"{after.perplexity:.2f} by training, though the text that was held out "
                    "from it gained; train on text more like it, with --data"
                )

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


def _check_rest(asked: int, left: int) -> None:
    """Raise UserError if a model has no more parameters than asked for without its tokens."""
    if left <= asked:
        raise UserError(
            f"without the tokens, {left:,} parameters are left, and {asked:,} are asked for, so "
            "nothing is pruned: remove more by --ratio or --params, keep more tokens by "
            "--vocab-size, or take tokens alone with llm-pruner vocab"
        )


def time_to_recover(
    budget: float,
    spent: float,
    stages: Mapping[str, float],
    pruning: Mapping[str, float],
    measured: int = 1,
) -> float:
    """Return the seconds that writing text and training may take; negative if none are left.

    What is kept back of the budget of the whole run: measuring the recovered model, or as many as
    ``measured`` says, each as long as the pruned one took; loading it with its teacher and reading
    it again if there was no gain; saving.
    """
    around = 3 * pruning.get("load", 0.0) + pruning.get("save", 0.0)
    return budget - spent - 1.1 * measured * stages.get("pruned", 0.0) - around - _STARTING


def trainings(sizes: Mapping[Variant, Size], control: bool) -> float:
    """Return how many times as long training takes with the control's, by their parameters."""
    if not control:
        return 1.0
    return 1.0 + (sizes["dense"].total / sizes["pruned"].total if "dense" in sizes else 1.0)


def chunks_in_time(
    there: int,
    most: int,
    seconds: float,
    write: Callable[[int], Any],
    clock: Callable[[], float] = time.monotonic,
    *,
    longest: float = 0.0,
) -> int:
    """Write chunks of text while time lasts, the first in any case; return how many there are then.

    Of ``most`` that are enough some are ``there``; ``write`` makes the chunk of a number, and
    ``longest`` is what one takes, as far as that is known before.
    """
    begin = last = clock()
    while there < most and (there == 0 or last - begin + longest <= seconds):
        write(there)
        there += 1
        now = clock()
        longest, last = max(longest, now - last), now
    return there
