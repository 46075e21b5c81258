"""Compress the embedded model by 20% on text that it writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_pruner.commands.compress import Compressed, compress
from llm_pruner.commands.compress_settings import CompressSettings, default_recovery
from llm_pruner.planning import Target
from llm_pruner.recovery import Progress
from llm_pruner.settings.common import ModelSettings

RATIO = 0.2
RECIPE = "balanced"
SAMPLES = 160
"""Texts for training: those that importance is estimated on, and a quarter as many more."""


def demo_settings(seed: int = 0) -> CompressSettings:
    """Return what the demo does; a fixed amount of training, so that it can be repeated."""
    return CompressSettings(
        model=ModelSettings("default"),
        target=Target(ratio=RATIO),
        recipe=RECIPE,
        samples=SAMPLES,
        recovery=default_recovery(seed),
        seed=seed,
    )


def run_demo(
    out: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    seed: int = 0,
    command: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    say: Callable[[Progress], None] = lambda _: None,
    going_on: Callable[[Path], None] = lambda _: None,
) -> Compressed:
    """Prune 20% of all parameters of the default model, recover it, and measure all three models.

    Raises:
        UserError: the default model is not installed, or ``out`` is taken.
    """
    return compress(
        demo_settings(seed),
        out,
        overwrite=overwrite,
        restart=restart,
        command=command,
        tell=tell,
        say=say,
        going_on=going_on,
    )
