"""Reports made by hand: one with every part, and one whose texts all try to break out."""

from __future__ import annotations

from typing import Any

from llm_pruner.report.data import (
    Evaluation,
    ImportanceMap,
    ImportanceRow,
    LossPoint,
    Recovery,
    Report,
    Result,
    Source,
)
from llm_pruner.types import Layer, Size, SplitTrial

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> </td></table></style></svg>"
    "\"'> [a](http://evil.example/) ![b](http://evil.example/b.png) `c` **d** | e | $\\frac{1}{2}$ "
    "{{ 7 * 7 }} {% raw %} <!-- \x1b[31mred\x07\x9b2J \u202eesrever\u202c \x00 "
    "# f --- www.evil.example"
)
"""Markup of HTML, SVG, Markdown, YAML, Jinja and mathtext; escapes of a terminal; worse."""


def result(part: Any, name: str, value: float, settings: str = "", **how: Any) -> Result:
    """Return a result of one of the tables."""
    usual = {"perplexity": {"better": "lower"}, "tasks": {"unit": "%", "better": "higher"}}
    return Result(part=part, name=name, value=value, settings=settings, **usual.get(part, {}) | how)


def evaluation(factor: float, text: str) -> Evaluation:
    """Return every kind of measurement; ``factor`` tells models apart."""
    wikitext, windows = f"Salesforce/wikitext wikitext-2-raw-v1, test{text}", "windows of 512"
    results = (
        result("perplexity", wikitext, 20 * factor, windows, stderr=0.5),
        result("perplexity", f"own{text}", 30 * factor, "windows of 64"),
        result("bits", f"own{text}", 1.0, "windows of 64", unit="bits per byte", better="lower"),
        result("tasks", f"boolq{text}, acc", 0.6 / factor, "9 items", stderr=0.02, in_mean=True),
        result("tasks", "mmlu, acc", 0.7 / factor, "9 items"),
        result("tasks", "piqa, acc_norm", 0.8 / factor, "9 items", in_mean=True),
        result("measured", f"decode{text}", 8 / factor, unit="tokens/s", better="higher"),
        result("measured", "size on disk", 5e6 / factor, unit="B", better="lower"),
        result("measured", "prefill", 100.0, unit="tokens/s", better="higher", low=90, high=110),
    )
    return Evaluation(results=results, samples={f"Once{text}": f" upon a time{text} {factor}"})


def full_report(text: str = "", **changes: Any) -> Report:
    """Return a report with every part; ``text`` is added to every text in it."""
    layers = [Layer(layer=None, sizes={"hidden": (48, 48)})]
    for number in range(6):
        whole = number in (0, 5)
        ffn = (80 if whole else 40, 80)
        sizes = {"heads": (3 if whole else 2, 3), "query_heads": (6 if whole else 4, 6)}
        layers.append(Layer(layer=number, sizes={**sizes, "ffn": ffn, f"odd{text}": (5, 7)}))
    rows = tuple(
        ImportanceRow(layer=n, units=4, removed=n % 3, bins=(0.1 * n, 0.2 * n, None, 1.5 * n))
        for n in range(1, 5)
    )
    values = {
        "source": Source(
            name=f"org/model{text}",
            hub_id=f"org/model{text}",
            revision=f"abc{text}",
            architecture="LlamaForCausalLM",
            license=f"apache-2.0{text}",
        ),
        "sizes": {
            "dense": Size(total=1000, embedding=200, blocks=790, bytes=4000),
            "pruned": Size(total=800, embedding=200, blocks=590, bytes=3200),
            "recovered": Size(total=800, embedding=200, blocks=590, bytes=3200),
        },
        "layers": tuple(layers),
        "importance": (
            ImportanceMap(kind="ffn", rows=rows),
            ImportanceMap(kind=f"odd{text}", rows=rows),
        ),
        "criterion": f"taylor importance{text}",
        "compensation": f"least-squares{text}",
        "repair": f"7 steps{text}",
        "trials": (
            SplitTrial(split={f"heads{text}": 0.25, "ffn": 0.75}, divergence=0.5),
            SplitTrial(split={f"heads{text}": 0.0, "ffn": 1.0}, divergence=0.125),
        ),
        "twin_difference": 1.5e-6,
        "saved_as": "stock",
        "needs": (f"trust_remote_code=True{text}",),
        "seconds": {f"load{text}": 1.25},
        "evaluations": {
            "dense": evaluation(1, text),
            "pruned": evaluation(4, text),
            "recovered": evaluation(2, text),
        },
        "recovery": Recovery(
            loss=tuple(LossPoint(step=n, train=3 / (n + 1), validation=2.5) for n in range(5)),
            seconds=61.5,
            summary=f"LoRA of rank 8{text}",
        ),
        "settings": {f"Model{text}": {f"dtype{text}": f"float32{text}", "revision": None}},
        "versions": {f"torch{text}": f"2.0{text}"},
        "command": f"llm-pruner prune org/model{text} --out small",
    }
    return Report(**(values | changes))
