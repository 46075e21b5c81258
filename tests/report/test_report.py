"""The report: what it says, and that nothing in it can break out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.report import figures, view, write
from llm_pruner.report.compare import Entry, compare
from llm_pruner.report.data import (
    Evaluation,
    ImportanceMap,
    ImportanceRow,
    LossPoint,
    Measurement,
    Perplexity,
    Report,
    Source,
    TaskScore,
    read_report,
)
from llm_pruner.report.facts import importance_maps, layers_of, recovery_report
from llm_pruner.report.records import Change, Measured, Recovered
from llm_pruner.report.text import (
    clean,
    fenced,
    markdown,
    measured,
    number,
    safe_json,
    visible,
)
from llm_pruner.report.write import add_evaluation, files, render_card, render_html
from llm_pruner.types import Discovery, Group, Layer, Size
from reports import HOSTILE, full_report


class _Elements(HTMLParser):
    """All elements of a page in their order, with the names of their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))
        for name, value in attrs:
            if name.endswith(("href", "src", "action", "data")) or "url(" in (value or ""):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(full_report())


@pytest.fixture(scope="module")
def hostile() -> str:
    return render_html(full_report(HOSTILE))


# What the page says.


@pytest.mark.slow
def test_every_part_is_shown(page: str) -> None:
    sections = re.findall(r'<section id="([\w-]+)">', page)
    assert sections == [
        *("before-after", "perplexity", "tasks", "speed", "widths", "trials"),
        *("importance", "recovery", "samples", "command", "settings"),
    ]
    text = " ".join(_Elements(page).text.split())
    assert (
        "org/model was pruned from 1.0K to 800 parameters (20.0% removed); it keeps 14 of 18 "
        "key-value heads, 320 of 480 FFN channels and 30 of 42 odd, chosen by taylor importance. "
        "What reads the pruned axes was refitted (least-squares). Its weights were repaired by 7 "
        "steps. Then it was recovered by LoRA of rank 8."
    ) in text
    # The best split is the first.
    assert "heads 0.0%, FFN channels 100.0%0.1250 heads 25.0%, FFN channels 75.0%0.5000" in text
    assert "llm-pruner prune org/model --out small" in text
    assert "largest difference 1.5e-06" in text
    # Of both kinds there may be some in one table.
    assert "of a speed, which is a median, that of the slowest and the fastest round; of" in text
    assert "of a mean or a share one standard error either way" in text
    for written in ("upon a time 1", "upon a time 4", "upon a time 2"):
        assert written in text


def test_absent_parts_are_not_shown() -> None:
    page = render_html(Report(source=Source(name="model")))
    assert "<section" not in page
    assert "<svg" not in page
    assert "model was pruned. Nothing was trained afterwards." in page
    card = render_card(Report(source=Source(name="model")))
    assert re.findall(r"^#+ .*", card, re.MULTILINE) == ["# model, pruned", "## Use it"]
    assert "import llm_pruner" not in card
    assert "trust_remote_code" not in card


def test_the_card_says_how_to_load() -> None:
    card = render_card(full_report())
    assert "\nimport llm_pruner  # pip install llm-pruner\nfrom transformers import" in card
    assert card.count('from_pretrained("path/to/this/folder", trust_remote_code=True)') == 2
    assert "needs: import llm_pruner, trust_remote_code=True (layers differ" in render_html(
        full_report(importance=(), evaluations={}, layers=(), recovery=None)
    )


def test_tables_by_hand() -> None:
    report = full_report()
    sizes = view.sizes(report)
    assert sizes is not None
    assert sizes.models == ("dense", "pruned", "recovered")
    rows = {row.label: (row.cells, row.change) for row in sizes.rows}
    assert rows["parameters"] == (("1,000", "800", "800"), "−20.0%")
    assert rows["in embeddings"] == (("200", "200", "200"), "unchanged")
    assert rows["key-value heads"] == (("18", "14", "14"), "−22.2%")
    # Query heads that go with their key-value heads are not said twice.
    assert "query heads" not in rows
    perplexity = view.compared(report, "perplexity")
    assert perplexity is not None
    settings = "standard protocol, windows of 512, 1,022 tokens"
    label = f"Salesforce/wikitext wikitext-2-raw-v1, test ({settings})"
    first = perplexity.rows[0]
    assert (first.label, first.change, first.better) == (label, "× 2.00", False)
    assert first.cells == ("20.00 ± 0.50", "80.00 ± 0.50", "40.00 ± 0.50")
    tasks = view.task_table(report)
    assert tasks is not None
    assert tasks.rows[0].cells == ("60.0 ± 2.0", "15.0 ± 2.0", "30.0 ± 2.0")
    # (60 + 80) / 2: the metric that is not in the mean is left out of it.
    assert tasks.rows[-1].label == "mean"
    assert tasks.rows[-1].cells == ("70.0", "17.5", "35.0")
    assert tasks.rows[-1].change == "−35.0 points"
    assert tasks.note.endswith("The mean takes acc of boolq, acc_norm of piqa.")
    # A change is one from the dense model.
    later = {name: of for name, of in report.evaluations.items() if name != "dense"}
    tasks = view.task_table(full_report(evaluations=later))
    assert tasks is not None
    assert (tasks.rows[-1].cells, tasks.rows[-1].change) == (("17.5", "35.0"), "")
    speed = view.compared(report, "measurements", lambda found: found.spread)
    assert speed is not None
    assert speed.rows[0].label == "decode, tokens/s"
    assert (speed.rows[0].cells, speed.rows[0].change) == (("8", "2", "4"), "× 0.50")
    assert [row.better for row in speed.rows] == [False, True, None]
    assert speed.rows[1].cells[0] == "5.0 MB"
    assert speed.rows[2].cells[0] == "100 (90 to 110)"


def test_only_equal_settings_are_compared() -> None:
    def one(tokens: int, window: int = 64) -> Evaluation:
        return Evaluation(
            perplexity=(Perplexity(perplexity=9.0, corpus="text", tokens=tokens, window=window),)
        )

    report = Report(source=Source(name="m"))
    for variant, tokens in (("dense", 100), ("pruned", 200)):
        report = report.with_evaluation(variant, one(tokens))
    table = view.compared(report, "perplexity")
    assert table is not None
    assert [(row.cells, row.change) for row in table.rows] == [
        (("9.00", ""), ""),
        (("", "9.00"), ""),
    ]
    # The mean needs every task from every model that it is shown for.
    scores = [TaskScore(task=name, metric="acc", value=0.5) for name in ("a", "b")]
    report = report.with_evaluation("dense", Evaluation(tasks=tuple(scores)))
    report = report.with_evaluation("pruned", Evaluation(tasks=(scores[0],)))
    assert view.task_means(report.evaluations) == {"dense": 0.5}
    table = view.task_table(report)
    assert table is not None
    assert [row.label for row in table.rows] == ["a, acc", "b, acc"]


def test_the_mean_takes_a_task_once() -> None:
    """Measured on fewer items as well, it counts as all models have it, or as the latest does."""
    few, piqa = (
        TaskScore(task=name, metric="acc", value=value, items=10)
        for name, value in (("boolq", 0.2), ("piqa", 0.8))
    )
    more = few.model_copy(update={"value": 0.6, "items": 20})
    both = Evaluation(tasks=(few, piqa)).with_newer(Evaluation(tasks=(more,)))
    assert view.task_means({0: both}) == {0: pytest.approx(0.7)}
    old = Evaluation(tasks=(few, piqa))
    assert view.task_means({0: both, 1: old}) == {n: pytest.approx(0.5) for n in range(2)}
    report = Report(source=Source(name="m"), evaluations={"dense": both, "pruned": old})
    table = view.task_table(report)
    assert table is not None
    assert [row.cells for row in table.rows if row.label == "mean"] == [("50.0", "50.0")]
    assert table.note.endswith("The mean takes boolq, acc (10 items); piqa, acc (10 items).")
    entries = [Entry(name, report, name) for name in ("dense", "pruned")]
    [mean] = [column for column in compare(entries).columns if column.name == "mean"]
    assert mean.cells == ("50.0", "50.0")
    assert mean.settings == "of boolq, acc (10 items); piqa, acc (10 items)"
    # A model that has it otherwise has no mean.
    apart = Evaluation(tasks=(more, piqa))
    assert view.task_means({0: old, 1: apart}) == {1: pytest.approx(0.7)}


def text_of(value: float = 9.0, **changes: Any) -> Perplexity:
    """Return a perplexity on a text of which all is known."""
    known = {"protocol": "standard", "window": 64, "tokens": 126, "dtype": "float32"}
    digests = {"ids_digest": "1", "text_digest": "a", "bits_per_byte": value / 2}
    return Perplexity(perplexity=value, corpus="t.txt", **known | digests | changes)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": None}, {"ids_digest": "2"}])
def test_what_was_computed_or_read_otherwise_stands_apart(changes: dict[str, Any]) -> None:
    report, kl = Report(source=Source(name="m")), Measurement(name="KL", value=1.0, of="1")
    for variant, text in (("dense", text_of()), ("pruned", text_of(**changes))):
        found = Evaluation(
            perplexity=(text,), measurements=(kl.model_copy(update={"of": variant}),)
        )
        report = report.with_evaluation(variant, found)
    for part in ("perplexity", "measurements"):
        table = view.compared(report, part)
        assert table is not None
        assert [row.cells.index("") for row in table.rows] == [1, 0]


def shown(*results: Perplexity | TaskScore) -> list[tuple[str, tuple[str, ...]]]:
    """Return names and cells of a comparison of models, each with one result."""
    entries = []
    for at, one in enumerate(results):
        part = "perplexity" if isinstance(one, Perplexity) else "tasks"
        found = {"pruned": Evaluation(**{part: (one,)})}
        report = Report(source=Source(name="m"), evaluations=found)
        entries.append(Entry(str(at), report, "pruned"))
    return [(column.name, column.cells) for column in compare(entries).columns]


def test_compare_shows_tasks_that_are_in_no_mean() -> None:
    """And tells apart the same task on other items."""
    mmlu = TaskScore(task="mmlu", metric="acc", value=0.5, items=9, in_mean=False, shots=5)
    other = mmlu.model_copy(update={"items": 8})
    assert shown(mmlu, mmlu) == [("mmlu", ("50.0", "50.0"))]
    assert shown(mmlu, other) == [
        ("mmlu, acc (9 items, 5 shots)", ("50.0", "")),
        ("mmlu, acc (8 items, 5 shots)", ("", "50.0")),
    ]
    for changes in ({"version": "2"}, {"digest": "b"}, {"shots": 0}, {"dtype": "bfloat16"}):
        cells = [cells for _, cells in shown(mmlu, mmlu.model_copy(update=changes))]
        assert cells == [("50.0", ""), ("", "50.0")]
    half = mmlu.model_copy(update={"dtype": "bfloat16"})
    assert half.label == "mmlu, acc (9 items, 5 shots, bfloat16)"
    # Another metric of a task in the mean is left out.
    boolq = TaskScore(task="boolq", metric="acc", value=0.5)
    beside = boolq.model_copy(update={"metric": "acc_norm", "in_mean": False})
    assert shown(boolq, beside)[:1] == [("boolq", ("50.0", ""))]


def test_a_result_of_an_earlier_version_gives_way_to_the_same_measured_anew() -> None:
    """Which did not say of what type, or of which problems, it is."""
    old, other = (TaskScore(task=name, metric="acc", value=0.5) for name in ("boolq", "piqa"))
    new = old.model_copy(update={"value": 0.6, "dtype": "float32"})
    both = Evaluation(tasks=(old, other)).with_newer(Evaluation(tasks=(new,)))
    assert both.tasks == (new, other)
    again = new.model_copy(update={"dtype": "bfloat16"})
    assert both.with_newer(Evaluation(tasks=(again,))).tasks == (new, other, again)


def test_compare_shows_bits_per_byte_where_tokens_differ() -> None:
    assert shown(text_of(), text_of(8.0)) == [("t.txt", ("9.00", "8.00"))]
    name = "t.txt (standard protocol, windows of 64, float32), bits per byte"
    assert shown(text_of(), text_of(8.0, ids_digest="2")) == [(name, ("4.5000", "4.0000"))]
    # Another text, or less of it, is another column.
    apart = text_of(8.0, text_digest="b", ids_digest="2")
    assert [cells for _, cells in shown(text_of(), apart)] == [("9.00", ""), ("", "8.00")]
    less = text_of(7.0, max_tokens=99, ids_digest="3")
    found = shown(text_of(), text_of(8.0, ids_digest="2"), less)
    assert found == [
        (name, ("4.5000", "4.0000", "")),
        (name.replace("64,", "64, 99 tokens,"), ("", "", "3.5000")),
    ]


def test_newer_results_replace_older_ones() -> None:
    old, new = full_report(), Perplexity(perplexity=7.0, corpus="own", window=64, tokens=63)
    found = old.with_evaluation("pruned", Evaluation(perplexity=(new,), samples={"Hi": "there"}))
    values = [result.perplexity for result in found.evaluations["pruned"].perplexity]
    assert values == [80.0, 7.0]
    assert list(found.evaluations["pruned"].samples) == ["Once", "Hi"]
    assert found.evaluations["dense"] == old.evaluations["dense"]


def recovered(**changes: Any) -> Recovered:
    """Return a recovery without a gain; on a text the perplexity was 7 and is 7."""
    own = PerplexityResult(7.0, 1.0, 63, "own", None, 64, 1, "standard", None)
    known = Recovered(
        model="m",
        gained=False,
        loss=Change(2.0, 3.0),
        sources=(),
        perplexity=(Change(own, own),),
        steps=3,
        best_step=0,
        stopped=None,
        tokens=9,
        seconds=1.0,
        trained=9,
        parameters=800,
        packed=True,
        losses=[3.0],
        evaluations=[],
        settings={"method": "full", "teacher": None, "distillation": None},
        path=Path("out"),
    )
    return replace(known, **changes)


@pytest.mark.parametrize("gained", [False, True])
def test_a_model_that_was_trained_and_never_pruned(gained: bool, tmp_path: Path) -> None:
    """Its source may be measured into its report, which never says that it was pruned."""
    known = {"source": Source(name="m"), "size": Size(total=800), "command": None}
    report = recovery_report(recovered(gained=gained), None, pruned=False, **known)
    (tmp_path / "report.json").write_text(report.to_json())
    for model in ("m", str(tmp_path)):
        add_evaluation(tmp_path, Measured("m", 800, None, None, [], samples={model: "x"}), model)
    report = read_report(tmp_path / "report.json")
    models = {name: list(of.samples) for name, of in report.evaluations.items()}
    if gained:
        assert models == {"dense": ["m"], "recovered": [str(tmp_path)]}
    else:
        assert models == {"dense": ["m", str(tmp_path)]}
    assert view.title(report) == ("m, recovered" if gained else "m, dense")
    assert "removed" not in (tmp_path / "report.html").read_text()
    assert "pruned" not in (tmp_path / "README.md").read_text()
    # Of a pruned one without a report that much is known.
    report = recovery_report(recovered(gained=gained), None, pruned=True, **known)
    assert view.title(report) == "m, pruned"
    assert report.final == ("recovered" if gained else "pruned")


def test_what_is_added_by_two_at_once_is_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"source": Source(name="m"), "size": Size(total=800), "command": None}
    report = recovery_report(recovered(gained=True), None, pruned=False, **known)
    (tmp_path / "report.json").write_text(report.to_json())
    draw, others = write.files, []

    def add(model: str) -> None:
        add_evaluation(tmp_path, Measured("m", 800, None, None, [], samples={model: "x"}), model)

    def drawn(*given: Any, **how: Any) -> Any:
        if not others:
            others.append(Thread(target=add, args=(str(tmp_path),)))
            others[0].start()
            others[0].join(timeout=0.5)  # which waits until this one is written
        return draw(*given, **how)

    monkeypatch.setattr(write, "files", drawn)
    add("m")
    others[0].join()
    report = read_report(tmp_path / "report.json")
    models = {name: list(of.samples) for name, of in report.evaluations.items()}
    assert models == {"dense": ["m"], "recovered": [str(tmp_path)]}


def test_a_second_recovery_without_a_gain_leaves_what_is_known() -> None:
    done = recovered()
    earlier = full_report()
    size = earlier.sizes["recovered"]
    known = {"source": earlier.source, "pruned": True, "size": size, "command": None}
    found = recovery_report(done, earlier, **known)
    assert found.final == "recovered"
    for name in ("recovery", "sizes", "settings", "seconds"):
        assert getattr(found, name) == getattr(earlier, name)
    assert found.evaluations["pruned"] == earlier.evaluations["pruned"]
    values = [one.perplexity for one in found.evaluations["recovered"].perplexity]
    assert values == [*(one.perplexity for one in earlier.evaluations["recovered"].perplexity), 7.0]
    # One with a gain takes its place.
    found = recovery_report(replace(done, gained=True), earlier, **known)
    assert found.recovery is not None
    assert found.recovery.summary == "training of all weights on , 3 steps"
    assert [one.perplexity for one in found.evaluations["recovered"].perplexity] == [7.0]


def test_layers_that_go_whole() -> None:
    layers = [
        Layer(layer=n, removed=n == 1, sizes={"heads": (0 if n == 1 else 4, 4)}) for n in range(4)
    ]
    layers.insert(0, Layer(layer=None, sizes={"layers": (3, 4), "hidden": (40, 48)}))
    report = Report(
        source=Source(name="m"),
        sizes={"dense": Size(total=100), "pruned": Size(total=80)},
        layers=tuple(layers),
    )
    assert "; it keeps 3 of 4 layers and 40 of 48 hidden channels." in view.sentence(report)
    # Of two lists, the second loses another layer than the first.
    across = Layer(layer=None, sizes={"layers": (3, 4), "layers_2": (2, 3)})
    whole = [replace(layer, removed=False, sizes={}) for layer in layers[1:]]
    two = report.model_copy(update={"layers": (across, *whole)})
    assert "; it keeps 3 of 4 layers and 2 of 3 layers_2." in view.sentence(two)
    table = view.sizes(two)
    assert table is not None
    rows = {row.label: row.cells for row in table.rows}
    assert (rows["layers"], rows["layers_2"]) == (("4", "3"), ("3", "2"))
    assert 'id="widths"' in render_html(report)


def test_drawings_are_themed_and_stand_alone(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # Perplexity, tasks, widths, importance and loss, each for screens and for phones.
    assert len(drawings) == 10
    assert sum('class="plot narrow"' in drawing for drawing in drawings) == 5
    for drawing in drawings:
        assert 'aria-label="' in drawing
        assert "#0101" not in drawing
        assert "DejaVu" not in drawing
        assert "var(--" in drawing
        viewed = float(re.search(r'viewBox="0 0 (\S+) ', drawing)[1])
        assert viewed == (340 if "plot narrow" in drawing else 840)
    elements = _Elements(page)
    assert len(elements.ids) == len(set(elements.ids))
    for link in elements.links:
        name = re.fullmatch(r"#(.+)|url\(#(.+)\)|data:.*", link)
        assert name is not None, link
        target = name[1] or name[2]
        assert target is None or target in elements.ids, link
    assert "<script" not in page
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_drawings_of_odd_numbers() -> None:
    """Nothing known, all alike, zeros, negative: each gives a drawing and no warning."""
    for bins in ((None, None), (5.0, 5.0), (0.0, 1e-3), (-1.0, 2.0)):
        row = ImportanceRow(layer=0, units=2, removed=1, bins=bins)
        assert figures.heat([ImportanceMap(kind="ffn", rows=(row,))], ["FFN"]).count("<svg") == 2
    for values in ([("dense", math.inf, None)], [("dense", 1.0, 0.0), ("pruned", 1e9, math.nan)]):
        assert figures.dots("p", "title", [("text", values)], share=False).count("<svg") == 2
    assert figures.loss([LossPoint(step=1, validation=math.nan)]).count("<svg") == 2
    empty = Layer(layer=0, sizes={"ffn": (0, 0)})
    assert figures.widths([empty], [("ffn", "FFN")]).count("<svg") == 2


@pytest.mark.slow
def test_equal_reports_are_equal_bytes(page: str) -> None:
    assert render_html(full_report()) == page
    assert len(page) < 500_000


# Nothing breaks out.


@pytest.mark.slow
def test_hostile_text_stays_text_on_the_page(page: str, hostile: str) -> None:
    # Drawings differ: labels of several lines, other ticks.
    drawing = re.compile(r"<svg.*?</svg>", re.DOTALL)
    harmless, found = (_Elements(drawing.sub("", text)) for text in (page, hostile))
    # So do breaks after slashes and commas, and words of the command.
    own = {"wbr", "span"}
    with_markup, without = (
        [element for element in elements.found if element[0].strip("/") not in own]
        for elements in (found, harmless)
    )
    assert with_markup == without
    drawn = {e[0].strip("/") for text in drawing.findall(hostile) for e in _Elements(text).found}
    known = {"svg", "g", "defs", "style", "path", "use", "text", "clippath", "rect", "image"}
    assert drawn <= known
    assert "<script>alert(1)</script>" in found.text
    assert "$\\frac{1}{2}$" in found.text
    assert "{{ 7 * 7 }}" in found.text
    for steering in ("\x1b", "\x07", "\x9b", "\u202e", "\x00", "\ud800"):
        assert steering not in hostile
    hostile.encode("utf-8")


def test_hostile_text_stays_text_in_the_card() -> None:
    written = render_card(full_report(HOSTILE))
    assert not any(c in written for c in "\x1b\x07\x9b\u202e\x00\ud800")
    _, front, body = written.split("---\n", 2)
    data = yaml.safe_load(front)
    # Neither the id nor the licence is one that the hub knows.
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}
    plain = render_card(full_report()).split("---\n", 2)[2]
    shown, harmless = (
        _Elements(MarkdownIt("commonmark").enable("table").render(text)) for text in (body, plain)
    )
    assert shown.found == harmless.found
    assert "<script>alert(1)</script>" in shown.text
    assert "[a](http://evil.example/)" in shown.text
    # The hub also makes links of bare addresses.
    outside = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", body)
    assert not re.search(r"(?<!\\)://|(?<!\\)(?i:www)\.", outside)


def test_front_matter() -> None:
    front = yaml.safe_load(render_card(full_report()).split("---\n")[1])
    results = front.pop("model-index")[0]
    assert front == {
        "base_model": "org/model",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llm-pruner", "pruned", "structural-pruning"],
    }
    # What was measured is of no model of another name, and says of how much it is.
    assert results["name"] == "org/model, pruned"
    found = [(r["dataset"]["name"], r["metrics"][0]) for r in results["results"]]
    # Of the model in the folder; the user's own text is no data set.
    wikitext = "Salesforce/wikitext wikitext-2-raw-v1"
    settings = "standard protocol, windows of 512, 1,022 tokens"
    assert found == [
        (name, {"type": metric, "name": label, "value": value})
        for name, metric, label, value in (
            (wikitext, "perplexity", f"perplexity, {wikitext}, test ({settings})", 40.0),
            ("boolq", "acc", "boolq, acc (200 items)", 0.3),
            ("piqa", "acc_norm", "piqa, acc_norm (200 items)", 0.4),
        )
    ]
    assert [(r["dataset"]["type"], r["dataset"].get("config")) for r in results["results"]] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("boolq", None),
        ("piqa", None),
    ]
    # Of other tokens than all models have, perplexity says nothing.
    fewer = yaml.safe_load(render_card(full_report(tokens=(9, 5))).split("---\n")[1])
    names = [one["dataset"]["name"] for one in fewer["model-index"][0]["results"]]
    assert names == ["boolq", "piqa"]


def test_the_command_of_a_card_tells_no_folder() -> None:
    """Ids of the hub stay as they are; where the model came from it, a folder has its name."""
    said = (
        "llm-pruner prune {model} --out out/acme-small --calibration c4:0.6,data/mails.txt:0.4 "
        "--plan=plans/acme && llm-pruner recover out/acme-small/ -o '/home/me/a b/' --data me/text "
        "--data data/acme/mails.jsonl --teacher {model} --trainer logging_dir=../logs"
    )
    shown = (
        "llm-pruner prune {model} --out acme-small --calibration c4:0.6,mails.txt:0.4 "
        "--plan=acme && llm-pruner recover acme-small -o 'a b' --data me/text "
        "--data mails.jsonl --teacher {model} --trainer logging_dir=logs"
    )
    for source, model, name in (
        (Source(name="me/acme", hub_id="me/acme"), "me/acme", "me/acme"),
        (Source(name="acme"), "models/acme", "acme"),
        (Source(name="acme"), "models/acme.gguf", "acme.gguf"),
    ):
        report = Report(source=source, command=said.format(model=model))
        assert view.command(report) == shown.format(model=name)


def test_the_command_of_a_card_tells_no_folder_of_windows() -> None:
    said = (
        r"llm-pruner prune 'C:\Users\anna\acme\' --out 'out\small' --plan='plans\acme' "
        r"--data 'c:\mails.txt:0.4,c4:0.6' --data D:/acme.jsonl --teacher '~\acme' "
        r"--calibration 'acme\mails'"
    )
    shown = (
        "llm-pruner prune acme --out small --plan=acme "
        "--data mails.txt:0.4,c4:0.6 --data acme.jsonl --teacher acme "
        "--calibration mails"
    )
    assert view.command(Report(source=Source(name="acme"), command=said)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("org/model-1.5_b", "org/model-1.5_b"),
        ("a|b", "a\\|b"),
        ("- item", "\\- item"),
        ("-20%", "-20%"),
        ("1. item", "&#49;. item"),
        ("1.5", "1.5"),
        ("_a_ b", "\\_a\\_ b"),
        ("line\nline", "line line"),
        ("<b>&amp;", "\\<b\\>\\&amp;"),
    ],
)
def test_markdown(text: str, shown: str) -> None:
    assert markdown(text) == shown
    rendered = MarkdownIt("commonmark").render(shown)
    assert _Elements(rendered).text.strip() == " ".join(text.split())
    assert [e[0] for e in _Elements(rendered).found] == ["p", "/p"]


def test_texts() -> None:
    assert visible("a\tb\nc\u200dd\x1b\u2028") == "a\tb\nc\u200dd\ufffd\ufffd"
    assert clean("a\u202eb") == "a\ufffdb"
    assert fenced("a\n```\nb") == "````text\na\n```\nb\n````"
    written = safe_json({"a": "é\x9b\u202e\ud800\U000e0041"})
    assert "\\u009b\\u202e\\ud800\\udb40\\udc41" in written
    assert json.loads(written)["a"] == "é\x9b\u202e\ud800\U000e0041"
    assert [number(x) for x in (3, 3.14159, 31.4159, 314.159, 3141.59, 0.0314, 1e-9)] == [
        *("3", "3.14", "31.42", "314.2", "3,142", "0.0314", "1.00e-09")
    ]
    assert number(math.inf) == "inf"
    assert measured(31.4159, 0.5) == "31.42 ± 0.50"
    assert measured(31.4159, None) == "31.42"


# The data.


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    unbounded = Evaluation(perplexity=(Perplexity(perplexity=math.inf, corpus="text"),))
    report = full_report(HOSTILE).with_evaluation("pruned", unbounded)
    file = tmp_path / "report.json"
    file.write_text(report.to_json(), encoding="utf-8")
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_report(file) == report
    assert read_report(file).evaluations["pruned"].perplexity[-1].perplexity == math.inf
    # What earlier versions found by searching between layers is read over.
    search = {"trials": 12, "steps": 3, "divergence": [0.5, 0.25], "taken": True}
    data = json.loads(file.read_text()) | {"searches": [search]}
    file.write_text(json.dumps(data))
    assert read_report(file) == report
    small = Report(source=Source(name="m")).with_evaluation("dense", unbounded)
    assert "<td>inf</td>" in render_html(small)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "report.json cannot be read: not JSON; prune again to write it anew"),
        ("[]", "report.json has format_version None, and this version of llm-pruner reads 1; use"),
        ('{"format_version": 2}', "report.json has format_version 2, and this version of llm-"),
        ('{"format_version": 1}', "report.json is no report: source: Field required; prune again"),
    ],
)
def test_files_that_are_no_report(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        read_report(file)


def test_files_name_their_card() -> None:
    report = Report(source=Source(name="model"))
    written = files(report)
    assert list(written) == ["README.md", "report.html", "report.json"]
    assert len(json.loads(written["report.json"])["card_digest"]) == 64
    assert list(files(report, card=False)) == ["report.html", "report.json"]


def test_importance_by_hand() -> None:
    groups = (
        Group("layers", "layers", None, 4, ()),
        Group("layers.0.ffn", "ffn", 0, 50, ()),
        Group("layers.1.ffn", "ffn", 1, 2, ()),
        Group("layers.1.value_dim", "value_dim", 1, 2, ()),
        Group("layers.2.ffn", "ffn", 2, 2, ()),
        Group("layers.3.experts.0.ffn", "ffn", 3, 2, ()),
        Group("layers.3.experts.1.ffn", "ffn", 3, 1, ()),
    )
    discovery = Discovery(groups, (), {}, {}, {})
    scores = {
        "layers.0.ffn": np.arange(50.0)[::-1],
        "layers.1.ffn": np.array([np.inf, 0.25]),
        "layers.1.value_dim": np.ones(2),
        "layers.3.experts.0.ffn": np.array([3.0, 1.0]),
        "layers.3.experts.1.ffn": np.array([2.0]),
    }
    removal = {"layers.0.ffn": np.arange(10), "layers.3.experts.0.ffn": np.array([1])}
    maps = importance_maps(discovery, scores, removal | {"layers": np.array([1])})
    assert [found.kind for found in maps] == ["ffn"]
    first, second, third = maps[0].rows
    assert (first.layer, first.units, first.removed) == (0, 50, 10)
    # 50 units in 24 bins: two of three, the others of two.
    assert len(first.bins) == 24
    assert first.bins[:3] == (1.0, 4.0, 6.5)
    assert list(first.bins) == sorted(first.bins)
    # The layer went whole, and what is not finite is not shown.
    assert (second.removed, second.bins) == (2, (0.25, None))
    # The experts of a layer are taken together.
    assert (third.units, third.removed, third.bins) == (3, 1, (1.0, 2.0, 3.0))


def test_importance_in_several_lists_of_layers() -> None:
    """Layers of the same number share a row; one of them goes whole, the other stays."""
    groups = tuple(
        group
        for name, path in (("layers", "high"), ("layers_2", "low"))
        for group in (
            Group(name, "layers", None, 2, (), path=path),
            *(Group(f"{name}.{n}.ffn", "ffn", n, 3, (), path=path) for n in range(2)),
        )
    )
    scores = {group.name: np.ones(3) for group in groups if group.kind == "ffn"}
    removal = {"layers_2": np.array([1]), "layers.1.ffn": np.array([2])}
    (found,) = importance_maps(Discovery(groups, (), {}, {}, {}), scores, removal)
    assert [(row.units, row.removed) for row in found.rows] == [(6, 0), (6, 4)]


def test_experts_of_a_layer_are_added_up() -> None:
    sizes = {"heads": (3, 4), **{f"mlp.experts.{n}.ffn": (10 - n, 10) for n in range(3)}}
    (layer,) = layers_of([Layer(0, sizes=sizes)])
    assert layer.sizes == {"heads": (3, 4), "mlp.experts.*.ffn": (27, 30)}
