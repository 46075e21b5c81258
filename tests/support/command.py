"""Runs the command line in this process, and a tiny checkpoint for it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.main import get_command

from helpers import tiny_model, tiny_tokenizer
from llm_pruner.cli import app, main
from llm_pruner.commands.evaluate import measure
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.speed import Speed, measure_speed
from llm_pruner.report.records import Measured

WORDS = "the old bridge over the river was built by people who lived near the water and sang "


@dataclass(frozen=True)
class Result:
    """What a run left."""

    code: int
    out: str
    err: str


PLAIN = Path(__file__).with_name("plain.yaml")
"""A preset of one step without a refit, for tiny models and short texts."""


def run(*args: object) -> Result:
    """Run ``llm-pruner`` with these arguments, as its own process would.

    ``prune`` takes the preset `PLAIN` where none is named: the default one reads more text than the
    tests have.
    """
    args = with_set(args)
    if args[:1] == ("prune",) and not {"--preset", "--plan", "-h"} & {*args}:
        args = (*args, "--preset", PLAIN)
    return direct(*args)


def direct(*args: object) -> Result:
    """Run ``llm-pruner`` with exactly these arguments."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["llm-pruner", *map(str, args)]),
        mock.patch.dict("os.environ", {"COLUMNS": "80"}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def with_set(args: Sequence[object]) -> tuple[str, ...]:
    """Return arguments in which settings without an option of their own are given by ``--set``.

    Tests name them as they name options: ``--spread 2`` stands for ``--set spread=2``.
    """
    words = [*map(str, args)]
    kind = getattr(get_command(app).commands.get(words[0] if words else ""), "kind", None)
    found: list[str] = []
    while words:
        word = words.pop(0)
        flag, sign, value = word.removeprefix("--").partition("=")
        name = flag.removeprefix("no-").replace("-", "_")
        field = None if kind is None else kind.model_fields.get(name)
        if not word.startswith("--") or field is None or name in kind.shown():
            found.append(word)
            continue
        if field.annotation in (bool, bool | None):
            value = "false" if flag.startswith("no-") else "true"
        elif not sign:
            value = words.pop(0)
        found += ["--set", f"{name}={value}"]
    return tuple(found)


def done(*args: object) -> Result:
    """Run ``llm-pruner`` and expect it to end well."""
    result = run(*args)
    assert result.code == 0, result.err
    return result


def refused(*args: object, lines: int = 1, within: Path = Path()) -> str:
    """Run what must be refused in so many lines and change nothing in a folder; return them."""
    before = contents(within)
    result = run(*args)
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("llm-pruner: ")
    assert result.err.endswith("\n")
    assert len(result.err.splitlines()) == lines
    assert contents(within) == before
    return result.err.removeprefix("llm-pruner: ").rstrip("\n")


def interrupt(patch: pytest.MonkeyPatch, place: Any, name: str, call: int = 1) -> None:
    """Interrupt the run at one of the calls of a function."""
    real: Callable[..., Any] = getattr(place, name)
    calls = count(1)

    def interrupted(*args: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    patch.setattr(place, name, interrupted)


@contextmanager
def measured_here() -> Iterator[None]:
    """Measure models in this process wherever a process of its own is asked for.

    A new process takes seconds to import PyTorch. Speed is timed on a few tokens.
    """
    few = partial(measure_speed, new_tokens=2, repeats=1)
    with (
        mock.patch("llm_pruner.commands.compress.measure_apart", measure),
        mock.patch("llm_pruner.commands.evaluate.measure_speed", few),
    ):
        yield


def figures(*_: object, **__: object) -> Measured:
    """Return what is said of a model that is not measured."""
    text = PerplexityResult(2.0, 0.7, 9, "text", None, 3, 3, "standard", None)
    speed = Speed(1.0, 1.0, (1.0,), (1.0,), 1, 1, 1, 1, "float32", "cpu", 1)
    return Measured("dense", 100, None, None, [text], None, speed, {})


def save_tiny(folder: Path, **config: object) -> Path:
    """Save a Llama of 6 layers with 6 heads on 3 key-value heads, and its tokenizer."""
    sizes = {"num_hidden_layers": 6, "max_position_embeddings": 512} | config
    tiny_model("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, characters: int = 2000) -> Path:
    """Write a text file; the tiny tokenizer makes one token of each character."""
    file.write_text((WORDS * (1 + characters // len(WORDS)))[:characters], encoding="utf-8")
    return file


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return everything under a folder, hidden files included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
