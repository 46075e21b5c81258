"""Damage against size: one model, estimated once, then cut, refitted and measured at each size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.prune_result import result_of
from llm_pruner.commands.workdir import MEASURING, Work, contents, move_result, opened
from llm_pruner.data.calibration import Calibration, check_calibration, read_calibration
from llm_pruner.data.sequences import added_tokens
from llm_pruner.data.text import EvaluationText, load_evaluation_text, shares_of, with_field
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.perplexity import (
    PerplexityResult,
    Remembered,
    check_windows,
    perplexity,
    perplexity_of_windows,
)
from llm_pruner.files.outputs import (
    atomic_directory,
    check_output,
    check_place,
    rewrite,
    write_output,
)
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.forward import maximum_length
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel, check, load
from llm_pruner.planning import Plan
from llm_pruner.report.curve import DATA_FILE, drawn_files
from llm_pruner.report.records import Curve, CurvePoint, Smallest
from llm_pruner.report.text import percent
from llm_pruner.report.write import page_in, write_drawn, write_request
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.processes import only_one
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.layer_trials import Damage
from llm_pruner.settings.common import FolderSettings
from llm_pruner.settings.curve import CurveSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.words import parse_damage
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Scores
from llm_pruner.version import __version__

WINDOW = 512
"""Tokens in a window of ``--text``, if the model reads so many."""


def curve(
    settings: CurveSettings,
    *,
    command: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    going_on: Callable[[Path], None] = lambda _: None,
) -> Curve:
    """Measure a model at several sizes; write plans, data and page to ``settings.out``.

    Until it is done all lies in a folder beside ``out`` with the ending ``.measuring``. A run that
    was interrupted goes on there with the points that are missing, after a new estimate.

    Raises:
        UserError: something that was given must change.
    """
    only_one("curve")
    check_place(settings.out, "--out")
    work = MEASURING.beside(settings.out)
    if not (work / "result.json").is_file() or settings.restart:
        check_settings(settings)
    with opened(work, about(settings), restart=settings.restart) as run:
        if run.continued:
            going_on(work)
        try:
            done = run.once("result", Curve, lambda: _Stages(settings, run, tell).all(command))
        except BaseException:
            if not any(run.folder.glob("point-*.json")):
                run.remove()  # nothing was done that is worth going on with
            raise
        move_result(run.path("curve"), settings.out, settings.overwrite, settings.reads)
        run.remove()
    return replace(done, report=page_in(settings.out))


def check_settings(settings: CurveSettings) -> None:
    """Raise UserError for places, texts and models that cannot be used."""
    check_output(settings.out, settings.overwrite, settings.reads)
    check_text(settings)
    run = PruneRun(settings.pruning(settings.ratios[0]))
    run.check()
    if settings.text is None or run.reads_text or run.repairs:
        check_calibration(settings)
    if settings.text is not None:
        _given_text(settings)
    check(settings.loading())


def check_text(settings: CurveSettings) -> None:
    """Raise UserError for a text to measure on that is calibrated on."""
    if settings.text in shares_of(settings.calibration):
        raise UserError(
            f"--text {settings.text} is the calibration text, which the models are fitted to; "
            "leave --text out to measure on the rest of it, or give another"
        )


def about(settings: CurveSettings) -> dict[str, Any]:
    """Return all that decides how a run goes, as plain values by the names of the options."""
    identity = result_cache.identify(settings.loading())
    texts = [*shares_of(settings.calibration), *filter(None, [settings.text])]
    placed = {*FolderSettings.model_fields, "restart", "revision", "trust_remote_code", "memory"}
    return settings.model_dump(mode="json", exclude=placed | {"kept"}) | {
        "model": Path(settings.model).name,
        "model content": None if identity is None else identity.content,
        "preset": None if settings.preset is None else Path(settings.preset).name,
        "llm_pruner": __version__,
        **contents(texts),
    }


class CurveRun:
    """Makes points of one model; they share calibration text, first estimate and its predictions.

    Args:
        loaded, discovery: the dense model, which stays as it is, and its groups, if they are there.

    Attributes:
        scores, damage, known: of the dense model: importance, damage by each group alone, hidden
            states on the calibration text; empty until the first point is made.
        repairs: as the first point has it, for all points; None until then.
        clock: seconds of what all points share, but for the estimate.
    """

    def __init__(
        self,
        settings: CurveSettings,
        *,
        loaded: LoadedModel | None = None,
        discovery: Discovery | None = None,
    ) -> None:
        self.settings, self.clock = settings, Clock()
        self.loaded = loaded or load(settings.computing(), memory=settings.room(settings.device))
        self.dense = replace(self.loaded, model=Remembered(self.loaded.model))
        self.clock.stop("load")
        self.discovery = discovery or discover(self.loaded.model)
        self.clock.stop("discover")
        self.repairs: bool | None = None
        self.text: Calibration | None = None
        self.scores: Scores = {}
        self.damage: Mapping[str, Damage] = {}
        self.known = HiddenStates()

    def reach(self, ratio: float) -> None:
        """Raise UserError if no importance can reach this size."""
        self._run(ratio).reach()

    def point(self, ratio: float) -> tuple[Plan, CurvePoint]:
        """Cut a copy of the model, refit it as the settings say, and measure it."""
        self._read_text()
        run = self._run(ratio)
        try:
            run.make_plan(self.known)
        finally:  # a size that cannot be reached leaves what was estimated
            self.scores, self.text = run.scores, self.text or run.text
            self.damage = run.damage
        run.repair()
        measured = self._measure(run.network)
        run.clock.stop("measure")
        done = result_of(run)
        assert run.plan is not None
        assert measured.divergence is not None
        return run.plan, CurvePoint(
            asked=ratio,
            removed=done.ratio,
            parameters=done.parameters_after,
            plan=f"plan-{ratio}.json",
            measured=measured,
            perplexity_ratio=measured.perplexity / measured.divergence.perplexity,
            split=next((trial.split for trial in done.trials if trial.taken), None),
            refitted=sum(one.changed for one in done.refitted),
            seconds=done.seconds,
        )

    def _run(self, ratio: float) -> PruneRun:
        settings = self.settings.pruning(ratio)
        if self.repairs is False:
            settings = settings.but(repair_minutes=0.0)
        run = PruneRun(
            settings,
            loaded=replace(self.loaded, model=sharing_copy(self.loaded.model)),
            discovery=self.discovery,
            text=self.text,
            scores=self.scores,
            damage=self.damage,
        )
        run.check()
        run.load()
        self.repairs = run.repairs
        return run

    def _read_text(self) -> None:
        """Read what is calibrated on, where it is measured on the rest of it."""
        settings = self.settings
        if settings.text is not None and not self.scores:
            how = "measured_tokens"
            check_windows(self.loaded.model, self.loaded.tokenizer, *self._given, option=how)
        if self.text is not None or settings.text is not None:
            return
        count = -(-settings.measured_tokens // settings.seq_len)
        self.text = read_calibration(
            self.loaded, settings, settings.seed, self.clock, max(count, 2)
        )
        if not len(self.text.unseen):
            raise UserError(
                f"all of {self.text.source} is calibrated on, so nothing is left to measure on; "
                "give a text for that with --text, or fewer --samples"
            )

    def _measure(self, network: Any) -> PerplexityResult:
        """Return perplexity and divergence on text that nothing was fitted to."""
        if self.settings.text is not None:
            return perplexity(network, self.loaded.tokenizer, *self._given, self.dense)
        assert self.text is not None
        rest, asked = self.text.unseen, PerplexitySettings()
        text = EvaluationText(f"rest of {self.text.settings['name']}", None, "")
        skipped = max(1, len(added_tokens(self.loaded.tokenizer)[0]))
        return perplexity_of_windows(network, rest, text, asked, self.dense, skipped=skipped)

    @cached_property
    def _given(self) -> tuple[EvaluationText, PerplexitySettings]:
        """The text of ``--text``, and how it is measured on."""
        settings, longest = self.settings, maximum_length(self.loaded.model) or WINDOW
        window = min(WINDOW, longest, settings.measured_tokens)
        asked = PerplexitySettings(
            seq_len=window, max_tokens=max(settings.measured_tokens, 2 * window)
        )
        return _given_text(settings), asked


def _given_text(settings: CurveSettings) -> EvaluationText:
    """Return the text of ``--text``."""
    source = settings.text
    assert source is not None
    return with_field(
        lambda field: load_evaluation_text(source, PerplexitySettings(text_field=field)),
        settings.text_field,
    )


class _Stages(CurveRun):
    """The same in a folder that keeps the points that are done."""

    def __init__(self, settings: CurveSettings, work: Work, tell: Callable[[str], None]) -> None:
        tell("loading the model")
        super().__init__(settings)
        self.work, self.tell, self.missed = work, tell, dict[str, str]()

    def all(self, command: str | None) -> Curve:
        """Make the points that are missing and the answer; write the folder ``curve``."""
        settings = self.settings
        for ratio in settings.ratios:
            try:
                self.reach(ratio)
            except UserError as error:
                if "ratios" in settings.given:
                    raise
                self.missed[str(ratio)] = str(error)
        ratios = [ratio for ratio in settings.ratios if str(ratio) not in self.missed]
        found = [self._kept_point(ratio) for ratio in ratios]
        points = tuple(one for one in found if one is not None)
        if not points:
            raise UserError(next(iter(self.missed.values())))
        smallest = self._smallest(points)
        made = (*points, smallest.point) if smallest and smallest.point else points
        seconds = Counter(self.clock.seconds)
        for one in made:
            seconds.update(one.seconds)
        done = Curve(
            model=self.loaded.name,
            parameters=count_parameters(self.discovery),
            points=points,
            missed=self.missed,
            smallest=smallest,
            preset=settings.preset,
            calibration=settings.calibration,
            seconds=dict(seconds),
            path=settings.out,
        )
        with atomic_directory(self.work.path("curve"), overwrite=True) as folder:
            for one in made:
                write_output(folder / one.plan, self.work.path(one.plan).read_text("utf-8"))
            write_request(folder, settings)
            rewrite(folder, {DATA_FILE: done.lasting()})
            drawn = partial(drawn_files, done, settings, command)
            write_drawn(folder, drawn, "all else")
        return done

    def _kept_point(self, ratio: float) -> CurvePoint | None:
        """Return a point that is made once; None, and why, where its size cannot be reached."""

        def make() -> CurvePoint:
            self.tell(f"{percent(ratio)} removed")
            plan, point = self.point(ratio)
            write_output(self.work.path(point.plan), plan.to_json())
            return point

        try:
            return self.work.once(f"point-{ratio}", CurvePoint, make, "points")
        except UserError as error:
            if self.text is None or not self.scores:
                raise  # not of this size
            self.missed[str(ratio)] = str(error)
            return None
        finally:
            give_back()

    def _smallest(self, points: Sequence[CurvePoint]) -> Smallest | None:
        if self.settings.max_damage is None:
            return None
        answer = smallest_for(self.settings.max_damage, points)
        if answer.removed is None:
            return answer
        known = {point.asked: point for point in points}
        point = known.get(answer.removed) or self._kept_point(answer.removed)
        outside = None if point else self.missed.pop(str(answer.removed))
        return replace(answer, point=point, outside=outside)


def smallest_for(max_damage: str, points: Sequence[CurvePoint]) -> Smallest:
    """Return the largest share that may go for a damage, by interpolation between points.

    The logarithm of the perplexity's ratio, or the divergence, is taken to grow in straight lines
    from point to point, beginning with the dense model, which has none; where a smaller model
    measures better than a larger one it counts as equally good.

    Args:
        max_damage: as `settings.words.parse_damage` reads it.
        points: in the order of their sizes.
    """
    of, limit = parse_damage(max_damage)
    bound = math.log(limit) if of == "perplexity" else limit
    damage = [math.log(p.perplexity_ratio) if of == "perplexity" else p.kl for p in points]
    grown = np.maximum.accumulate([0.0, *damage])
    shares = [0.0, *(point.removed for point in points)]
    after = int(np.searchsorted(grown, bound, side="right"))
    if after == len(grown):
        most = math.exp(grown[-1]) if of == "perplexity" else grown[-1]
        return Smallest(
            of,
            limit,
            outside=f"{percent(shares[-1])} removed, the smallest size that was measured, does "
            f"less damage ({most:.4g}); give larger --ratios",
        )
    part = (bound - grown[after - 1]) / (grown[after] - grown[after - 1])
    share = shares[after - 1] + part * (shares[after] - shares[after - 1])
    removed = math.floor(1000 * share) / 1000
    if not removed:
        return Smallest(of, limit, outside="less than 0.1% of the parameters may go")
    return Smallest(of, limit, removed)
