"""Measure a model in a process of its own, so that models do not share memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_pruner.commands.zero_shot import ZeroShotSettings
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.runtime.signals import for_child
from llm_pruner.settings.common import ModelSettings


def measure_apart(
    model: ModelSettings,
    corpora: Sequence[str],
    *,
    seq_len: int | None = None,
    zero_shot: ZeroShotSettings | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what ``evaluate --json`` says of a model: perplexities, tasks, speed and samples.

    Args:
        model: what is measured.
        corpora: for perplexity.
        seq_len: tokens in a window.
        zero_shot: the tasks.
        prompts: beginnings of texts that the model goes on with.

    Raises:
        UserError: as ``evaluate``.
        LLMPrunerError: the process failed.
    """
    command = [sys.executable, "-m", "llm_pruner", "evaluate", model.source]
    command += ["--dtype", model.dtype, "--device", model.device]
    if model.revision is not None:
        command += ["--revision", model.revision]
    if model.trust_remote_code:
        command.append("--trust-remote-code")
    for corpus in corpora:
        command += ["--perplexity", corpus]
    if seq_len is not None:
        command += ["--seq-len", str(seq_len)]
    if zero_shot is not None:
        command += ["--tasks", ",".join(zero_shot.tasks)]
        if zero_shot.data is not None:
            command += ["--tasks-data", str(zero_shot.data)]
        if zero_shot.limit is not None:
            command += ["--limit", str(zero_shot.limit)]
    for prompt in prompts:
        command += ["--prompt", prompt]
    command += ["--no-chat", "--speed", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=for_child())
    if done.returncode:
        raise _error(model.source, done.returncode, done.stderr)
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
