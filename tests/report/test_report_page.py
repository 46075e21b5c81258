"""The report in a real browser: wide and narrow, light and dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import chromium, opened
from llm_pruner.report.write import render_html
from reports import HOSTILE, full_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name; the hostile one holds markup in all its texts."""
    folder = tmp_path_factory.mktemp("pages")
    report = full_report()
    four = {
        "sizes": report.sizes | {"trimmed": report.sizes["pruned"]},
        "evaluations": report.evaluations | {"trimmed": report.evaluations["recovered"]},
    }
    reports = {"four": report.model_copy(update=four), "hostile": full_report(HOSTILE)}
    for name, one in reports.items():
        (folder / f"{name}.html").write_text(render_html(one), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["four", "hostile"])
def test_pages_fit_and_ask_for_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    shades = []
    for theme in ("light", "dark"):
        with opened(browser, pages[name], width, theme) as found:
            found.page.on("dialog", lambda dialog: pytest.fail(dialog.message))
            picture = found.page.screenshot(full_page=True)
            assert found.console == []
            assert [url for url in found.requests if not url.startswith("data:")] == [
                pages[name].as_uri()
            ]
            # Nothing reaches beyond the window, so that a phone scrolls one way only.
            assert found.page.evaluate("document.documentElement.scrollWidth") == width
            drawn = "all => all.map(image => image.naturalWidth)"
            sizes = found.page.eval_on_selector_all(".plot", drawn)
            assert len(sizes) == 3
            assert min(sizes) > 800
            if name == "hostile":
                made = "script, iframe, object, embed, form, a, foreignObject"
                assert found.page.evaluate(f"document.querySelectorAll('{made}').length") == 0
                assert "<script>alert(1)</script>" in found.page.inner_text("main")
                assert "{{ 7 * 7 }}" in found.page.inner_text("main")
        image = Image.open(io.BytesIO(picture)).convert("L")
        shades.append(image.getpixel((2, 2)))
    assert shades[0] > 200
    assert shades[1] < 60
