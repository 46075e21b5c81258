"""Numbers that options take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

from packaging.version import Version
from pydantic import AfterValidator, ValidationInfo

from llm_pruner.errors import UserError
from llm_pruner.settings.options import option_name

MOST = 10**9
"""Of steps, samples, tokens and the like: more is a slip of the pen."""

MOST_MINUTES = 366 * 24 * 60.0


def check_number(name: str, value: float | None, least: float, most: float) -> None:
    """Raise UserError unless a number, ``name``, is None or within bounds, both included."""
    if value is not None and not least <= value <= most:
        raise UserError(
            f"{name} {_shown(value)} is outside {_shown(least)} to {_shown(most)}; "
            "give a number in between"
        )


def within(least: float, most: float, name: str = "{option}") -> AfterValidator:
    """Return a validator of a field: see `check_number`; the name is written as in `must`."""

    def checked(value: Any, info: ValidationInfo) -> Any:
        check_number(_filled(name, value, info), value, least, most)
        return value

    return AfterValidator(checked)


def must(holds: Callable[[Any], bool], words: str) -> AfterValidator:
    """Return a validator of a field that raises UserError with these words unless it ``holds``.

    ``words`` have ``{option}``, ``{name}`` and ``{value}`` for those of the field.
    """

    def checked(value: Any, info: ValidationInfo) -> Any:
        if not holds(value):
            raise UserError(_filled(words, value, info))
        return value

    return AfterValidator(checked)


def check_installed(
    who: str, packages: Sequence[str], instead: str = "", least: str | None = None
) -> None:
    """Raise UserError unless one of these packages is installed, or none is needed.

    ``who`` needs it, or does ``instead``; ``least``: version of the first that is new enough.
    """
    if packages and not any(map(find_spec, packages)):
        raise UserError(
            f"{who} needs the package {packages[0]}, which is not installed; run 'pip install "
            f"{packages[0]}'{instead}"
        )
    if packages and least and Version(found := version(packages[0])) < Version(least):
        raise UserError(
            f"{who} needs {packages[0]} {least} or newer, and {found} is installed; run 'pip "
            f"install -U {packages[0]}'{instead}"
        )


def _filled(words: str, value: Any, info: ValidationInfo) -> str:
    name = str(info.field_name)
    value = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return words.format(option=option_name(name), name=name, value=value)


def _shown(value: float) -> str:
    text = str(value) if isinstance(value, int) else f"{value:g}"
    return text if len(text) <= 40 else f"{text[:37]}..."


Seed = Annotated[int, within(0, 2**32 - 1)]
"""What numpy takes, by which the Trainer seeds it; PyTorch would take more."""
