"""The demo: the embedded model, a tenth smaller, measured as it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llm_pruner.commands.prune import PruneRun
from llm_pruner.data.text import DEMO, load_evaluation_text
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.evaluation.speed import measure_speed
from llm_pruner.report.records import Measured, Pruned
from llm_pruner.report.write import add_evaluation
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.prune import PruneSettings

PROMPT = "What is the capital of France, and what is it known for?"

_ANSWER = 48
"""Tokens of an answer."""


@dataclass(frozen=True)
class Demo:
    """What the demo made, and what was measured of each model by its name."""

    pruned: Pruned
    measured: dict[str, Measured]


def settings_of(out: Path, *, overwrite: bool) -> PruneSettings:
    """Return how the demo prunes: ``balanced`` on little text, and 75 seconds of repair."""
    return PruneSettings(
        model="default",
        out=out,
        overwrite=overwrite,
        ratio=0.1,
        preset="balanced",
        samples=96,
        refit_text=1.0,
        repair_minutes=1.25,
    )


def run_demo(settings: PruneSettings, command: str, show: Callable[[str, Measured], None]) -> Demo:
    """Prune and repair; ``show`` is told the figures of each model as soon as they are known."""
    run = _MeasuredRun(settings, command=command)
    run.show = show
    done = run.carry_out()
    add_evaluation(settings.out, run.measured["dense"], settings.model)
    add_evaluation(settings.out, run.measured["repaired"], str(settings.out))
    return Demo(done, run.measured)


class _MeasuredRun(PruneRun):
    """A run of ``prune`` that measures the model when it is loaded, cut, and repaired."""

    show: Callable[[str, Measured], None]

    def load(self) -> None:
        super().load()
        self.measured: dict[str, Measured] = {}
        self.whole = replace(self.loaded, model=self.dense)  # the repair lets go of it
        self._measure("dense")

    def repair(self) -> None:
        self._measure("pruned")
        super().repair()
        self._measure("repaired")

    def _measure(self, stage: str) -> None:
        model, tokenizer = self.network, self.loaded.tokenizer
        dense = None if stage == "dense" else self.whole
        how = PerplexitySettings(seq_len=512)
        size = model_size(model)
        found = Measured(
            model=self.settings.model if dense is None else str(self.settings.out),
            parameters=size.total,
            parameters_embedding=size.embedding,
            parameters_blocks=size.blocks,
            perplexity=[perplexity(model, tokenizer, load_evaluation_text(DEMO, how), how, dense)],
            speed=measure_speed([model])[0],
            samples={PROMPT: sample_continuation(model, tokenizer, PROMPT, _ANSWER, chat=True)},
        )
        self.measured[stage] = found
        self.show(stage, found)
        self.clock.stop("measure")
