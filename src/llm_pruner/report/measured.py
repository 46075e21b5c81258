"""What ``evaluate`` and ``bench`` write for scripts, as a part of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_pruner.report.data import Evaluation, Measurement, Perplexity, TaskScore

Data = Mapping[str, Any]

_COUNTS = {
    "bytes": ("size on disk", "B"),
    "bytes_on_disk": ("size on disk", "B"),
    "macs": ("one forward pass over 64 tokens", "MACs"),
    "macs_per_token": ("one token after 64 others", "MACs"),
    "bytes_read_per_token": ("read for one token after 64 others", "B"),
    "kv_cache_bytes_per_token": ("cache per token", "B"),
}
"""Field -> name and unit of what it counts; less is better."""


def as_evaluation(data: Data) -> Evaluation:
    """Return what was measured of one model.

    Args:
        data: of one model, as ``evaluate --json`` or ``bench --json`` writes it; what is absent was
            not measured.
    """
    fields = Perplexity.model_fields.keys()
    return Evaluation(
        perplexity=tuple(
            Perplexity(**{key: value for key, value in result.items() if key in fields})
            for result in data.get("perplexity") or ()
        ),
        tasks=tuple(_tasks((data.get("zero_shot") or {}).get("tasks") or ())),
        measurements=tuple(_measurements(data)),
        samples=data.get("samples") or {},
    )


def _tasks(results: Any) -> Iterator[TaskScore]:
    """Yield the metrics of each task that are shares of which more is better, such as ``acc``."""
    for result in results:
        for name, metric in result["metrics"].items():
            if metric.get("higher_is_better") is not False and 0 <= metric["value"] <= 1:
                yield TaskScore(
                    task=result["task"],
                    metric=name,
                    value=metric["value"],
                    stderr=metric.get("stderr"),
                    items=result.get("documents"),
                    in_mean=name == result.get("paper_metric"),
                )


def _measurements(data: Data) -> Iterator[Measurement]:
    for field, (name, unit) in _COUNTS.items():
        if data.get(field):
            yield Measurement(name=name, unit=unit, value=data[field], better="lower")
    for peak in data.get("memory") or ():
        for stage in ("prefill", "decode"):
            name = f"peak memory of {stage} ({_settings(peak, stage)})"
            yield Measurement(name=name, unit="B", value=peak[stage], better="lower")
    speeds = data.get("speed") or ()
    for speed in [speeds] if isinstance(speeds, Mapping) else speeds:
        for stage in ("prefill", "decode"):
            if f"{stage}_tokens_per_second" in speed:
                yield _speed(speed, stage)


def _speed(speed: Data, stage: str) -> Measurement:
    """Return tokens per second, with the slowest and the fastest round where rounds are known."""
    rate = speed[f"{stage}_tokens_per_second"]
    rounds = speed.get(f"{stage}_seconds") or ()
    tokens = speed.get(_TOKENS[stage], 0) * speed.get("batch_size", 1)
    return Measurement(
        name=f"{stage} ({_settings(speed, stage)})",
        unit="tokens/s",
        value=rate,
        low=tokens / max(rounds) if len(rounds) > 1 else None,
        high=tokens / min(rounds) if len(rounds) > 1 else None,
        better="higher",
    )


_TOKENS = {"prefill": "prompt_tokens", "decode": "new_tokens"}


def _settings(found: Data, stage: str) -> str:
    return f"{found.get(_TOKENS[stage], '?')} tokens, batch {found.get('batch_size', '?')}"
