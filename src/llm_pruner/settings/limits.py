"""Numbers that options take."""

from __future__ import annotations

from llm_pruner.errors import UserError

MOST = 10**9
"""Of steps, samples, tokens and the like: more is a slip of the pen."""

MOST_MINUTES = 366 * 24 * 60.0

_MOST_SEED = 2**32 - 1
"""What numpy takes, by which the Trainer seeds it; PyTorch would take more."""


def check_number(name: str, value: float | None, least: float, most: float) -> None:
    """Raise UserError unless a number is given and within bounds, both included; None is not given.

    Args:
        name: of the option or argument, as it stands in the message.
        value: may be infinite or NaN, which is within no bounds.
    """
    if value is not None and not least <= value <= most:
        raise UserError(
            f"{name} {_shown(value)} is outside {_shown(least)} to {_shown(most)}; "
            "give a number in between"
        )


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that some random generator does not take."""
    check_number("--seed", seed, 0, _MOST_SEED)


def _shown(value: float) -> str:
    text = str(value) if isinstance(value, int) else f"{value:g}"
    return text if len(text) <= 40 else f"{text[:37]}..."
