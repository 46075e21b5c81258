"""``llm-pruner evaluate``: perplexity, tasks, skills and health; ``tasks``: tasks as files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_pruner.cli.output import Screen, hand_over, warn
from llm_pruner.report.text import clean, count, in_percent, measured
from llm_pruner.settings.evaluate import EvaluateSettings

if TYPE_CHECKING:
    from llm_pruner.evaluation.perplexity import PerplexityResult
    from llm_pruner.report.records import Abilities, Measured, ZeroShot

EXAMPLES = """\b
Examples:
  llm-pruner evaluate ./small --perplexity wikitext2 --perplexity c4
  llm-pruner evaluate ./small --perplexity c4 --against MODEL
  llm-pruner evaluate ./small --perplexity text.txt --protocol paper
  llm-pruner evaluate ./small --perplexity c4 --report ./small
  llm-pruner evaluate ./small --tasks paper --limit 200
  llm-pruner evaluate ./small --skills humaneval --run-code --against MODEL
  llm-pruner evaluate ./small --health
"""


def run(settings: EvaluateSettings, json: str | None) -> None:
    """Measure perplexity, zero-shot tasks, skills, speed, samples."""
    settings.check()
    if settings.report is not None:
        from llm_pruner.report.data import report_in

        report_in(settings.report)  # what cannot be read is said before the model is loaded

    from llm_pruner.commands.evaluate import measure
    from llm_pruner.evaluation.result_cache import shared_corpora

    for warning in shared_corpora(settings.model, settings.perplexity, settings.revision):
        warn(warning)
    found = measure(settings)
    if settings.report is not None:
        from llm_pruner.report.write import add_evaluation

        add_evaluation(settings.report, found, settings.model)
    hand_over(found, json, show)
    if settings.report is not None and json != "-":
        added = settings.report / "report.html"
        Screen().print(f"added to {clean(str(added))}", soft_wrap=True)


def show(found: Measured) -> None:
    """Print what was measured."""
    out = Screen()
    out.print(f"{clean(found.model)}: {count(found.parameters)} parameters")
    if found.perplexity:
        _show_perplexity(out, found.perplexity)
    if found.zero_shot is not None:
        _show_tasks(out, found.zero_shot, found.dense)
    if found.kept is not None and found.kept.value is not None:
        shown = in_percent(found.kept.value, found.kept.stderr)
        out.print(f"accuracy above chance kept of {clean(found.kept.against)}: {shown}%")
    if found.kept is not None and found.kept.flips is not None:
        shown = in_percent(found.kept.flips, found.kept.flips_stderr)
        out.print(f"answered right by one of both alone (flips): {shown}%")
    if found.skills or found.health:
        _show_abilities(out, found)
    if found.speed is not None:
        out.print(
            f"prefill {found.speed.prefill_tokens_per_second:.1f} tokens/s, "
            f"decode {found.speed.decode_tokens_per_second:.1f} tokens/s"
        )
    for text, continuation in found.samples.items():
        said = clean(continuation, "\n\t")
        out.out(f"> {clean(text)}{said}", highlight=False)


def _show_perplexity(out: Screen, found: Sequence[PerplexityResult]) -> None:
    rows = [
        (
            *(one.corpus, one.split or "-", one.protocol, one.window, f"{one.tokens:,}"),
            measured(one.perplexity, one.stderr, ".2f"),
            "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
        )
        for one in found
    ]
    columns = ("corpus", "split", "protocol", "window", "tokens", "perplexity", "bits per byte")
    out.table("Perplexity", columns, rows)
    compared = [(one.corpus, one.divergence) for one in found if one.divergence]
    if compared:
        kept = [
            (
                corpus,
                measured(far.kl, far.kl_stderr, ".4f"),
                in_percent(far.changed, far.changed_stderr),
                f"{far.perplexity:.2f}",
            )
            for corpus, far in compared
        ]
        headings = ("corpus", "KL, nats", "other token, %", "its perplexity")
        out.table(f"Against {compared[0][1].against}", headings, kept)


def _show_abilities(out: Screen, found: Measured) -> None:
    """Print skills and health, with the dense model's beside them if one was named."""
    from llm_pruner.report.facts import shares  # imports torch

    models = [one for one in (found, found.dense) if one]
    each = [{f"{name}, {how}": one for name, how, one, _ in shares(of)} for of in models]
    rows = [
        (name, *(in_percent(one[name].value, one[name].stderr) for one in each)) for name in each[0]
    ]
    names = [one.model for one in models]
    out.table("Skills and long answers, %", ("share of", *names), rows, text=("share of",))
    for skill in found.skills:
        if skill.endings:
            ended = ", ".join(f"{count} {name}" for name, count in skill.endings.items())
            out.print(f"{skill.name}: {clean(ended)}; programs ran behind {skill.shut_off}")


def _show_tasks(out: Screen, found: ZeroShot, dense: Abilities | None) -> None:
    """Print a line for each metric of each task, and the means, beside the dense model's."""
    beside = {dense.model: dense.zero_shot} if dense and dense.zero_shot else {}
    others = [{task.task: task.metrics for task in one.tasks} for one in beside.values()]
    rows = [
        (
            result.task if number == 0 else "",
            f"{result.documents:,}" if number == 0 else "",
            f"{name} *" if name == result.paper_metric else name,
            measured(metric.value, metric.stderr, ".4f"),
            *(f"{one[result.task][name].value:.4f}" for one in others),
        )
        for result in found.tasks
        for number, (name, metric) in enumerate(result.metrics.items())
    ]
    title = f"Zero-shot (lm-evaluation-harness {found.versions['lm_eval']})"
    out.table(title, ("task", "items", "metric", "value", *beside), rows, text=("metric",))
    for words, name in {"seven tasks": "mean", "six without boolq": "mean_without_boolq"}.items():
        means = {model: getattr(one, name) for model, one in {"": found, **beside}.items()}
        each = [(m, measured(one.value, one.stderr, ".4f")) for m, one in means.items() if one]
        if each:
            shown = ", ".join(f"{clean(model)} {value}".strip() for model, value in each)
            out.print(f"mean of the {words}: {shown}")
    if any(result.paper_metric for result in found.tasks):
        out.print("* the metric that LLM-Pruner reports, and that a mean takes")
    cut = ", ".join(
        f"{one.truncated:,} answers of {one.task}" for one in found.tasks if one.truncated
    )
    if cut:
        out.print(f"longer than the model reads, so their start was cut: {clean(cut)}")
    if found.cached:
        out.print(f"known from an earlier run: {clean(', '.join(found.cached))}")
