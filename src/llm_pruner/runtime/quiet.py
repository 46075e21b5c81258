"""Hold back what libraries log, warn about and print."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet(
    *loggers: str,
    level: int = logging.ERROR,
    warned: str | None = "",
    stdout: bool = False,
    stderr: bool = False,
) -> Iterator[None]:
    """Hold back warnings and what some loggers say below a level; what goes wrong is raised.

    Args:
        loggers: names, such as ``transformers``.
        level: the least that they still say.
        warned: regular expression of the warnings that are held back, by default all; None for
            none.
        stdout, stderr: hold back what is printed there.
    """
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            if warned is not None:
                warnings.filterwarnings("ignore", message=warned)
            if stdout:
                stack.enter_context(redirect_stdout(io.StringIO()))
            if stderr:
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield
    finally:
        for logger, before in zip(found, levels, strict=True):
            logger.setLevel(before)
