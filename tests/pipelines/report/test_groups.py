"""Shares kept by group, counted by hand: on a ledger of captions in three languages from two folders."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.lineage.ledger import open_ledger
from pipelines.recipe import load_recipe
from pipelines.report.groups import groupings
from pipelines.report.pages import snapshot_page
from pipelines.runner import Options, curate
from tests.pipelines.report.reading import assert_inert

ENGLISH = "a brown dog runs across the meadow behind the house number {}"
GERMAN = "ein brauner Hund läuft über die Wiese hinter dem Haus Nummer {}"
FRENCH = "un chien brun court dans le pré derrière la maison numéro {}"
RECIPE = {
    "stages": {"text": {"type": "text_quality"}, "language": {}},
    "rules": {
        "flaw": {"column": "text.flaw", "is_null": True},
        "tongue": {"column": "language.code", "one_of": ["en", "fr"]},
    },
    "held_out": {"fraction": 0},
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    """web/: 20 English captions, 12 German; books/: 8 French, 10 file names (of no language)."""
    folder = tmp_path_factory.mktemp("groups")
    files = {
        "web": [ENGLISH.format(n) for n in range(20)] + [GERMAN.format(n) for n in range(12)],
        "books": [FRENCH.format(n) for n in range(8)] + [f"IMG_{n:04d}" for n in range(10)],
    }
    for name, captions in files.items():
        (folder / "raw" / name).mkdir(parents=True)
        pq.write_table(pa.table({"caption": captions}), folder / "raw" / name / "0.parquet")
    recipe = load_recipe({**RECIPE, "input": {"url": str(folder / "raw")}})
    return curate(recipe, Options(output=str(folder / "out"), engine="local", quiet=True)).folder.url


def test_shares_are_the_ones_counted_by_hand(snapshot: str) -> None:
    with open_ledger(snapshot) as ledger:
        language, source = groupings(ledger)
    assert (language.kind, source.kind) == ("language", "source")
    seen = {group.name: (list(group.entering), list(group.leaving)) for group in language.groups}
    assert seen["en"] == ([20, 20], [20, 20])
    assert seen["de"] == ([12, 12], [12, 0])
    assert seen["fr"] == ([8, 8], [8, 8])
    assert (list(language.whole.entering), list(language.whole.leaving)) == ([50, 40], [40, 28])
    by_folder = {group.name.rpartition("/")[2]: list(group.leaving) for group in source.groups}
    assert by_folder == {"web": [32, 20], "books": [8, 8]}


def test_groups_that_vanish_are_named(snapshot: str) -> None:
    with open_ledger(snapshot) as ledger:
        language, source = groupings(ledger)
    assert "tongue drops all 12 rows of language de." in language.warnings
    assert not source.warnings
    page = assert_inert(snapshot_page(snapshot))
    assert "tongue drops all 12 rows of language de." in page.text
    (line,) = page.all("tr", data_group="de")
    assert [cell.text for cell in line.all("td")] == ["de", "12", "100.0 %", "▼ 0.0 %", "0.0 %"]


def test_effective_groups_are_the_exponential_of_entropy(snapshot: str) -> None:
    import numpy as np

    with open_ledger(snapshot) as ledger:
        source = groupings(ledger)[1]
    for sizes, found in zip(([32, 18], [20, 8]), source.effective, strict=True):
        shares = np.array(sizes) / sum(sizes)
        assert found == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
