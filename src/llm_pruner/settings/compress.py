"""What ``compress`` can be asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from llm_pruner.errors import UserError
from llm_pruner.settings.common import LOADING, OUTPUT, TASKS, Sources, TaskSettings, WriterSettings
from llm_pruner.settings.limits import MOST, MOST_MINUTES, Seed, check_installed, must, within
from llm_pruner.settings.options import option, option_name, written
from llm_pruner.settings.prune import AMOUNTS, HOW, HOW_MUCH, AmountSettings, PruneSettings
from llm_pruner.settings.recover import QUANTIZERS, ExampleCount, TrainingSettings
from llm_pruner.settings.vocab import VocabSettings
from llm_pruner.settings.words import parse_duration

_TOKENS, _MEASURE = "Fewer tokens first", "What to measure"
_TORCHAO = "0.16"
"""The first whose int8 weights are saved as safetensors."""

_BUDGET = must(
    lambda seconds: seconds is None or 0 < seconds <= 60 * MOST_MINUTES,
    "{option} {value} is no number of seconds up to a year; write such as 90s, 30m or 2h",
)

_how, _tokens = partial(option, panel=HOW), partial(option, panel=_TOKENS)


class CompressSettings(WriterSettings, TaskSettings, AmountSettings):
    """All that ``compress`` can be asked for: the dense model, and how it becomes smaller."""

    hides: ClassVar = frozenset({"dtype", "push_to_hub", "limit"})
    gone: ClassVar = {"recipe": "write --preset {value}"}
    panels: ClassVar = (HOW_MUCH, _TOKENS, HOW, _MEASURE, TASKS, OUTPUT, LOADING)

    restart: bool = option(
        False,
        "Throw an interrupted run away, which the same command would go on with.",
        panel=OUTPUT,
        hidden=True,
    )
    vocab_text: Sources = _tokens(
        (),
        "Before pruning, take out the tokens that this text does not need, as vocab does; the rest "
        "of the size is pruned. May be given several times.",
        "SRC",
        shown="all tokens stay",
        reads=True,
    )
    vocab_size: Annotated[int, within(1, MOST)] | None = _tokens(
        None,
        "Tokens that stay.",
        "N",
        shown="those that the text has",
        hidden=True,
    )
    ratio: float | None = option(
        None,
        "Share of all parameters to remove, such as 0.2.",
        "SHARE",
        panel=HOW_MUCH,
        shown="0.2, where neither --params nor a preset says how much",
    )
    preset: str = _how(
        "best",
        "How to prune: paper, fast, balanced, best, or a YAML file.",
        "NAME",
        reads=True,
    )
    time_budget: Annotated[float | None, written(parse_duration), _BUDGET] = _how(
        None,
        "For everything, such as 30m or 2h; what pruning and measuring leave goes to recovery.",
        "TIME",
        shown="one pass over the data, or over 256 texts of self",
    )
    calibration: str | None = _how(
        None,
        "Text to estimate importance on, as for prune.",
        "SRC",
        shown="self, the model's own",
        reads=True,
    )
    data: Sources = _how(
        ("self",),
        "Text to recover on, as for recover; MODEL is the teacher. May be given several times.",
        "SRC",
        shown="self, what MODEL writes",
        reads=True,
    )
    recover: bool = _how(True, "Train after pruning.", hidden=True)
    control: bool = _how(
        False,
        "Train MODEL as well, with the same text, steps and rate, and show what is left of the "
        "damage beside it.",
        hidden=True,
    )
    quantize: Literal["none", "int8"] = _how(
        "none", "At the end, pack the weights of linear layers in int8, by torchao.", "TYPE"
    )
    seed: Seed = _how(0, "Of all that is drawn.", "N", hidden=True)
    perplexity: Sources = option(
        ("demo",),
        "Corpus to measure perplexity on, as for evaluate. May be given several times.",
        "SRC",
        panel=_MEASURE,
        shown="demo, a text that the package ships",
        reads=True,
    )
    samples: ExampleCount | None = _how(None, "Examples of each source, at most.", "N", hidden=True)
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
        """Raise UserError for what contradicts itself."""
        if self.ratio is not None and self.params is not None:
            raise UserError("--ratio and --params say different things; give one of them")
        if self.vocab_size is not None and not self.vocab_text:
            raise UserError(
                f"--vocab-size {self.vocab_size} does not say which tokens stay; name a text that "
                "has them with --vocab-text, or leave it out"
            )
        self.check_tasks()
        asked = f"--quantize {self.quantize}"
        packages = QUANTIZERS[self.quantize]
        check_installed(asked, packages, ", or leave --quantize out", least=_TORCHAO)
        for name in ("data", "time_budget", "control"):
            if not self.recover and name in self.given and getattr(self, name):
                raise UserError(
                    f"{option_name(name)} is about recovery; leave it or --no-recover out"
                )

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
