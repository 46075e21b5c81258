"""Skills that perplexity does not show: programs that pass tests, sums that come out right."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_pruner.evaluation.answers import Answer, Asked
from llm_pruner.evaluation.programs import run_program
from llm_pruner.evaluation.zero_shot import TaskResult
from llm_pruner.files.disk import short_digest
from llm_pruner.runtime.progress import track

GSM8K_TASK, GSM8K_METRIC = "gsm8k_cot", "exact_match,flexible-extract"
"""lm-evaluation-harness's task of GSM8K that brings its eight examples along, and its metric that
takes the last number of an answer."""

_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function is over, as in the paper of HumanEval (arXiv 2107.03374, section 2)."""
_PROGRAM_TOKENS = 512


@dataclass(frozen=True)
class Share:
    """How often something holds; ``stderr`` is sqrt(value (1 - value) / count), None if unknown."""

    value: float
    stderr: float | None
    count: int


def share(held: Sequence[bool]) -> Share:
    """Return the share of True, with the standard error of a binomial share."""
    value = sum(held) / len(held)
    return Share(value, math.sqrt(value * (1 - value) / len(held)), len(held))


def digest_of(*parts: Any) -> str:
    """Return the digest of what decides an answer but the model."""
    return short_digest(json.dumps(parts))


@dataclass(frozen=True)
class Skill:
    """How well a model does something."""

    name: str
    metric: str
    solved: Share
    total: int
    shots: int
    endings: dict[str, int]
    shut_off: str | None = None
    digest: str | None = None


def human_eval_prompts(problems: Sequence[Mapping[str, str]]) -> Asked:
    """Return the problems as plain text to be continued, without blank lines, as EvalPlus does."""
    prompts = tuple(map(_stripped, problems))
    return Asked(prompts, _PROGRAM_TOKENS, "Writing programs", stops=_STOPS)


def human_eval(
    problems: Sequence[Mapping[str, str]], answers: Sequence[Answer], total: int, dtype: str
) -> Skill:
    """Run each program with the tests of its problem, and return the share that pass.

    A program is the prompt, the answer up to the first of ``_STOPS``, and the tests. ``total``
    counts problems of which these are the first; ``dtype`` is that the model computes in.
    """
    programs = [
        "\n".join(
            (
                _stripped(problem) + _until_stop(answer.text),
                problem["test"],
                f"check({problem['entry_point']})",
            )
        )
        for problem, answer in zip(problems, answers, strict=True)
    ]
    runs = [run_program(program) for program in track(programs, "Running programs")]
    held = all(run.namespaces and run.read_only for run in runs)
    return Skill(
        name="humaneval",
        metric="pass@1",
        solved=share([run.ending == "passed" for run in runs]),
        total=total,
        shots=0,
        endings=dict(Counter(run.error or run.ending for run in runs).most_common()),
        shut_off="namespaces, limits and an audit hook"
        if held
        else "limits and an audit hook alone: this system permits no namespaces",
        digest=digest_of(
            [[one[part] for part in ("prompt", "test", "entry_point")] for one in problems], dtype
        ),
    )


def _stripped(problem: Mapping[str, str]) -> str:
    return problem["prompt"].strip() + "\n"


def _until_stop(text: str) -> str:
    return text[: min((at for stop in _STOPS if (at := text.find(stop)) >= 0), default=None)]


def gsm8k(result: TaskResult, dtype: str) -> Skill:
    """Return the share of exact matches that lm-evaluation-harness found."""
    found = result.metrics[GSM8K_METRIC]
    return Skill(
        name="gsm8k",
        metric="exact_match",
        solved=Share(found.value, found.stderr, result.documents),
        total=result.documents_total,
        shots=result.num_fewshot,
        endings={},
        digest=digest_of(result.digest, result.version, dtype),
    )
