"""Measure a model in a process of its own, so that models do not share memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llm_pruner.commands.request import as_yaml
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.runtime.signals import for_child
from llm_pruner.settings.evaluate import EvaluateSettings


def measure_apart(settings: EvaluateSettings) -> dict[str, Any]:
    """Return what ``evaluate --json`` says of a model: perplexities, tasks, speed and samples.

    Raises:
        UserError: as ``evaluate``.
        LLMPrunerError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.yaml"
        request.write_text(as_yaml(settings), encoding="utf-8")
        command = [sys.executable, "-m", "llm_pruner", "evaluate", "--config", str(request)]
        done = subprocess.run(
            [*command, "--json", "-"], capture_output=True, text=True, check=False, env=for_child()
        )
    if done.returncode:
        raise _error(settings.model, done.returncode, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _error(source: str, code: int, stderr: str) -> LLMPrunerError:
    lines = stderr.strip().splitlines()
    said = lines[-1].removeprefix("llm-pruner: ") if lines else f"its process ended with {code}"
    if code == 2:
        return UserError(said)
    if code < 0:
        said = (
            f"its process was ended by signal {-code}; if memory was short, use a smaller --dtype"
        )
    return LLMPrunerError(f"{source} could not be measured: {said}")
