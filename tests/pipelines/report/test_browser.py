"""The pages in a real Chromium: no complaint, no request, every picture decodes, and nothing sticks out on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.lineage.tree import Node
from pipelines.report.pages import Table, combined_page, samples_page
from tests.pipelines.handmade import make_run, make_snapshot
from tests.pipelines.report.browser import Browser, browse

pytestmark = pytest.mark.browser

HOSTILE = {number: f"<img src=http://evil.example/{number}.png onerror=console.error('pwned')>" for number in range(40)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        reason = "no chromium here: install the package chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browse(program) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with everything on it, one of samples, and one full of hostile captions."""
    folder = tmp_path_factory.mktemp("pages")
    made = make_snapshot(folder / "made")
    hostile = make_snapshot(folder / "hostile", captions=HOSTILE, keys=HOSTILE)
    teacher = make_run(folder / "teacher", "train", made)
    student = make_run(folder / "student", "distill", made, teacher)
    html = {
        "all": combined_page(
            "Everything",
            snapshot=made.store,
            runs=[teacher, student],
            tables=[Table("Planted flaws", ["flaw", "planted"], [["byte duplicates", 40]])],
            lineage=Node("artifact", "student", "57", [Node("run", "distill run", "x" * 200)]),
        ),
        "samples": samples_page(made.store),
        "hostile": combined_page("Hostile", snapshot=hostile.store),
    }
    for name, text in html.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in html}


@pytest.mark.parametrize("name", ["all", "samples", "hostile"])
def test_a_page_opens_quietly(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert browser.evaluate("document.images.length") > 10
    assert browser.broken_pictures() == 0
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []


def test_nothing_sticks_out_on_a_phone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["all"], width=360, height=800)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360


def test_texts_can_be_read_in_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    """Contrast of body text and of soft text with the ground they stand on (WCAG: 4.5)."""
    script = """(() => {
      const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255).map(
        c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      const of = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
      const ground = light(of('body', 'backgroundColor')), panel = light(of('.panel', 'backgroundColor'));
      return Math.min(ratio(light(of('body', 'color')), ground), ratio(light(of('section > h2 + p', 'color')), ground),
        ratio(light(of('.asks', 'color')), panel), ratio(light(of('.tile.kept b', 'color')), panel),
        ratio(light(of('.tile.failed b', 'color')), panel));
    })()"""
    for dark in (False, True):
        browser.open(pages["all"], dark=dark)
        assert browser.evaluate(script) >= 4.5
