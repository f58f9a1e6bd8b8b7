"""Languages told offline, and null where no one can tell."""

import pytest

from stages.contract import Batch, Context
from stages.language import Language

SENTENCES = {
    "en": "a brown dog runs across the meadow behind the house",
    "de": "ein brauner Hund läuft über die Wiese hinter dem Haus",
    "fr": "un chien brun court dans le pré derrière la maison",
    "es": "un perro marrón corre por el prado detrás de la casa",
    "ru": "коричневая собака бежит по лугу за домом",
    "ja": "茶色の犬が家の裏の草地を走っている",
    "ar": "كلب بني يركض عبر المرج خلف المنزل",
}


def test_sentences_in_seven_languages():
    answer = Language().open(Context())(Batch({"caption": list(SENTENCES.values())}))
    assert answer.values["code"] == list(SENTENCES)
    assert min(answer.values["confidence"]) > 0.5


def test_capitals_and_line_ends_change_nothing():
    text = SENTENCES["en"]
    captions = [text.upper(), text.replace(" ", "\n"), f"  {text} \ud800"]
    assert Language().open(Context())(Batch({"caption": captions})).values["code"] == ["en"] * 3


def test_what_no_one_can_tell_is_null():
    captions = [None, "", "12 34 !", "qx zv"]
    answer = Language(min_confidence=0.9).open(Context())(Batch({"caption": captions}))
    assert answer.values["code"] == [None] * 4
    assert answer.values["confidence"][:3] == [None] * 3


def test_the_model_is_part_of_the_identity():
    (file,) = Language().weights(Context()).values()
    assert file.name == "lid.176.ftz"
    assert file.is_file()


def test_a_confidence_out_of_range_is_refused():
    with pytest.raises(ValueError, match="min_confidence 2"):
        Language(min_confidence=2)
