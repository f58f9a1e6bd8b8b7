"""Text quality: each flaw by its smallest caption, and captions that are fine."""

import pytest

from stages.text_quality import flaw_of, words_of


@pytest.mark.parametrize(
    ("caption", "flaw"),
    [
        (None, "missing"),
        ("   ", "missing"),
        ("IMG_2031.jpg", "file name"),
        ("dsc00123", "file name"),
        ("https://example.com/a/b", "url"),
        ("www.example.com", "url"),
        ("<b>sale</b> today", "html"),
        ("Tom &amp; Jerry on a boat", "html"),
        ("12345 !!!", "no letters"),
        ("stock photo", "boilerplate"),
        ("Image may contain: one person", "boilerplate"),
        ("click to enlarge the picture", "boilerplate"),
        ("photo credit: a press agency", "boilerplate"),
        ("https://example.org/pictures/0001.jpg", "url"),
        ("cats cats cats cats cats cats today", "repetition"),
    ],
)
def test_each_flaw_by_name(caption, flaw):
    assert flaw_of(caption) == flaw


@pytest.mark.parametrize(
    "caption",
    [
        "A girl in a striped shirt holds a bun to her mouth .",
        "a photo of an airplane",
        "photos by the sea at dusk",
        "a red circle",
        "赤い丸の絵",
        "Ein großes Haus am See",
        "two dogs, see https://example.com for more of the same dogs",
        "dog",
    ],
)
def test_captions_that_say_something_have_no_flaw(caption):
    assert flaw_of(caption) is None


def test_words_of_scripts_with_and_without_spaces():
    assert words_of("don't panic, it's 3 o'clock") == ["don't", "panic", "it's", "3", "o'clock"]
    assert len(words_of("赤い丸")) == 3
