"""What ``llm-pruner recover`` says of a run, to people and to scripts."""

from __future__ import annotations

from dataclasses import asdict
from math import exp, inf
from typing import TYPE_CHECKING, Any

from llm_pruner.cli.output import clean, console, count, megabytes, print_table, table
from llm_pruner.cli.training_lines import duration

if TYPE_CHECKING:
    from llm_pruner.commands.recovered import Recovered


def as_data(done: Recovered) -> dict[str, Any]:
    """Return the outcome of a run for scripts."""
    from llm_pruner.commands.recovered import finite

    data = asdict(done)
    data["path"] = str(done.path)
    data["report"] = None if done.report is None else str(done.report)
    data["loss"] = {"before": done.loss[0], "after": done.loss[1]}
    data["perplexity"] = [
        {"before": asdict(before), "after": asdict(after)} for before, after in done.perplexity
    ]
    data["evaluations"] = [{"step": step, "loss": loss} for step, loss in done.evaluations]
    data["saved_as"] = data.pop("kind")
    return dict(finite(data))


def show(done: Recovered) -> None:
    """Print what was won, and on which data."""
    out = console()
    out.print(
        f"{clean(done.model)}: {done.steps:,} steps, {done.tokens:,} tokens, "
        f"{duration(done.seconds)}; {count(done.trained)} of {count(done.parameters)} "
        "parameters trained"
    )
    rows = []
    for source in done.sources:
        before, after = source.loss_before, source.loss_after
        if before is not None and after is not None:
            note = f"held out, {source.held_out_samples} samples"
            tokens = f"{source.held_out_tokens:,}"
            rows.append((source.name, note, tokens, *_change(_exp(before), _exp(after))))
    for old, new in done.perplexity:
        note = f"windows of {old.window}"
        tokens = f"{old.tokens:,}"
        rows.append((old.corpus, note, tokens, *_change(old.perplexity, new.perplexity)))
    columns = ("text", "", "tokens", "before", "after", "change")
    print_table(out, table("Perplexity", columns, rows, text=("",)))
    if done.stopped is not None:
        out.print(f"ended early: {done.stopped}")
    if done.gained and done.best_step != done.steps:
        out.print(f"the weights of step {done.best_step} were the best and are kept")
    saved = f"saved to {clean(str(done.path))} ({megabytes(done.bytes)})"
    out.print(saved, soft_wrap=True)
    if done.report is not None:
        out.print(f"report: {clean(str(done.report))}", soft_wrap=True)
    if done.needs:
        out.print(f"loads with from_pretrained, as before, with {' and '.join(done.needs)}")


def no_gain(done: Recovered) -> str:
    """Return the warning that the result is the model as it came."""
    before, after = done.loss
    return (
        f"warning: training brought no gain (held-out loss {before:.4f} before, {after:.4f} "
        f"after), so {clean(str(done.path))} holds the model as it came; use more data, another "
        "--learning-rate or more steps"
    )


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.2f}", f"{after:.2f}", f"{100 * (after / before - 1):+.1f}%"


def _exp(loss: float) -> float:
    return exp(loss) if loss < 700 else inf
