"""Where in a model's code something happens."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from pathlib import Path

import torch


def code_line(*, passing_calls: bool = False) -> str:
    """Return the file and line of the model's code that runs, such as ``modeling_llama.py:98``.

    Frames of this package's tracing and of PyTorch are passed over; with ``passing_calls`` those of
    ``__call__``, by which a module is called, too.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        other = name.startswith(_NOT_THE_MODELS) and not name.startswith(_MODELS)
        if not other and not (passing_calls and frame.f_code.co_name == "__call__"):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "PyTorch"


_PACKAGE = Path(__file__).resolve().parent.parent
_MODELS = f"{_PACKAGE / 'models'}{os.sep}"
_NOT_THE_MODELS = (
    f"{_PACKAGE}{os.sep}",
    f"{Path(torch.__file__).resolve().parent}{os.sep}",
    contextlib.__file__,
    functools.__file__,
    "<frozen",
)
