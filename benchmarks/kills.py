"""Whether a command that is ended at a random moment loses, breaks or leaves anything.

    python benchmarks/kills.py [--command streamed --signal SIGKILL --kills 10 --out FILE]

Runs prune (also with weights read block by block), recover, compress and evaluate on a tiny random
model, once each to their ends, and 78 times ended by SIGTERM, SIGKILL and Ctrl-C in turn, at a
moment drawn by a seed from all the time that the command takes, and given again. What holds of each
goes to benchmarks/results/kills.json as soon as it is known; started again, the script goes on from
there.

Times, speeds and what shows them are not compared, as in compress_kills.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from commands import keep, results_in
from compress_kills import TIMED, same
from machine import machine

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from command import save_tiny, write_text

RESULTS = Path(__file__).parent / "results"
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
CODES = {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}
OUT = {
    "prune": "out",
    "streamed": "out",
    "recover": "out",
    "compress": "out",
    "evaluate": "out.json",
}
TURN = ("prune", "recover", "evaluate", "streamed") * 6 + ("compress",) * 2
"""Commands in their order, over and over: compress, which takes longest, least often."""

INPUTS = ("dense", "small", "text.txt", "tiny.yaml")
TRAIN = "--set seq_len=64 --batch-size 4 --samples 24 --set held_out=4 --trainer max_steps=4"
PRUNE = "prune dense --out out --ratio 0.2 --calibration text.txt --samples 8 --set seq_len=32"
COMMANDS = {
    "prune": PRUNE,
    "streamed": f"{PRUNE} --memory 1KB",
    "recover": f"recover small --out out --data text.txt --teacher dense {TRAIN} "
    "--trainer save_steps=1 --resume",
    "compress": "compress dense --out out --preset tiny.yaml --data text.txt --perplexity text.txt",
    "evaluate": "evaluate small --perplexity text.txt --set seq_len=64 --json out.json",
}
PRESET = """
structures: [ffn]
protect_first: 0
protect_last: 0
criterion: fisher
samples: 8
seq_len: 32
calibration: text.txt
"""
PATIENCE = 5.0
"""Seconds in which processes that were told to end have done so."""


def make_inputs(folder: Path) -> None:
    """Make a dense model, a pruned one, a text and a preset."""
    save_tiny(folder / "dense", num_hidden_layers=4, initializer_range=0.2)
    write_text(folder / "text.txt", 6000)
    (folder / "tiny.yaml").write_text(PRESET)
    small = ["--out", "small", "--ratio", "0.2", "--criterion", "l2", "--structures", "ffn"]
    small += ["--compensation", "none"]
    ended = subprocess.run([*started(), "prune", "dense", *small], cwd=folder, capture_output=True)
    ended.check_returncode()


def started(*words: str) -> list[str]:
    """Return a command of the package as a process is given it."""
    return [sys.executable, "-m", "llm_pruner", *words]


def is_input(path: Path, folder: Path) -> bool:
    """Whether a path in the folder of a run is one of what is read, or in it."""
    return path.relative_to(folder).parts[0] in INPUTS


def inputs_hash(folder: Path) -> str:
    """Return a hash of names and contents of all that is read."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if is_input(path, folder)):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def outputs(folder: Path) -> dict[str, Path]:
    """Return all that is no input, hidden files included."""
    found = (path for path in folder.rglob("*") if not is_input(path, folder))
    return {str(path.relative_to(folder)): path for path in found}


def is_same(one: Path, other: Path, name: str) -> bool:
    """Whether an output is there in both folders, whole, and holds the same."""
    first, second = (
        {n: p for n, p in outputs(f).items() if Path(n).parts[0] == name} for f in (one, other)
    )
    if first.keys() != second.keys() or name not in first:
        return False
    compared = (n for n, p in first.items() if p.is_file() and p.name not in TIMED)
    return all(same(first[n], second[n]) for n in compared)


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has set a handler for a signal."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def living(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if (
                os.getsid(process.info["pid"]) == session
                and process.info["status"] != psutil.STATUS_ZOMBIE
            ):
                found.append(process.info["pid"])
        except ProcessLookupError:
            continue
    return found


def end(folder: Path, words: list[str], number: int, wait: float) -> tuple[int, str, int] | None:
    """Start a command and end it; return its code, what it said, and the processes left of it.

    Args:
        folder: where it runs.
        words: the command.
        number: the signal; SIGINT goes to all its processes, as Ctrl-C does.
        wait: seconds after it began to listen to signals.

    Returns:
        None if it was done before.
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, start_new_session=True, **pipes) as process:
        while not catches(process, signal.SIGTERM):
            if process.poll() is not None:
                raise SystemExit(f"{words[3]} ended with {process.returncode} before it began")
            time.sleep(0.002)
        time.sleep(wait)
        if process.poll() is not None:
            return None
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, said = process.communicate()
    until = time.monotonic() + PATIENCE
    while (left := living(process.pid)) and time.monotonic() < until:
        time.sleep(0.05)
    return process.returncode, said, len(left)


def try_once(
    number: int,
    turn: tuple[str, Any],
    seed: int,
    inputs: Path,
    wholes: dict[str, Path],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """End a command, give it again, and return what holds."""
    command, sent = turn
    draw, whole, out = random.Random(f"{seed}-{number}"), wholes[command], OUT[command]
    while True:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "work"
            shutil.copytree(inputs, folder)
            before = inputs_hash(folder)
            words, wait = started(*COMMANDS[command].split()), draw.uniform(0, seconds[command])
            ended = end(folder, words, sent, wait)
            if ended is None:
                continue
            code, said, children = ended
            left = sorted({Path(name).parts[0] for name in outputs(folder)} - {out})
            there = (folder / out).exists()
            whole_or_absent = not there or is_same(folder, whole, out)
            again = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            news = ("step ", "the weights take ")
            lines = [line for line in said.splitlines() if not line.startswith(news)]
            caught = sent != signal.SIGKILL
            too_late = there and code == 0  # all was done and said, and Python was on its way out
            holds = {
                "whole or absent": whole_or_absent,
                "input untouched": inputs_hash(folder) == before,
                "exit code": code == CODES[sent] or too_late,
                "one line": not lines
                if not caught or too_late
                else len(lines) == 1 and lines[0].startswith("llm-pruner: interrupted"),
                "no partial file after a signal that can be caught": not caught
                or not [name for name in left if name.startswith(".")],
                "no process left": children == 0,
                # A result that was in place when the signal came is not made again.
                "done when given again": again.returncode == 0
                or (there and again.returncode == 2 and "exists and is not empty" in again.stderr),
                "same bytes": is_same(folder, whole, out),
                "nothing left lying": {Path(name).parts[0] for name in outputs(folder)} == {out},
            }
            return {
                "number": number,
                "command": command,
                "signal": sent.name,
                "seconds_into_it": round(wait, 2),
                "left_lying": left,
                "exit_code": code,
                "was_complete": there,
                "fails": [name for name, good in holds.items() if not good],
                "said": said if not all(holds.values()) else "",
            }


def main() -> None:
    """End, give again, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=78)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    parser.add_argument("--command", choices=COMMANDS, help="this one alone")
    parser.add_argument("--signal", choices=[one.name for one in SIGNALS], help="this one alone")
    options = parser.parse_args()
    # A shell that started this in the background had it ignored, and children would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commands = {name: COMMANDS[name] for name in COMMANDS if options.command in (None, name)}
    settings = {
        "model": "Llama of 4 layers, random",
        "commands": commands,
        "seed": options.seed,
        "machine": machine(),
    }
    turns = [options.command] if options.command else TURN
    signals = [signal.Signals[options.signal]] if options.signal else SIGNALS
    result = results_in(options.out, settings, parser, kills=[])
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        wholes, seconds = {}, {}
        for command, words in commands.items():
            wholes[command] = Path(temporary) / command
            shutil.copytree(inputs, wholes[command])
            began = time.monotonic()
            subprocess.run(
                started(*words.split()), cwd=wholes[command], check=True, capture_output=True
            )
            seconds[command] = time.monotonic() - began
        result["seconds_undisturbed"] = {n: round(value, 1) for n, value in seconds.items()}
        numbers = range(len(result["kills"]), options.kills)
        with ThreadPoolExecutor(options.jobs) as pool:
            for found in pool.map(
                lambda number: try_once(
                    number,
                    (turns[number % len(turns)], signals[number % len(signals)]),
                    options.seed,
                    inputs,
                    wholes,
                    seconds,
                ),
                numbers,
            ):
                result["kills"].append(found)
                result["failed"] = sum(bool(one["fails"]) for one in result["kills"])
                print(json.dumps(found), flush=True)
                keep(options.out, result)
    print(f"{len(result['kills'])} kills, {result['failed']} with something that does not hold")


if __name__ == "__main__":
    main()
