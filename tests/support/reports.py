"""Reports made by hand: one with every part, and one whose texts all try to break out."""

from __future__ import annotations

from typing import Any

from llm_pruner.report.data import (
    Evaluation,
    ImportanceMap,
    ImportanceRow,
    LossPoint,
    Measurement,
    Perplexity,
    Recovery,
    Report,
    Source,
    TaskScore,
)
from llm_pruner.types import Layer, Size, SplitTrial

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> </td></table></style></svg>"
    "\"'> [a](http://evil.example/) ![b](http://evil.example/b.png) `c` **d** | e | $\\frac{1}{2}$ "
    "{{ 7 * 7 }} {% raw %} <!-- \x1b[31mred\x07\x9b2J \u202eesrever\u202c \ud800 \x00 "
    "# f --- www.evil.example"
)
"""Markup of HTML, SVG, Markdown, YAML, Jinja and mathtext; escapes of a terminal; worse."""


def evaluation(factor: float, text: str) -> Evaluation:
    """Return every kind of measurement; ``factor`` tells models apart."""
    return Evaluation(
        perplexity=(
            Perplexity(
                perplexity=20 * factor,
                stderr=0.5,
                corpus=f"Salesforce/wikitext wikitext-2-raw-v1{text}",
                split="test",
                protocol="standard",
                window=512,
                tokens=1022,
            ),
            Perplexity(perplexity=30 * factor, corpus=f"own{text}", window=64, tokens=63),
        ),
        tasks=(
            TaskScore(
                task=f"boolq{text}", metric="acc", value=0.6 / factor, stderr=0.02, items=200
            ),
            TaskScore(task="piqa", metric="acc", value=0.7 / factor, items=200, in_mean=False),
            TaskScore(task="piqa", metric="acc_norm", value=0.8 / factor, items=200),
        ),
        measurements=(
            Measurement(name=f"decode{text}", unit="tokens/s", value=8 / factor, better="higher"),
            Measurement(name="file", unit="B", value=5e6 / factor, better="lower"),
            Measurement(
                name="prefill", unit="tokens/s", value=100.0, low=90.0, high=110.0, better="higher"
            ),
        ),
        samples={f"Once{text}": f" upon a time{text} {factor}"},
    )


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
        "saved_as": "recipe",
        "needs": ("import llm_pruner", f"trust_remote_code=True{text}"),
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
