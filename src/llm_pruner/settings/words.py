"""What people write for numbers and lists on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from llm_pruner.errors import UserError
from llm_pruner.files.outputs import bytes_of
from llm_pruner.settings.options import near

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy takes."""

STRUCTURES = ("heads", "query_heads", "ffn", "hidden", "head_dim", "experts", "layers", "other")
"""Kinds that can be chosen. ``value_dim`` cannot: it follows ``head_dim``."""

LOCAL_TASKS = (
    *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
)
"""The paper's tasks as lm-evaluation-harness names them, in the order of its tables."""

_COUNTS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_count(text: str) -> int:
    """Return a number of parameters, such as ``"5.4B"``; raise UserError unless it is above 0."""
    match = re.fullmatch(r"([\d_,]*\.?\d+)\s*([KMBT]?)", text.strip().upper())
    number = Decimal(0)
    if match is not None:
        number = Decimal(re.sub("[_,]", "", match[1])).scaleb(_COUNTS[match[2]])
    if number <= 0 or number != int(number):
        raise UserError(
            f"{text!r} is not a number of parameters; write such as 5.4B, 107.6M or 110000000"
        )
    return int(number)


def parse_bytes(text: str) -> int:
    """Return bytes of ``"8GB"``, ``"8GiB"`` or ``"512MB"``, all of thousands; or UserError."""
    number = bytes_of(re.sub("(?i)ib$", "B", text.strip()))
    if number < 1:
        raise UserError(f"{text!r} is no size; write such as 8GB or 512MB")
    return number


def parse_layer_ranges(text: str) -> dict[str, tuple[int, int]]:
    """Return structure -> (first, last), both in, of ``"heads=4-26,ffn=4-26"``, or UserError."""
    ranges = {}
    for name, value in _by_structure(text, r"\d+(?:\s*-\s*\d+)?", "layer range", "heads=4-26"):
        first, _, last = value.partition("-")
        ranges[name] = int(first), int(last or first)
        if int(last or first) < int(first):
            raise UserError(f"layer range {name}={value} runs backwards; swap its ends")
    return ranges


def parse_split(text: str) -> dict[str, float]:
    """Return structure -> share of ``"heads=0.1,ffn=0.9"``; raise UserError if it is malformed."""
    found = _by_structure(text, r"\d*\.?\d+", "share", "heads=0.1,ffn=0.9")
    return {name: float(value) for name, value in found}


def _by_structure(text: str, value: str, what: str, such: str) -> Iterator[tuple[str, str]]:
    """Yield (structure, value) of ``"heads=...,ffn=..."``."""
    names = set()
    for item in text.split(","):
        match = re.fullmatch(rf"\s*(\w+)\s*=\s*({value})\s*", item)
        if match is None:
            raise UserError(f"{item.strip()!r} is not a {what}; write such as {such}")
        name = known_structure(match[1])
        if name in names:
            raise UserError(f"{name} has two {what}s; give one")
        names.add(name)
        yield name, match[2]


def parse_damage(text: str) -> tuple[Literal["perplexity", "kl"], float]:
    """Return what is bounded, and by how much; UserError if nothing can be.

    ``"1.2x"`` is the dense model's perplexity times 1.2, ``"0.3"`` a KL divergence in nats.
    """
    number = text.strip().removesuffix("x")
    ratio = number != text.strip()
    limit = float(number) if re.fullmatch(r"\d*\.?\d+", number) else 0.0
    if limit <= ratio:
        raise UserError(
            f"--max-damage {text} is no damage; write such as 1.2x, for the dense model's "
            "perplexity times 1.2, or 0.3, for a KL divergence of 0.3 nats"
        )
    return ("perplexity" if ratio else "kl"), limit


def parse_duration(text: str) -> float:
    """Return seconds of ``"90s"``, ``"30m"``, ``"1.5h"`` or ``"1h30m"``; UserError for others."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip().lower())
    parts = zip(match.groups("0") if match else (), _SECONDS.values(), strict=False)
    seconds = sum(float(part) * of for part, of in parts)
    if seconds <= 0:
        raise UserError(f"--time-budget {text} is no time; write such as 90s, 30m or 2h")
    return seconds


def known_structure(name: str) -> str:
    """Return the name of a structure; raise UserError if it is unknown, or cannot be chosen."""
    if name == "value_dim":
        raise UserError("value_dim is not pruned by itself; choose head_dim, which it follows")
    if name not in STRUCTURES:
        raise UserError(
            f"unknown structure {name!r}; {near(name, STRUCTURES)}known are {', '.join(STRUCTURES)}"
        )
    return name
