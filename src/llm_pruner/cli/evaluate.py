"""``llm-pruner evaluate``: perplexity and zero-shot tasks, with what a comparison needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llm_pruner.cli.output import (
    clean,
    console,
    count,
    print_table,
    table,
    warn,
    write_json,
)
from llm_pruner.settings.evaluate import EvaluateSettings

EXAMPLES = """\b
Examples:
  llm-pruner evaluate ./small --perplexity wikitext2 --perplexity c4
  llm-pruner evaluate ./small --perplexity text.txt --protocol paper
  llm-pruner evaluate ./small --perplexity c4 --report ./small
  llm-pruner evaluate ./small --tasks paper
  llm-pruner evaluate ./small --tasks paper --tasks-data tasks/ --limit 200
"""


def run(settings: EvaluateSettings, json: str | None) -> None:
    """Measure perplexity, zero-shot tasks, speed, samples."""
    settings.check()
    report = settings.report
    if report is not None:
        from llm_pruner.report.write import report_in

        report_in(report)  # what cannot be read is said before the model is loaded

    from llm_pruner.commands.evaluate import measure
    from llm_pruner.evaluation.result_cache import shared_corpora

    for warning in shared_corpora(settings.model, settings.perplexity):
        warn(warning)
    found = measure(settings)
    data = asdict(found)
    write_json(data, json)
    if report is not None:
        from llm_pruner.report.write import add_evaluations, report_in, variant_of

        variant = variant_of(report, report_in(report), settings.model, found.parameters)
        add_evaluations(report, {variant: data})
    if json != "-":
        show(data)
        if report is not None:
            page = clean(str(report / "report.html"))
            console().print(f"added to {page}", soft_wrap=True)


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    out = console()
    out.print(f"{clean(found['model'])}: {count(found['parameters'])} parameters")
    if found["perplexity"]:
        rows = [
            (
                result["corpus"],
                result["split"] or "-",
                result["protocol"],
                result["window"],
                f"{result['tokens']:,}",
                f"{result['perplexity']:.2f}",
                "-" if result["stderr"] is None else f"{result['stderr']:.2f}",
            )
            for result in found["perplexity"]
        ]
        columns = ("corpus", "split", "protocol", "window", "tokens", "perplexity", "stderr")
        print_table(out, table("Perplexity", columns, rows))
    if found["zero_shot"]:
        show_tasks(found["zero_shot"])
    if found["speed"]:
        out.print(
            f"prefill {found['speed']['prefill_tokens_per_second']:.1f} tokens/s, "
            f"decode {found['speed']['decode_tokens_per_second']:.1f} tokens/s"
        )
    for text, continuation in found["samples"].items():
        out.print(f"> {clean(text)}{clean(continuation)}")


def show_tasks(found: dict[str, Any]) -> None:
    """Print a line for each metric of each task, and the means."""
    out = console()
    rows = [
        (
            result["task"] if number == 0 else "",
            f"{result['documents']:,}" if number == 0 else "",
            f"{name} *" if name == result["paper_metric"] else name,
            f"{metric['value']:.4f}",
            "-" if metric["stderr"] is None else f"{metric['stderr']:.4f}",
        )
        for result in found["tasks"]
        for number, (name, metric) in enumerate(result["metrics"].items())
    ]
    title = f"Zero-shot (lm-evaluation-harness {found['versions']['lm_eval']})"
    columns = ("task", "items", "metric", "value", "stderr")
    print_table(out, table(title, columns, rows, text=("metric",)))
    for key, words in (("mean", "seven tasks"), ("mean_without_boolq", "six without boolq")):
        mean = found[key]
        if mean is not None:
            spread = "" if mean["stderr"] is None else f" +- {mean['stderr']:.4f}"
            out.print(f"mean of the {words}: {mean['value']:.4f}{spread}")
    if any(result["paper_metric"] for result in found["tasks"]):
        out.print("* the metric that LLM-Pruner reports, and that a mean takes")
    cut = {result["task"]: result["truncated"] for result in found["tasks"] if result["truncated"]}
    if cut:
        names = ", ".join(f"{count:,} of {task}" for task, count in cut.items())
        out.print(f"longer than the model reads, so their start was cut: {clean(names)}")
    if found["cached"]:
        out.print(f"known from an earlier run: {clean(', '.join(found['cached']))}")
