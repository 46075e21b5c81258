"""Health of long answers: how many loop, and how many never end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from llm_pruner.evaluation.answers import Answer, Asked
from llm_pruner.evaluation.skills import Share, digest_of, share
from llm_pruner.settings.evaluate import ANSWER_TOKENS

PERIOD, REPEATS, TOKENS = 64, 3, 32
"""An answer loops if its last tokens, ``TOKENS`` at least, are a piece of ``PERIOD`` tokens at most
said ``REPEATS`` times or more."""


@dataclass(frozen=True)
class Health:
    """Answers to plain prompts, each the likeliest text."""

    prompts: str
    new_tokens: int
    looping: Share
    endless: Share
    digest: str | None = None


def own_prompts() -> tuple[str, ...]:
    """Return the prompts that the package ships: questions and tasks of daily life."""
    file = files("llm_pruner.data").joinpath("texts/prompts.txt")
    return tuple(file.read_text(encoding="utf-8").splitlines())


def health_prompts(prompts: Sequence[str], limit: int | None) -> Asked:
    """Return the first prompts, put as a user's message where the model has a chat template."""
    return Asked(tuple(prompts[:limit]), ANSWER_TOKENS, "Writing long answers", chat=True)


def health(name: str, asked: Asked, answers: Sequence[Answer], dtype: str) -> Health:
    """Return how many answers loop, and how many never end."""
    return Health(
        prompts=name,
        new_tokens=asked.new_tokens,
        looping=share([loops(answer.tokens) for answer in answers]),
        endless=share([not answer.ended for answer in answers]),
        digest=digest_of(asked.prompts, dtype),
    )


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text ends in a loop.

    It does if for a period p of at most ``PERIOD`` x[t] = x[t - p] over the last
    max(``REPEATS`` p, ``TOKENS``) tokens. A loop that the text came out of again is not counted.
    """
    for period in range(1, PERIOD + 1):
        end = tokens[-max(REPEATS * period, TOKENS) :]
        if len(end) >= max(REPEATS * period, TOKENS) and end[period:] == end[:-period]:
            return True
    return False
