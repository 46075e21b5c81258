"""Compress the embedded model by 20% on text that it writes itself."""

from __future__ import annotations

from pathlib import Path

from llm_pruner.settings.compress import CompressSettings

RATIO = 0.2
PRESET = "balanced"
SAMPLES = 160
"""Texts for training: those that importance is estimated on, and a quarter as many more."""


def demo_settings(
    out: Path, *, overwrite: bool = False, restart: bool = False, seed: int = 0
) -> CompressSettings:
    """Return what the demo does; a fixed amount of training, so that it can be repeated."""
    return CompressSettings(
        model="default",
        out=out,
        overwrite=overwrite,
        restart=restart,
        ratio=RATIO,
        preset=PRESET,
        samples=SAMPLES,
        seed=seed,
    )
