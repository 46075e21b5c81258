"""What ``compress`` can be asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from llm_pruner.errors import UserError
from llm_pruner.settings.common import LOADING, OUTPUT, TASKS, Sources, TaskSettings, WriterSettings
from llm_pruner.settings.options import option, written
from llm_pruner.settings.prune import AMOUNTS, HOW, HOW_MUCH, AmountSettings, PruneSettings
from llm_pruner.settings.recover import TrainingSettings
from llm_pruner.settings.vocab import VocabSettings
from llm_pruner.settings.words import Seed, parse_duration

_TOKENS, _MEASURE = "Fewer tokens first", "What to measure"
_how, _tokens = partial(option, panel=HOW), partial(option, panel=_TOKENS)


class CompressSettings(WriterSettings, TaskSettings, AmountSettings):
    """All that ``compress`` can be asked for: the dense model, and how it becomes smaller."""

    hides: ClassVar = frozenset({"dtype", "limit"})
    panels: ClassVar = (HOW_MUCH, _TOKENS, HOW, _MEASURE, TASKS, OUTPUT, LOADING)

    restart: bool = option(False, "Throw an interrupted run away.", panel=OUTPUT, hidden=True)
    vocab_text: Sources = _tokens(
        (),
        "Before pruning, take out the tokens that this text does not need; may be given several "
        "times. --set vocab_size=N keeps N of them.",
        "SRC",
    )
    vocab_size: int | None = _tokens(
        None, "Tokens that stay.", hidden=True, ge=1, shown="those that the text has"
    )
    ratio: float | None = option(
        None,
        "Share of all parameters to remove.",
        "SHARE",
        panel=HOW_MUCH,
        shown="0.2, or what the preset says",
    )
    preset: str = _how("best", "How to prune: paper, fast, balanced, best, or a YAML file.", "NAME")
    time_budget: Annotated[float | None, written(parse_duration)] = _how(
        None,
        "Time for everything, such as 30m or 2h; recovery gets what is left.",
        "TIME",
        shown="no limit; one pass over the data",
        gt=0,
    )
    calibration: str | None = _how(
        None, "Text to estimate importance on, as for prune.", "SRC", shown="self"
    )
    data: Sources = _how(
        ("self",),
        "Text to recover on, with MODEL as the teacher; may be given several times.",
        "SRC",
        shown="self, what MODEL writes",
    )
    recover: bool = _how(True, "Train after pruning.", hidden=True)
    control: bool = _how(
        False, "Train MODEL in the same way as well, and show the damage beside it.", hidden=True
    )
    seed: Seed = _how(0, "Of all that is drawn.", hidden=True)
    perplexity: Sources = option(
        ("demo",),
        "Text to measure perplexity on, as for evaluate; may be given several times.",
        "SRC",
        panel=_MEASURE,
    )
    samples: int | None = _how(None, "Examples of each source, at most.", hidden=True, ge=2)
    training: dict[str, Any] = option(
        {}, "Other settings of training, by the names of recover.", hidden=True
    )

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the amount that holds where none is given."""
        if "params" in given or "ratio" in given:
            return preset
        said = PruneSettings.of_preset(given.get("preset"))
        amount = {name: of for name, of in said.items() if name in AMOUNTS and of is not None}
        if other := [name for name in amount if name not in ("ratio", "params")]:
            raise UserError(
                f"{given['preset']} says how much by {other[0]}, which compress does not know; "
                "give --ratio or --params beside it, or prune and recover"
            )
        return {**preset, **(amount or {"ratio": 0.2})}

    def check(self) -> None:
        """Raise UserError for two amounts."""
        if self.ratio is not None and self.params is not None:
            raise UserError("--ratio and --params say different things; give one of them")

    def fewer_tokens(self, out: Path) -> VocabSettings:
        """Return how tokens are taken out before pruning."""
        return VocabSettings(
            **self.loading().written(),
            out=out,
            text=self.vocab_text,
            size=self.vocab_size,
            max_shard_size=self.max_shard_size,
        )

    def pruning(self, out: Path, start: Path | None = None) -> PruneSettings:
        """Return how the model is pruned, or what ``start`` has of it with fewer tokens."""
        shared = {**self.loading(start).written(), "calibration": self.calibration}
        return PruneSettings(
            **shared,
            out=out,
            ratio=self.ratio,
            params=self.params,
            preset=self.preset,
            repair_minutes=0.0,  # training is what ``recover`` is about
            seed=self.seed,
            max_shard_size=self.max_shard_size,
        )

    def trains(self) -> TrainingSettings:
        """Return how the pruned model is trained."""
        return TrainingSettings(**{"seed": self.seed, **self.training})
