"""The text and the prompts of the demo, shipped with the package; used for evaluation alone."""

from __future__ import annotations

from importlib.resources import files

DEMO_PROMPTS = (
    "The old bridge over the river was built",
    "To make a simple vegetable soup, first",
    "A compiler is a program that",
)


def demo_text() -> str:
    """Return about two thousand words of plain English prose on several subjects."""
    return files("llm_pruner.data").joinpath("texts/demo.txt").read_text(encoding="utf-8")
