"""Exception types, and how errors of libraries are quoted.

Every message says what was given, what follows and what to change, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import UnionType
from typing import Any

_MOST_PROBLEMS = 100


class LLMPrunerError(Exception):
    """Base class of every error that this package raises on purpose."""


class UserError(LLMPrunerError):
    """Something that the user gave must change; the command line exits with code 2."""


class Interrupted(LLMPrunerError):  # noqa: N818
    """The user stopped the program; says what is left of its work."""


class NeedsMemory(UserError):  # noqa: N818
    """Weights are read block by block that all have to be in memory; ``why`` says what for."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; give a --memory that holds all of them")
        self.why = why


class PlanError(UserError):
    """A Plan that cannot be applied; lists every problem found."""

    def __init__(self, problems: list[str]) -> None:
        more = len(problems) - _MOST_PROBLEMS
        if more > 0:
            problems = [*problems[:_MOST_PROBLEMS], f"and {more:,} more"]
        self.problems = tuple(problems)
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems in the plan"
        tail = "" if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(head + tail)


class DiscoveryError(LLMPrunerError):
    """The model could not be traced."""


class InfeasibleError(LLMPrunerError):
    """Sizes that no assignment of the model's attributes can express; names the group."""


class VerificationError(LLMPrunerError):
    """The pruned model differs from its masked twin; nothing may be saved."""


def in_short(error: BaseException) -> str:
    """Return type and text of an error that a library raised, in one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def require_kind(
    what: str, value: Any, kind: type | UnionType | tuple[type, ...], instead: str
) -> None:
    """Raise UserError unless what was given for an argument is of a kind.

    Args:
        what: name of the argument.
        instead: what is to be given.
    """
    if not isinstance(value, kind):
        raise UserError(f"{what} is of type {type(value).__name__}; give {instead}")


def check_installed(who: str, packages: Sequence[str], instead: str = "") -> None:
    """Raise UserError unless one of these packages is installed, or none is needed.

    ``who`` needs it, or does ``instead``.
    """
    if packages and not any(map(find_spec, packages)):
        raise UserError(
            f"{who} needs the package {packages[0]}, which is not installed; run 'pip install "
            f"{packages[0]}'{instead}"
        )
