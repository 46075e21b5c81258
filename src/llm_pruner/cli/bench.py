"""``llm-pruner bench``: size, work, memory and speed, alone or against another model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, hand_over
from llm_pruner.report.text import clean, count, megabytes
from llm_pruner.settings.evaluate import BenchSettings

if TYPE_CHECKING:
    from llm_pruner.commands.bench import Bench
    from llm_pruner.evaluation.speed import Speed

EXAMPLES = """\b
Examples:
  llm-pruner bench ./small --against default
  llm-pruner bench ./llama --counts-only
"""


def run(settings: BenchSettings, json: str | None) -> None:
    """Measure the size, work, memory and speed of a model."""
    from llm_pruner.commands.bench import bench

    hand_over(bench(settings), json, show)


def show(done: Bench) -> None:
    """Print what was measured."""
    out, models = Screen(), [one for one in (done.model, done.against) if one is not None]
    for name, figures in zip(("model", "against"), models, strict=False):
        out.print(f"{name}: {clean(figures.model)}")
    sizes = ((label, [getattr(one, of) for one in models], form) for label, of, form in _SIZES)
    _show(out, "Size", sizes)
    if done.model.memory:
        _show(
            out,
            "Peak memory",
            (
                (
                    f"{stage}, batch {peak.batch_size}",
                    [getattr(one.memory[number], stage) for one in models],
                    megabytes,
                )
                for number, peak in enumerate(done.model.memory)
                for stage in ("prefill", "decode")
            ),
        )
    settings = done.settings
    if done.model.speed:
        columns: tuple[str, ...] = ("", "model", "range")
        if done.comparison:
            columns = ("", "model", "against", "speed-up", "range", "limit", "reached")
        out.table("Speed", columns, _speeds(done))
        out.print(
            f"Tokens per second; {settings['prompt_tokens']} prompt tokens, "
            f"{settings['new_tokens']} new ones; median of {settings['repeats']} rounds"
        )
        if done.comparison:
            out.print(
                "Limit: the ratio of MACs for prefill, of the bytes that a step reads for decode"
            )
    where = f", {clean(settings['device'])}, {settings['threads']} threads"
    timed = "; nothing was timed" if settings["counts_only"] else where
    out.print(f"{settings['dtype']}{timed}")


def _show(
    out: Screen,
    title: str,
    rows: Iterable[tuple[str, list[int | None], Callable[[int], str]]],
) -> None:
    """Print rows of (label, values, how they are written): of one model, or two and a ratio."""
    lines = []
    for label, values, form in rows:
        cells = [label, *("-" if value is None else form(value) for value in values)]
        if len(values) == 2:
            cells.append(f"{values[0] / values[1]:.3f}" if values[0] and values[1] else "-")
        if any(values):
            lines.append(cells)
    out.table(title, ("", "model", "against", "ratio")[: len(lines[0])], lines)


def _speeds(done: Bench) -> Iterator[list[str]]:
    for index, speed in enumerate(done.model.speed):
        for stage in ("prefill", "decode"):
            label, rate = f"{stage}, batch {speed.batch_size}", _rate(speed, stage)
            if done.against is None:
                yield [label, _number(rate), _spread(speed, stage)]
                continue
            compared = done.comparison[index]
            gain, limit = getattr(compared, stage), getattr(compared, f"{stage}_limit")
            yield [
                *(label, _number(rate), _number(_rate(done.against.speed[index], stage))),
                *(f"{gain.median:.2f}x", f"{gain.low:.2f}-{gain.high:.2f}"),
                *(f"{limit:.2f}x", f"{100 * gain.median / limit:.0f}%"),
            ]


def _rate(speed: Speed, stage: str) -> float:
    rate: float = getattr(speed, f"{stage}_tokens_per_second")
    return rate


def _spread(speed: Speed, stage: str) -> str:
    """Return the range of tokens per second over the rounds."""
    seconds = getattr(speed, f"{stage}_seconds")
    tokens = _rate(speed, stage) * median(seconds)
    return f"{_number(tokens / max(seconds))}-{_number(tokens / min(seconds))}"


def _number(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}"


def _billions(value: int) -> str:
    return f"{value / 1e9:,.3f}G" if value < 1e10 else f"{value / 1e9:,.1f}G"


def _kilobytes(value: int) -> str:
    return f"{value / 1e3:,.1f} kB"


_SIZES: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("parameters", "parameters", count),
    ("  in embeddings", "parameters_embedding", count),
    ("  in blocks", "parameters_blocks", count),
    ("on disk", "bytes_on_disk", megabytes),
    ("in memory", "bytes_in_memory", megabytes),
    ("MACs of 64 tokens", "macs", _billions),
    ("MACs per new token", "macs_per_token", _billions),
    ("read per new token", "bytes_read_per_token", megabytes),
    ("cache per token", "kv_cache_bytes_per_token", _kilobytes),
    ("cache besides", "cache_bytes_fixed", _kilobytes),
)
