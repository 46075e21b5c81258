"""The report: what it says, and that nothing in it can break out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from llm_pruner.errors import UserError
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.report import figures, view
from llm_pruner.report.compare import Entry, compare
from llm_pruner.report.data import (
    Evaluation,
    ImportanceMap,
    ImportanceRow,
    LossPoint,
    Report,
    Result,
    Source,
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
    visible,
)
from llm_pruner.report.write import add_evaluation, files, render_card, render_html
from llm_pruner.types import Discovery, Group, Layer, Size
from reports import HOSTILE, full_report, result


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
    for written in ("upon a time 1", "upon a time 4", "upon a time 2"):
        assert written in text
    assert "bits per byte" not in page
    # It stands alone: images within it, no script, nothing fetched.
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 3
    assert all(link.startswith("data:") for link in _Elements(page).links)
    assert "default-src 'none'" in page
    assert render_html(full_report()) == page
    assert len(page) < 500_000


def test_absent_parts_are_not_shown() -> None:
    page = render_html(Report(source=Source(name="model")))
    assert "<section" not in page
    assert "<img" not in page
    assert "model was pruned. Nothing was trained afterwards." in page
    card = render_card(Report(source=Source(name="model")))
    assert re.findall(r"^#+ .*", card, re.MULTILINE) == ["# model, pruned", "## Use it"]
    assert "trust_remote_code" not in card


def test_the_card() -> None:
    card = render_card(full_report())
    assert card.count('from_pretrained("path/to/this/folder", trust_remote_code=True)') == 2
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": "org/model",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llm-pruner", "pruned", "structural-pruning"],
    }


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
    perplexity, tasks, measured = (
        view.compared(report, part) for part in ("perplexity", "tasks", "measured")
    )
    first = perplexity.rows[0]
    label = "Salesforce/wikitext wikitext-2-raw-v1, test (windows of 512)"
    assert (first.label, first.change, first.better) == (label, "× 2.00", False)
    assert first.cells == ("20.00 ± 0.50", "80.00 ± 0.50", "40.00 ± 0.50")
    first, *_, mean = tasks.rows
    assert (first.label, first.change) == ("boolq, acc, % (9 items)", "−30.0 points")
    assert first.cells == ("60.0 ± 2.0", "15.0 ± 2.0", "30.0 ± 2.0")
    # (60 + 80) / 2: what is not in the mean is left out of it.
    assert (mean.label, mean.change) == ("mean", "−35.0 points")
    assert mean.cells == ("70.0", "17.5", "35.0")
    first, second, third = measured.rows
    assert (first.label, first.cells, first.change) == (
        *("decode, tokens/s", ("8", "2", "4"), "× 0.50"),
    )
    assert [row.better for row in measured.rows] == [False, True, None]
    assert second.cells[0] == "5.0 MB"
    assert third.cells[0] == "100 (90 to 110)"
    # A change is one from the dense model.
    later = {name: of for name, of in report.evaluations.items() if name != "dense"}
    mean = view.compared(full_report(evaluations=later), "tasks").rows[-1]
    assert (mean.cells, mean.change) == (("17.5", "35.0"), "")
    # Models of different tokens are compared by bits.
    assert [row.label for row in view.compared(full_report(tokens=(9, 5)), "perplexity").rows] == [
        "own, bits per byte (windows of 64)"
    ]


def of(*results: Result) -> Evaluation:
    return Evaluation(results=results)


@pytest.mark.parametrize("changes", [{"settings": "bfloat16"}, {"of": "2"}, {"unit": "B"}])
def test_only_equal_settings_are_compared(changes: dict[str, Any]) -> None:
    text = result("perplexity", "text", 9.0, "float32", of="1")
    report = Report(source=Source(name="m")).with_evaluation("dense", of(text))
    report = report.with_evaluation("pruned", of(text.model_copy(update=changes)))
    assert [row.cells.index("") for row in view.compared(report, "perplexity").rows] == [1, 0]


def test_the_mean_needs_every_task_once() -> None:
    """Of a task that was measured on fewer items as well it takes the latest."""
    few, piqa = (
        result("tasks", name, value, "10 items", in_mean=True)
        for name, value in (("boolq", 0.2), ("piqa", 0.8))
    )
    more = few.model_copy(update={"value": 0.6, "settings": "20 items"})
    both = of(few, piqa).with_newer(of(more))
    assert view.task_means({0: both}) == {0: pytest.approx(0.7)}
    assert view.task_means({0: of(few, piqa), 1: of(more, piqa)}) == {1: pytest.approx(0.7)}
    report = Report(source=Source(name="m")).with_evaluation("dense", of(few, piqa))
    report = report.with_evaluation("pruned", of(few))
    assert [row.label for row in view.compared(report, "tasks").rows] == [
        *("boolq, % (10 items)", "piqa, % (10 items)"),
    ]


def shown(*each: tuple[Result, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Return names and cells of a comparison of models, each with these results."""
    entries = [
        Entry(str(at), Report(source=Source(name="m"), evaluations={"pruned": of(*one)}), "pruned")
        for at, one in enumerate(each)
    ]
    return [(column.name, column.cells) for column in compare(entries).columns]


def test_compare_tells_the_same_task_on_other_items_apart() -> None:
    mmlu = result("tasks", "mmlu, acc", 0.5, "9 items")
    other = mmlu.model_copy(update={"settings": "8 items"})
    assert shown((mmlu,), (mmlu,)) == [("mmlu, acc, %", ("50.0", "50.0"))]
    assert shown((mmlu,), (other,)) == [
        ("mmlu, acc, % (9 items)", ("50.0", "")),
        ("mmlu, acc, % (8 items)", ("", "50.0")),
    ]


def test_compare_shows_bits_per_byte_where_tokens_differ() -> None:
    def text(ids: str, value: float, digest: str = "a") -> tuple[Result, Result]:
        bits = {"unit": "bits per byte", "of": digest}
        return result("perplexity", "t", value, of=ids), result("bits", "t", value / 2, **bits)

    assert shown(text("1", 9.0), text("1", 8.0)) == [("t", ("9.00", "8.00"))]
    name = "t, bits per byte"
    assert shown(text("1", 9.0), text("2", 8.0)) == [(name, ("4.5000", "4.0000"))]
    # Another text is another column.
    assert [cells for _, cells in shown(text("1", 9.0), text("2", 8.0, "b"))] == [
        *(("9.00", ""), ("", "8.00")),
    ]


def test_newer_results_replace_older_ones() -> None:
    old, new = full_report(), result("perplexity", "own", 7.0, "windows of 64")
    newer = Evaluation(results=(new,), samples={"Hi": "there"})
    found = old.with_evaluation("pruned", newer)
    assert [one.value for one in found.evaluations["pruned"].of("perplexity")] == [80.0, 7.0]
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
    values = [one.value for one in found.evaluations["recovered"].of("perplexity")]
    assert values == [*(one.value for one in earlier.evaluations["recovered"].of("perplexity")), 7]
    # One with a gain takes its place.
    found = recovery_report(replace(done, gained=True), earlier, **known)
    assert found.recovery is not None
    assert found.recovery.summary == "training of all weights on , 3 steps"
    assert [one.value for one in found.evaluations["recovered"].of("perplexity")] == [7.0]


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


@pytest.mark.slow
def test_drawings_of_odd_numbers() -> None:
    """Nothing known, all alike, zeros, negative: each gives a drawing and no warning."""
    for bins in ((None, None), (5.0, 5.0), (0.0, 1e-3), (-1.0, 2.0)):
        row = ImportanceRow(layer=0, units=2, removed=1, bins=bins)
        assert "<img" in figures.heat([ImportanceMap(kind="ffn", rows=(row,))], ["FFN"])
    assert "<img" in figures.loss([LossPoint(step=1, validation=math.nan)])
    empty = Layer(layer=0, sizes={"ffn": (0, 0)})
    assert "<img" in figures.widths([empty], [("ffn", "FFN")])


# Nothing breaks out.


@pytest.mark.slow
def test_hostile_text_stays_text_on_the_page(page: str, hostile: str) -> None:
    harmless, found = _Elements(page), _Elements(hostile)
    # The command has more words.
    with_markup, without = (
        [element for element in elements.found if element[0].strip("/") != "span"]
        for elements in (found, harmless)
    )
    assert with_markup == without
    for part in ("<script>alert(1)</script>", "$\\frac{1}{2}$", "{{ 7 * 7 }}"):
        assert part in found.text
    for steering in ("\x1b", "\x07", "\x9b", "\u202e", "\x00"):
        assert steering not in hostile


def test_hostile_text_stays_text_in_the_card() -> None:
    written = render_card(full_report(HOSTILE))
    assert not any(c in written for c in "\x1b\x07\x9b\u202e\x00")
    _, front, body = written.split("---\n", 2)
    data = yaml.safe_load(front)
    # Neither the id nor the licence is one that the hub knows.
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
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
    assert [number(x) for x in (3, 3.14159, 31.4159, 314.159, 3141.59, 0.0314, 1e-9)] == [
        *("3", "3.14", "31.42", "314.2", "3,142", "0.0314", "1.00e-09")
    ]
    assert number(math.inf) == "inf"
    assert measured(31.4159, 0.5) == "31.42 ± 0.50"
    assert measured(31.4159, None) == "31.42"


# The data.


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    unbounded = of(result("perplexity", "text", math.inf))
    report = full_report(HOSTILE).with_evaluation("pruned", unbounded)
    file = tmp_path / "report.json"
    file.write_text(report.to_json())
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_report(file) == report
    small = Report(source=Source(name="m")).with_evaluation("dense", unbounded)
    assert "<td>inf</td>" in render_html(small)
    # The version before held measurements otherwise; all else is read.
    data = json.loads(file.read_text()) | {"format_version": 1, "evaluations": {"dense": {"a": 1}}}
    file.write_text(json.dumps(data))
    assert read_report(file) == report.model_copy(update={"evaluations": {}})


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 3}', "{}"])
def test_files_that_are_no_report(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"report.json is no report that can be read \("):
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
