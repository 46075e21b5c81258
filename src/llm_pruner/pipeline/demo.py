"""Prune the embedded model and compare before and after, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_pruner.checkpoints.save import silent_writing
from llm_pruner.data.demo_text import DEMO_PROMPTS
from llm_pruner.errors import LLMPrunerError
from llm_pruner.evaluation.size import folder_bytes
from llm_pruner.importance import Criterion
from llm_pruner.pipeline.prune import Pruned, prune_checkpoint
from llm_pruner.pipeline.report import add_evaluations
from llm_pruner.pipeline.settings import CalibrationSettings, ModelSettings
from llm_pruner.planning import Selection, Target
from llm_pruner.sources import load_model

RATIO = 0.2
CALIBRATION = CalibrationSettings()


@dataclass(frozen=True)
class Demo:
    """Both models, measured alike; see ``Measured`` for the keys."""

    pruned: Pruned
    before: dict[str, Any]
    after: dict[str, Any]


def run_demo(
    out: Path, *, overwrite: bool = False, seed: int = 0, command: str | None = None
) -> Demo:
    """Prune 20% of all parameters of the default model on text that it writes itself.

    Both models are saved as folders, in the same format, and loaded again by new processes, which
    measure them. What they find goes into the report in ``out``.

    Raises:
        UserError: the default model is not installed, or ``out`` is taken.
    """
    pruned = prune_checkpoint(
        ModelSettings("default"),
        out,
        target=Target(ratio=RATIO),
        selection=Selection(structures=("heads", "ffn")),
        protect_by_default=(True, True),
        criterion=Criterion(),
        calibration=CALIBRATION,
        seed=seed,
        overwrite=overwrite,
        command=command,
    )
    with tempfile.TemporaryDirectory() as folder:
        dense = load_model("default")
        assert dense.tokenizer is not None
        with silent_writing():
            dense.model.save_pretrained(folder)
            dense.tokenizer.save_pretrained(folder)
        del dense
        before, after = (_measured(Path(folder)), _measured(out))
    if pruned.report is not None:
        add_evaluations(out, {"dense": before, "pruned": after})
    return Demo(pruned, before, after)


def _measured(folder: Path) -> dict[str, Any]:
    """Measure a folder in a new process."""
    command = [sys.executable, "-m", "llm_pruner", "evaluate", str(folder)]
    command += ["--perplexity", "demo", "--seq-len", "512", "--speed", "--json", "-"]
    command.append("--no-chat")  # the prompts are beginnings of texts
    for prompt in DEMO_PROMPTS[:1]:
        command += ["--prompt", prompt]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LLMPrunerError(f"{folder} could not be measured: {done.stderr.strip()}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return {**measured, "bytes": folder_bytes(folder)}
