"""What benchmarks share: processes of their own, and going on where one was ended."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def found_in(file: Path, empty: Any) -> Any:
    """Return the results in a file, or ``empty`` where it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty


def results_in(
    file: Path, settings: dict[str, Any], parser: argparse.ArgumentParser, **empty: Any
) -> dict[str, Any]:
    """Return the results in a file, or ``empty`` ones under ``settings`` where it is not there.

    Ends where those in the file are of other settings: rows of two would stand under one. What may
    differ between rows, such as the machine, stands in each row (`here` in ``machine.py``).
    """
    asked = json.loads(json.dumps(settings))
    results: dict[str, Any] = found_in(file, {"settings": asked})
    there = results.get("settings", {})
    other = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    if other:
        names = ", ".join(other)
        parser.error(f"{file} holds rows of other settings ({names}); give another --out")
    return {"settings": asked, **empty, **results}


def put(rows: list[dict[str, Any]], row: dict[str, Any], *names: str) -> None:
    """Put a row in the place of the one that has the same under ``names``, or behind all."""
    same = (n for n, one in enumerate(rows) if all(one.get(x) == row[x] for x in names))
    place = next(same, len(rows))
    rows[place : place + 1] = [row]


def keep(file: Path, results: Any) -> None:
    """Write results; the file is there whole at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def name_of(model: str) -> str:
    """Return what results call a model."""
    return "SmolLM2-135M-Instruct" if model == "default" else Path(model).name


def stamp(*words: object) -> str:
    """Return a short hash for the name of a folder, of what it is made of and by which version.

    Of words that name folders, files or mixtures of files, it changes with size and time of these.
    """
    from llm_pruner import __version__
    from llm_pruner.data.text import shares_of

    facts = [__version__]
    for word in map(str, words):
        facts.append(word)
        for source in shares_of(word):
            path = Path(source).expanduser()
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    facts.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]


def llm_pruner(*arguments: object) -> None:
    """Run a command in a process of its own; what it prints is not shown."""
    command = [sys.executable, "-m", "llm_pruner", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def found_by(*arguments: object) -> dict[str, Any]:
    """Run a command in a process of its own; return what it says to scripts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        llm_pruner(*arguments, "--json", file)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def save_dense(model: str, folder: Path, dtype: str = "float32") -> None:
    """Save a dense model with its tokenizer as a folder."""
    apart(_save_dense, model, folder, dtype)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, whose peak memory is nobody else's.

    Forked: a process that has imported everything and computed nothing has no threads.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _save_dense(model: str, folder: Path, dtype: str) -> None:
    from llm_pruner import load
    from llm_pruner.runtime.progress import quiet_bars

    with quiet_bars():
        loaded = load(model, dtype=dtype)
        loaded.network.save_pretrained(folder)
        assert loaded.tokenizer is not None
        loaded.tokenizer.save_pretrained(folder)
