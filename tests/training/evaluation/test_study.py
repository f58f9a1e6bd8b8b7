"""A study from page to Elo: sides at random, planted answers, three raters, marks; and a rater who does not look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Folder
from tests.pipelines.report.browser import Browser, browse
from training.evaluation import work
from training.evaluation.study import StudyError, judged, read_answers, write_study

MODELS = ["alpha", "omega"]
PROMPTS = 40


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of two models over 40 prompts; each drawing is of one grey."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder = tmp_path_factory.mktemp("evaluation")
    store, samples = Folder(folder), []
    for model in MODELS:
        pngs = []
        for n in range(PROMPTS):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (n, n, MODELS.index(model))).save(stream, "PNG")
            pngs.append(stream.getvalue())
        store.write_with(work.drawings_path(model), lambda stream, p=pngs: pq.write_table(pa.table({"png": p}), stream))
    for n in range(PROMPTS):
        drawn = {model: {"unit": model, "row": n} for model in MODELS}
        samples.append({"prompt": f"prompt <b>{n}</b>", "category": "", "seed": n, "drawn": drawn})
    store.write_json("evaluation.json", {"id": "e", "models": [{"name": name} for name in MODELS], "samples": samples})
    return folder


@pytest.fixture(scope="module")
def study(evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert [page.name for page in write_study(str(evaluation), folder)] == [f"rater-{n}.html" for n in (1, 2, 3)]
    return folder


def _key(study: Path) -> dict[str, Any]:
    return json.loads((study / "key.json").read_text())["key"]


def test_sides_and_order_are_random_and_answers_planted(study: Path) -> None:
    key = _key(study)
    by_rater = {rater: [one for number, one in key.items() if number.startswith(f"{rater}-")] for rater in "123"}
    assert len({len(mine) for mine in by_rater.values()}) == 1
    for mine in by_rater.values():
        about = [one for one in mine if one["known"] is None]
        assert len(about) == PROMPTS
        assert 0.2 < np.mean([one["left"] == "alpha" for one in about]) < 0.8
        planted = [one for one in mine if one["known"] is not None]
        assert len(planted) == pytest.approx(PROMPTS / 7, abs=1)
        assert all("noise" in (one["left"], one["right"]) and one["known"] in MODELS for one in planted)
    orders = [[one["group"] for one in mine] for mine in by_rater.values()]
    assert orders[0] != orders[1] != orders[2]


def test_a_page_does_not_say_who_drew_what(study: Path) -> None:
    page = (study / "rater-1.html").read_text()
    assert not any(name in page for name in (*MODELS, "noise", "known"))
    assert "prompt &lt;b&gt;3&lt;/b&gt;" in page


def _answers(study: Path, rater: int, seed: int, looks: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines = []
    for number, one in _key(study).items():
        if not number.startswith(f"{rater}-"):
            continue
        better = one["known"] or ("alpha" if rng.random() < 0.85 else "omega")
        side = ("left" if one["left"] == better else "right") if looks else "left"
        marks = {at: {"quality": 4 if one[at] == "alpha" else 2} for at in ("left", "right")}
        lines.append({"judge": f"rater-{rater}", "number": number, "winner": side, "marks": marks})
    return lines


def test_answers_become_elo_and_a_rater_who_does_not_look_is_left_out(study: Path) -> None:
    lines = [*_answers(study, 1, 0), *_answers(study, 2, 1), *_answers(study, 3, 2, looks=False)]
    path = study / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    table, notes = judged(path, MODELS, 0)
    assert [one.model for one in table] == MODELS
    assert table[0].low > table[1].high
    assert table[0].won + table[0].lost == 2 * PROMPTS
    assert "rater-3 left out: favours the left" in notes
    assert "quality, 1 to 5: alpha 4.00" in notes
    assert re.search(r"Krippendorff's alpha -?0\.\d\d", notes)


def test_judgements_of_other_tools_name_models(tmp_path: Path) -> None:
    rows = [{"judge": "vlm", "left": "alpha", "right": "omega", "group": n, "winner": "alpha" if n % 3 else None}
            for n in range(30)]  # fmt: skip
    (tmp_path / "vlm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, marks = read_answers(tmp_path / "vlm.jsonl")
    assert (len(pairs), marks) == (30, [])
    assert sum(pair.winner is None for pair in pairs) == 10


@pytest.mark.parametrize(
    "line",
    ['{"judge": "a", "left": "x", "right": "y", "group": 1, "winner": "z"}', '{"judge": "a"}', "[]", "{",
     '{"judge": "a", "left": "x", "right": "y", "group": 1, "winner": "x", "marks": {"left": {"quality": 9}}}'],
)  # fmt: skip
def test_wrong_answers_are_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(StudyError, match="line 1"):
        read_answers(tmp_path / "bad.jsonl")


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with browse(str(chromium)) as found:
        yield found


@pytest.mark.browser
def test_the_page_hands_answers_over(browser: Browser, study: Path) -> None:
    browser.open(study / "rater-2.html", width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.broken_pictures() == 0
    browser.evaluate(
        "for (const one of document.querySelectorAll('fieldset')) {"
        "  one.querySelector(`input[name='${one.dataset.number}'][value=left]`).checked = true;"
        "  one.querySelector(`input[name='${one.dataset.number}-left-quality'][value='5']`).checked = true; }"
        "document.getElementById('form').requestSubmit();"
    )
    lines = [json.loads(line) for line in browser.evaluate("window.answers")]
    assert {line["number"] for line in lines} == {number for number in _key(study) if number.startswith("2-")}
    assert lines[0]["winner"] == "left"
    assert lines[0]["marks"] == {"left": {"quality": 5}, "right": {}}
    assert lines[0]["judge"] == "rater-2"
    assert browser.complaints() == []
