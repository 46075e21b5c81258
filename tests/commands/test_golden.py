"""What the commands made of a tiny model before they were rebuilt is what they make of it still.

``PYTHONPATH=tests/support python tests/commands/test_golden.py`` writes the files anew, or those
that it is given the names of; each change in them is one that users see. Numbers that arithmetic in
another order moves may differ by ``CLOSE``, and so may the weights that a refit or training made;
what was only cut is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer.main
from safetensors.torch import load_file

from command import done, measured_here, save_tiny, write_text
from llm_pruner.cli import app
from llm_pruner.discovery import groups
from llm_pruner.planning import read_plan
from llm_pruner.settings.prune import MethodSettings
from llm_pruner.tracing.scenes import scenes_of

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).with_name("golden")
CLOSE = 2e-3
"""Largest difference of two floats, relative to the larger one."""

NEAR_ZERO = (".waves", ".divergence", ".twin_difference")
"""Sums of hundreds of weights of both signs, and what is near 0: here it may be absolute, too."""

REFITTED = ("o_proj.weight", "down_proj.weight")
"""Weights that a refit makes anew."""

TEXT = ("--calibration", "text.txt", "--samples", 16, "--seq-len", 24)
PLAIN = ("--preset", "plain.yaml")
"""The defaults of the options alone, as they were when no preset was named."""

ALL_LAYERS = ("--protect-first", 0, "--protect-last", 0)
TRAINER = ("--trainer", "max_steps=4", "--trainer", "bf16=false")
TRAINING = ("--data", "text.txt", *TRAINER, "--batch-size", 2, "--seq-len", 32)
RECIPE = """
structures: [heads, ffn]
scope: global
spread: 2
split: auto
protect_first: 0
protect_last: 0
criterion: fisher-obs
samples: 16
seq_len: 24
compensation: least-squares
"""
PRUNED: dict[str, tuple[object, ...]] = {
    "prune": ("--ratio", 0.2, *PLAIN, *TEXT),
    "prune-paper": ("--ratio", 0.05, "--preset", "paper", *TEXT[:2]),
    "prune-balanced": ("--ratio", 0.2, "--preset", "balanced", *TEXT),
    "prune-best": ("--ratio", 0.2, "--preset", "best", "--repair-minutes", 0, *TEXT),
    "prune-fast": ("--ratio", 0.2, "--preset", "fast", *TEXT),
    "prune-random-hidden": (
        *("--params", "130K", "--structures", "hidden,layers,ffn", "--criterion", "random", *PLAIN),
        *("--split", "hidden=0.3,layers=0.3,ffn=0.4", *ALL_LAYERS),
    ),
    "prune-steps-uniform": (
        *("--unit-ratio", 0.34, "--steps", 2, "--uniform", "--criterion", "taylor", *TEXT, *PLAIN),
        *("--order", "mixed", "--reduction", "vector", "--split", "equal", "--round-to", 4),
    ),
}
"""Runs of ``prune`` on the dense model."""

RECOVERED: dict[str, tuple[object, ...]] = {
    "recover": (*TRAINING, "--perplexity", "other.txt"),
    "recover-paper": (*TRAINING, "--preset", "paper"),
    "recover-full-teacher": (*TRAINING, "--method", "full", "--teacher", "dense"),
}
"""Runs of ``recover`` on what the preset ``fast`` of ``prune`` left."""

LONG = ("--calibration", "long.txt")
MEASURED = ("--perplexity", "other.txt")
COMPRESSED: dict[str, tuple[object, ...]] = {
    **{
        f"compress-{name}": ("--ratio", 0.05, "--preset", name, *LONG, *MEASURED, "--no-recover")
        for name in MethodSettings.presets
    },
    "compress": ("--ratio", 0.2, "--preset", "tiny.yaml", *TEXT[:2], *MEASURED, "--no-recover"),
    "compress-recover": (
        *("--params", "140K", "--preset", "tiny.yaml", *TEXT[:2], *MEASURED),
        *("--data", "text.txt"),
    ),
}
"""Runs of ``compress`` on the dense model."""

CASES = (*PRUNED, *RECOVERED, *COMPRESSED)
PASSING = {
    "card_digest",
    "command",
    "peak memory",
    "seconds",
    "speed",
    "versions",
    "path",
    "report",
    "servers",
    "bytes",
    "peak_bytes",
    "package_version",
}
"""Fields that tell of the run and the machine, not of the model."""

SINCE = {
    "of",
    "dtype",
    "max_tokens",
    "ids_digest",
    "text_digest",
    "fingerprint",
    "fingerprint_against",
}
"""Fields of a perplexity, and what tells models apart, that came after the files were made."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands are given."""
    made = tmp_path_factory.mktemp("golden")
    prepare(made)
    return made


def prepare(here: Path) -> None:
    """Write the dense model and the texts."""
    save_tiny(here / "dense", num_hidden_layers=8, initializer_range=0.2)
    write_text(here / "text.txt", 6000)
    write_text(here / "other.txt", 700)
    write_text(here / "long.txt", 50_000)
    (here / "tiny.yaml").write_text(RECIPE)
    (here / "plain.yaml").write_text("structures: [heads, ffn]\n")


def make(here: Path, name: str) -> dict[str, Any]:
    """Run one command in a folder that was prepared, which is the current one."""
    with ExitStack() as patched:
        # Sums of bfloat16 products differ from processor to processor, and so do close scores.
        for module in ("runtime.precision", "commands.recover"):
            patched.enter_context(
                mock.patch(f"llm_pruner.{module}.multiplies_bfloat16", return_value=False)
            )
        patched.enter_context(mock.patch("torch.set_float32_matmul_precision"))
        if name in PRUNED:
            return outcome(here / name, "prune", "dense", *PRUNED[name])
        if name in COMPRESSED:
            with measured_here():
                return outcome(here / name, "compress", "dense", *COMPRESSED[name])
        if not (here / "prune-fast").exists():
            make(here, "prune-fast")
        return outcome(here / name, "recover", "prune-fast", *RECOVERED[name])


def outcome(out: Path, *command: object) -> dict[str, Any]:
    """Run a command and return all that it left, without what passes."""
    done(*command, "--out", out.name, "--json", f"{out.name}.json")
    record = json.loads(Path(f"{out.name}.json").read_text())
    report = json.loads((out / "report.json").read_text())
    for found in report["evaluations"].values():
        parts = ("perplexity", "bits")  # the others tell of the machine
        found["results"] = [one for one in found["results"] if one["part"] in parts]
    report["command"] = re.sub(r"^\S+", "llm-pruner", report.get("command") or "")
    recovery = out / "recovery.json"
    return {
        "plan": json.loads((out / "plan.json").read_text()),
        "weights": weights(out / "model.safetensors"),
        "files": sorted(path.name for path in out.iterdir()),
        "record": lasting(record),
        "report": lasting(report),
        "recovery": lasting(json.loads(recovery.read_text())) if recovery.exists() else None,
    }


def weights(file: Path) -> dict[str, Any]:
    """Return of each tensor its shape, two sums, of which one knows the order, and its hash."""
    found = {}
    for name, tensor in sorted(load_file(file).items()):
        flat = tensor.double().flatten()
        waves = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
        found[name] = {
            "shape": list(tensor.shape),
            "norm": float(flat.norm()),
            "waves": float(flat @ waves),
            "sha256": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16],
        }
    return found


def lasting(value: Any) -> Any:
    """Return a value without what passes."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in PASSING}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def lasting_outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what a command left without what passes; the parts keep their names."""
    return {part: lasting(value) for part, value in outcome.items()}


def options() -> dict[str, list[str]]:
    """Return the names of the options of each command."""
    group = typer.main.get_command(app)
    return {
        name: sorted(
            flag for param in command.params for flag in [*param.opts, *param.secondary_opts]
        )
        for name, command in sorted(group.commands.items())  # type: ignore[attr-defined]
    }


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Say where two values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys() - SINCE:
            if (key in before) != (key in now):
                yield f"{where}.{key} is there {'no more' if key in before else 'now'}"
            else:
                yield from differences(before[key], now[key], f"{where}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif isinstance(before, float) or isinstance(now, float):
        near = isinstance(now, float | int) and isinstance(before, float | int)
        least = CLOSE if where.endswith(NEAR_ZERO) else 0.0
        if not (near and math.isclose(before, now, rel_tol=CLOSE, abs_tol=least)):
            yield f"{where} was {before}, is {now}"
    elif before != now:
        yield f"{where} was {before!r}, is {now!r}"


@pytest.mark.parametrize("name", CASES)
def test_a_command_makes_what_it_made(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if name == "prune":
        monkeypatch.setattr(groups, "scenes_of", scenes_of)  # all of them
    # The test of ``recover`` may have made it.
    shutil.rmtree(folder / name, ignore_errors=True)
    before = lasting_outcome(json.loads((FOLDER / f"{name}.json").read_text()))
    now = lasting_outcome(make(folder, name))
    for one in (before, now):
        moved = REFITTED if one["report"]["compensation"] else ()
        for tensor, told in one["weights"].items():
            if one["recovery"] or tensor.endswith(moved):
                del told["sha256"]
        if name != "prune":
            for told in (one["record"], one["report"]):
                told.pop("twin_scenes", None)
    plans = [
        read_plan(json.dumps(one.pop("plan") | {"package_version": "0"})) for one in (before, now)
    ]
    assert plans[0].groups == plans[1].groups
    assert plans[0].text == plans[1].text
    said = {name: plans[1].settings.get(name) for name in plans[0].settings}
    assert list(differences(plans[0].settings, said)) == []
    assert list(differences(before, now)) == []


def test_every_option_is_recorded_and_none_is_lost() -> None:
    assert options() == json.loads((FOLDER / "options.json").read_text())


if __name__ == "__main__":
    here = Path(tempfile.mkdtemp())
    os.chdir(here)
    prepare(here)
    for found in sys.argv[1:] or ("options", *CASES):
        value = options() if found == "options" else make(here, found)
        text = json.dumps(value, indent=1, ensure_ascii=False)
        # A list of numbers on one line.
        text = re.sub(r"\[[\s\d.,e\-]+\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
        (FOLDER / f"{found}.json").write_text(text + "\n", encoding="utf-8")
        print(found, file=sys.stderr)
