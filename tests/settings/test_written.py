"""Settings that are written down and read again are the same."""

from __future__ import annotations

from pathlib import Path

from llm_pruner.settings.compress import CompressSettings
from llm_pruner.settings.prune import PruneSettings


def test_what_was_given_is_written_though_it_is_a_default():
    given = PruneSettings(
        model="m", out="o", preset="paper", ratio=0.2, split="auto", samples=128, dtype="auto"
    )
    again = PruneSettings(**given.written())
    assert again.model_dump() == given.model_dump()
    assert (again.split, again.samples) == ("auto", 128)


def test_compress_hands_on_the_type_that_was_asked_for():
    asked = CompressSettings(model="m", out="o", dtype="float32")
    assert asked.pruning(Path("pruned")).dtype == "float32"
