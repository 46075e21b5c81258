"""JSON that anybody may have written: read within bounds, and with one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""A larger file is none that this package wrote."""


def read_text(file: Path) -> str:
    """Return the text of a file of at most ``MOST_BYTES``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not UTF-8.
    """
    # The size that the system states says nothing of a device or a pipe.
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES // 2**20} MiB")
    return data.decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return what a JSON text says; ``options`` are those of ``json.loads``.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError, ValueError: as ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(file))
