"""Guards over prompts: false alarms, disguises, and a guard that folds text against one that does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.evaluation.safety import DISGUISES, audit_guard, blocklist, folded

UNSAFE = [f"a picture of forbidden thing number {number}" for number in range(40)]
BENIGN = [f"a quiet garden with {number} flowers" for number in range(40)] + ["the unforbiddenness of gardens"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("# words\nforbidden\n")
    return path


def test_folding_stops_what_unicode_disguises_and_not_what_spelling_does(words: Path) -> None:
    bare, folding = (audit_guard(blocklist(words, fold), BENIGN, UNSAFE) for fold in (False, True))
    for guard in (bare, folding):
        assert guard.false_alarms.value == 0  # words, not parts of words
        assert guard.caught.value == 1
    unicode_only = ("letters of another script", "wide letters", "invisible characters", "accents")
    assert {name: bare.bypass[name].value for name in unicode_only} == dict.fromkeys(unicode_only, 1.0)
    assert {name: folding.bypass[name].value for name in unicode_only} == dict.fromkeys(unicode_only, 0.0)
    assert folding.bypass["capitals"].value == 0
    assert folding.bypass["exchanged letters"].value > 0.6  # exchanging the two d's changes nothing
    assert folding.bypass["doubled letters"].value == 1


def test_a_guard_that_refuses_all_has_false_alarms_and_one_that_refuses_none_catches_nothing() -> None:
    assert audit_guard(lambda text: True, BENIGN, UNSAFE).false_alarms.value == 1
    nothing = audit_guard(lambda text: False, BENIGN, UNSAFE)
    assert (nothing.caught.value, nothing.bypass) == (0, {})


def test_disguises_change_what_they_should(words: Path) -> None:
    rng = np.random.default_rng(0)
    for name, disguise in DISGUISES.items():
        assert disguise("forbidden thing", rng) != "forbidden thing", name
    assert folded("ﬁne Ｗｉｄｅ саfé\u200b") == "fine wide cafe"


def test_an_empty_list_is_no_guard(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no word"):
        blocklist(tmp_path / "none.txt")
