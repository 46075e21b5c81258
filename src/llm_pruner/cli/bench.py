"""``llm-pruner bench``: size, work, memory and speed, alone or against another model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from llm_pruner.cli.output import Screen, hand_over
from llm_pruner.report.text import clean, count, megabytes
from llm_pruner.settings.evaluate import BenchSettings

if TYPE_CHECKING:
    from llm_pruner.commands.bench import Bench, Figures
    from llm_pruner.evaluation.speed import Speed, SpeedUp

_Row: TypeAlias = "tuple[str, Callable[[Figures], Any], Callable[[Any], str]]"

EXAMPLES = """\b
Examples:
  llm-pruner bench ./small --against default
  llm-pruner bench ./llama --counts-only
"""


def run(settings: BenchSettings, json: str | None) -> None:
    """Measure the size, work, memory and speed of a model."""
    from llm_pruner.commands.bench import bench

    done = bench(settings)
    hand_over(done, json, show)


def show(done: Bench) -> None:
    """Print what was measured."""
    out = Screen()
    out.print(f"model: {clean(done.model.model)}")
    if done.against is not None:
        out.print(f"against: {clean(done.against.model)}")
    _show(out, "Size", done, _sizes(done))
    if done.model.memory:
        _show(out, "Peak memory", done, _memory(done))
    settings = done.settings
    if done.model.speed:
        columns: tuple[str, ...] = ("", "model", "range")
        if done.comparison:
            columns = ("", "model", "against", "speed-up", "range", "limit", "reached")
        out.table("Speed", columns, _speeds(done))
        out.print(
            f"Tokens per second; {settings['prompt_tokens']} prompt tokens, "
            f"{settings['new_tokens']} new ones; median of {settings['repeats']} rounds"
            + ("; compiled" if settings["compile"] else "")
        )
        if done.comparison:
            out.print(
                "Limit: the ratio of MACs for prefill, of the bytes that a step reads for decode"
            )
    where = f", {clean(settings['device'])}, {settings['threads']} threads"
    timed = "; nothing was timed" if settings["counts_only"] else where
    out.print(f"{settings['dtype']}{timed}")


def _show(out: Screen, title: str, done: Bench, rows: Iterable[_Row]) -> None:
    """Print rows of (label, what of a model, how it is written): one model, or two and a ratio."""
    models = [figures for figures in (done.model, done.against) if figures is not None]
    lines = []
    for label, read, form in rows:
        values = [read(figures) for figures in models]
        cells = [label, *("-" if value is None else form(value) for value in values)]
        if len(values) == 2:
            cells.append(f"{values[0] / values[1]:.3f}" if all(values) else "-")
        lines.append(cells)
    out.table(title, ("", "model", "against", "ratio")[: 2 * len(models)], lines)


def _sizes(done: Bench) -> list[_Row]:
    rows: list[_Row] = [
        ("parameters", lambda f: f.parameters, count),
        ("  in embeddings", lambda f: f.parameters_embedding, count),
        ("  in blocks", lambda f: f.parameters_blocks, count),
        ("on disk", lambda f: f.bytes_on_disk, megabytes),
        ("in memory", lambda f: f.bytes_in_memory, megabytes),
        ("MACs of 64 tokens", lambda f: f.macs, _billions),
        ("MACs per new token", lambda f: f.macs_per_token, _billions),
        ("read per new token", lambda f: f.bytes_read_per_token, megabytes),
        ("cache per token", lambda f: f.kv_cache_bytes_per_token, _kilobytes),
    ]
    if any(f is not None and f.cache_bytes_fixed for f in (done.model, done.against)):
        rows.append(("cache besides", lambda f: f.cache_bytes_fixed, _kilobytes))
    return rows


def _memory(done: Bench) -> list[_Row]:
    def read(number: int, stage: str) -> Callable[[Figures], Any]:
        return lambda figures: getattr(figures.memory[number], stage)

    return [
        (f"{stage}, batch {peak.batch_size}", read(number, stage), megabytes)
        for number, peak in enumerate(done.model.memory)
        for stage in ("prefill", "decode")
    ]


def _speeds(done: Bench) -> Iterator[list[str]]:
    for index, speed in enumerate(done.model.speed):
        other = None if done.against is None else done.against.speed[index]
        compared = done.comparison[index] if done.comparison else None
        for stage in ("prefill", "decode"):
            cells = [f"{stage}, batch {speed.batch_size}"]
            cells += [_rate(found, stage) for found in (speed, other) if found is not None]
            if compared is None:
                cells.append(_spread(speed, stage))
            else:
                gain: SpeedUp = getattr(compared, stage)
                limit: float = getattr(compared, f"{stage}_limit")
                cells += [f"{gain.median:.2f}x", f"{gain.low:.2f}-{gain.high:.2f}"]
                cells += [f"{limit:.2f}x", f"{100 * gain.median / limit:.0f}%"]
            yield cells


def _rate(speed: Speed, stage: str) -> str:
    return _number(getattr(speed, f"{stage}_tokens_per_second"))


def _spread(speed: Speed, stage: str) -> str:
    """Return the range of tokens per second over the rounds."""
    rate = getattr(speed, f"{stage}_tokens_per_second")
    seconds = getattr(speed, f"{stage}_seconds")
    tokens = rate * median(seconds)
    return f"{_number(tokens / max(seconds))}-{_number(tokens / min(seconds))}"


def _number(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}"


def _billions(value: int) -> str:
    return f"{value / 1e9:,.3f}G" if value < 1e10 else f"{value / 1e9:,.1f}G"


def _kilobytes(value: int) -> str:
    return f"{value / 1e3:,.1f} kB"
