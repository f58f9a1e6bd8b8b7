"""The comparison page: what it says, that hostile words stay words, and how it looks in a real browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.report.evaluations import evaluation_page
from tests.pipelines.report.browser import Browser, browse

EVIL = "<img src=http://evil.example/x.png onerror=console.error('pwned')>"


def _estimate(value: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "samples": 90, "method": "bootstrap", "level": 0.95, "note": "",
            **more}  # fmt: skip


def _metric(
    name: str, unit: str, better: str, values: dict[str, Any], gap: tuple[float, float, float], judge: Any = None
) -> dict[str, Any]:
    difference = {"first": "teacher", "second": EVIL, **_estimate(*gap)}
    return {"name": name, "title": name.title(), "better": better, "unit": unit, "protocol": f"as {EVIL} has it",
            "judge": judge, "values": values, "differences": [difference]}  # fmt: skip


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """A folder as sluice evaluate leaves it, with names, prompts and reasons that try to break out."""
    (tmp_path / "drawings").mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "PNG")
    pq.write_table(pa.table({"png": [stream.getvalue(), b"junk"]}), tmp_path / "drawings/ab12.parquet")
    judge = {
        "name": "CLIP x",
        "digest": "d",
        "independent": {"teacher": True, EVIL: False},
        "why": "filtered snapshot 12",
    }
    both = {"teacher": _estimate(0.7, 0.6, 0.8), EVIL: _estimate(0.5, 0.4, 0.6)}
    drawn = {"teacher": {"unit": "ab12", "row": 0, "right": True, "reasons": ""},
             EVIL: {"unit": "../../etc/passwd", "row": 1, "right": False, "reasons": EVIL}}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps({
        "schema_version": "1.3", "kind": "evaluation", "id": "e" * 32,
        "protocol": {"suites": [{"name": EVIL, "prompts": 90}], "repeats": 1}, "data": {"snapshot": "s" * 32},
        "models": [{"name": "teacher"}, {"name": EVIL}],
        "verdict": ["Take teacher.", f"{EVIL} is worse."],
        "metrics": [
            _metric("right", "share", "higher", both, (0.2, 0.05, 0.35), judge),
            _metric("distance", "", "lower", both, (-0.2, -0.3, -0.1)),
            _metric("close", "", "higher", dict.fromkeys(both, _estimate(1, None, None, note="-")), (0, -0.1, 0.1)),
        ],
        "categories": {EVIL: {"teacher": {**both["teacher"], "failures": [[EVIL, 3]]}}},
        "elo": [{"source": "people", "judge": None, "note": EVIL, "standings": [
            {"model": EVIL, "elo": 1040.4, "low": 990.0, "high": 1090.0, "won": 9, "drawn": 1, "lost": 5}]}],
        "speed": [{"painter": EVIL, "device": "cpu", "weights_bytes": 7e6, "peak_bytes": 1.2e9, "peak_of": "process",
                   "by_steps": [{"steps": 1, "seconds": 0.02}, {"steps": 4, "seconds": 0.08}],
                   "own": {"steps": 4, "seconds": 0.08}}],
        "memorisation": {"training_pictures": 3000, "threshold_cosine": 0.99, "false_alarms": _estimate(0, 0, 0.02),
                         "by_model": {EVIL: {**_estimate(0.1, 0.05, 0.2), "by_copies": {"64": _estimate(1, 0.8, 1)}}}},
        "contamination": {EVIL: {"problem": "", "prompts": 3, "of_prompts": 90, "pictures": 0, "of_pictures": 40},
                          "teacher": {"problem": EVIL}},
        "safety": {"caught": _estimate(0.9, 0.8, 1), "false_alarms": _estimate(0.02, 0, 0.1),
                   "bypass": {"accents": _estimate(0.37, 0.3, 0.5)}},
        "bias": [{"prompt": EVIL, "open": "colour", "by_model": {EVIL: {
            "shares": {"red": _estimate(1, 0.9, 1)}, "from_even": 0.5, "without": 2}}}],
        "failures": {EVIL: {"clip": 2}}, "not_measured": [{"what": EVIL, "why": EVIL}],
        "samples": [{"prompt": EVIL, "category": "two", "seed": 5, "drawn": drawn}] * 6,
    }))  # fmt: skip
    return tmp_path


def test_the_page_says_what_the_result_says(evaluation: Path) -> None:
    html = evaluation_page(str(evaluation))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "Take teacher." in text
    assert "70.0 % (60.0 % to 80.0 %)" in text
    assert "teacher is better than &lt;img" in text
    assert "by 20.0 points (5.0 points to 35.0 points)" in text
    assert "by 0.2 (0.1 to 0.3)" in text  # lower is better: the one below leads
    assert "cannot be told apart (at most 0.1 between them)" in text
    assert "Not independent of" in text
    assert "filtered snapshot 12" in text
    assert "hold 3 of 90 prompts" in text
    assert "1040 (990 to 1090)" in text
    assert "9 won, 1 drawn, 5 lost" in text
    assert "64 times" in text
    assert "past it with accents 37.0 %" in text
    assert html.count("data:image/png;base64") == 6


def test_hostile_words_stay_words(evaluation: Path) -> None:
    html = evaluation_page(str(evaluation))
    assert EVIL not in html
    assert "passwd" not in html
    assert "<script" not in html
    assert html.count("picture not found") == 6


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "evaluation.json is not there"), ('{"schema_version": "2.0", "kind": "evaluation"}', "schema version 2.0"),
     ('{"teacher": {}}', "schema version")],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        evaluation_page(str(tmp_path))


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with browse(str(chromium)) as found:
        yield found


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_it_opens_quietly_at_every_width(browser: Browser, evaluation: Path, width: int) -> None:
    page = evaluation / "page.html"
    page.write_text(evaluation_page(str(evaluation)), encoding="utf-8")
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.images.length") == 6
    assert browser.broken_pictures() == 0
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
