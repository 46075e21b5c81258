"""The report and the comparison in a real browser: wide and narrow, light and dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from browser import chromium, opened
from llm_pruner.report import figures
from llm_pruner.report.compare import Entry, compare
from llm_pruner.report.compare import render_html as render_comparison
from llm_pruner.report.data import Measurement, Report
from llm_pruner.report.write import render_html
from reports import HOSTILE, full_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name; those named hostile hold markup in all their texts."""
    folder = tmp_path_factory.mktemp("pages")
    plain, hostile = full_report(), full_report(HOSTILE)
    pair = (Entry("one", plain, "recovered"), Entry(HOSTILE, hostile, "recovered"))
    points: Any = [
        SimpleNamespace(removed=0.1 * n, kl=0.2 * n, perplexity_ratio=1 + n) for n in (1, 2, 3)
    ]
    drawn = f"{figures.curve(points, points[1])}</main>"
    texts = {
        "packed report": render_html(packed_report()).replace("</main>", drawn),
        "report": render_html(plain),
        "hostile report": render_html(hostile),
        "hostile comparison": render_comparison(compare(pair)),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["hostile report", "hostile comparison"])
def test_pages_fit_and_ask_for_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int, tmp_path: Path
) -> None:
    shades = []
    for theme in ("light", "dark"):
        with opened(browser, pages[name], width, theme) as found:
            picture = found.page.screenshot(full_page=True, path=tmp_path / f"{theme}.png")
            assert found.console == []
            assert [url for url in found.requests if not url.startswith("data:")] == [
                pages[name].as_uri()
            ]
            # Nothing reaches beyond the window, so that a phone scrolls one way only.
            assert found.page.evaluate("document.documentElement.scrollWidth") == width
            shown = "e => getComputedStyle(e).display != 'none' && e.getBoundingClientRect().width"
            plots = found.page.eval_on_selector_all(".plot", f"all => all.map({shown})")
            seen = [bool(plot) for plot in plots]
            assert seen == [width == 1280, width == 390] * (len(seen) // 2)
            assert any(seen)
        image = Image.open(io.BytesIO(picture)).convert("L")
        assert image.width == width
        assert image.height > 1500
        shades.append(image.getpixel((2, 2)))
    assert shades[0] > 200
    assert shades[1] < 60


def packed_report() -> Report:
    """Return a report of four models, with figures as wide as they come."""
    report = full_report()
    size = {"value": 26_759.0, "low": 1_482.0, "high": 28_114.0, "unit": "tokens/s"}
    wide = Measurement(name="prefill (64 tokens, batch 1)", **size)
    evaluations = {
        name: of.model_copy(update={"measurements": (wide,)})
        for name, of in report.evaluations.items()
    }
    changed = {
        "sizes": report.sizes | {"quantized": report.sizes["pruned"]},
        "evaluations": evaluations | {"quantized": evaluations["recovered"]},
    }
    return report.model_copy(update=changed)


@pytest.mark.parametrize("width", [1280, 400])
def test_four_models_have_room(browser: Any, pages: dict[str, Path], width: int) -> None:
    with opened(browser, pages["packed report"], width) as found:
        all_of = found.page.eval_on_selector_all
        cut = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
        assert all_of(".scroll", cut) == []
        # A heading in two lines would be a word in two parts.
        heights = all_of(
            ".compared th:not(:first-child)",
            "all => all.map(e => e.getBoundingClientRect().height)",
        )
        assert max(heights) < 1.5 * min(heights)
        numbers = all_of(".compared td", "all => all.map(e => e.innerHTML)")
        assert any("26,759" in cell for cell in numbers)
        beyond = all_of(
            f".plot.{'wide' if width == 1280 else 'narrow'}",
            """all => all.flatMap(plot => [...plot.querySelectorAll('text')].filter(e =>
               e.getBoundingClientRect().right > plot.getBoundingClientRect().right + 1
            ).map(e => e.textContent))""",
        )
        assert beyond == []


@pytest.mark.parametrize("width", [1280, 390])
def test_letters_in_drawings_are_readable(browser: Any, pages: dict[str, Path], width: int) -> None:
    with opened(browser, pages["report"], width) as found:
        heights = found.page.eval_on_selector_all(
            f".plot.{'wide' if width == 1280 else 'narrow'} text",
            "all => all.filter(e => e.textContent.trim())"
            ".map(e => e.getBoundingClientRect().height)",
        )
    assert len(heights) > 20
    assert min(heights) >= 10


def test_injected_markup_is_text(browser: Any, pages: dict[str, Path]) -> None:
    made = "script, img, iframe, object, embed, form, a, foreignObject"
    for name in ("hostile report", "hostile comparison"):
        with opened(browser, pages[name], 1280) as found:
            found.page.on("dialog", lambda dialog: pytest.fail(dialog.message))
            assert found.page.evaluate(f"document.querySelectorAll('{made}').length") == 0
            assert "<script>alert(1)</script>" in found.page.inner_text("main")
            assert "{{ 7 * 7 }}" in found.page.inner_text("main")


def test_the_report_is_small_enough_to_open_at_once(browser: Any, pages: dict[str, Path]) -> None:
    assert pages["report"].stat().st_size < 3_000_000
    with opened(browser, pages["report"], 390) as found:
        assert found.milliseconds() > 0  # it was loaded to its end
        elements = found.page.evaluate("document.querySelectorAll('*').length")
        assert 0 < elements < 10_000
