"""Text quality: each flaw by its smallest caption, captions that are fine, and what hostile text may cost."""

import time

import pytest

from stages.contract import Batch, Context
from stages.text_quality import FLAWS, TextQuality, flaw_of, words_of

FLAWED = [
    (None, "missing"),
    ("   ", "missing"),
    ("a dog\x07 on a lawn", "control characters"),
    ("a dog \u202eon a lawn", "control characters"),
    ("half a letter \ud800 here", "control characters"),
    ("un cafÃ© trÃ¨s agrÃ©able", "broken encoding"),
    ("%name villa by the sea", "template"),
    ("{{product.title}} in blue", "template"),
    ("undefined", "template"),
    ("https://example.com/a/b", "url"),
    ("www.example.com", "url"),
    ("https://example.org/pictures/0001.jpg", "url"),
    ("IMG_2031.jpg", "file name"),
    ("dsc00123", "file name"),
    ("a plate of pasta 2_small.jpg", "file name"),
    ("red-house-by-the-sea", "file name"),
    ("2017_Maker_Model_ in town", "file name"),
    ("<b>sale</b> today", "html"),
    ("Tom &amp; Jerry on a boat", "html"),
    ("12345 !!!", "no letters"),
    ("9 780340 829752 ab", "mostly digits or symbols"),
    ("a9f3b27c81d04e55", "machine text"),
    ("stock photo", "boilerplate"),
    ("Rooster Royalty Free Stock Photos", "boilerplate"),
    ("Image may contain: one person", "boilerplate"),
    ("click to enlarge the picture", "boilerplate"),
    ("photo credit: a press agency", "boilerplate"),
    ("Image is loading blue bag", "boilerplate"),
    ("warm wool coat, free shipping", "advert"),
    ("Buy a steel sink online at example.com", "advert"),
    ("all lamps 20 % off", "advert"),
    ("the best porn movie", "explicit"),
    ("horse, horses, fantasy, art, magic, wild, free, horn", "keywords"),
    ("a portrait #woman #pop #art", "keywords"),
    ("cats cats cats cats cats cats today", "repetition"),
    ("large kitchen island with seating and storage beautiful large kitchen islands with seating", "repetition"),
    ("aaaaaaah", "repetition"),
    ("STEEL CHAIN AND SPROCKET KIT", "all caps"),
]


@pytest.mark.parametrize(("caption", "flaw"), FLAWED)
def test_each_flaw_by_name(caption, flaw):
    assert flaw_of(caption) == flaw


def test_every_flaw_has_a_case():
    assert {flaw for _, flaw in FLAWED} == set(FLAWS)


@pytest.mark.parametrize(
    "caption",
    [
        "A girl in a striped shirt holds a bun to her mouth .",
        "a photo of an airplane",
        "photos by the sea at dusk",
        "a red circle",
        "赤い丸の絵",
        "Ein großes Haus am See",
        "crêpe dress with a naïve print",
        "two dogs, see https://example.com for more of the same dogs",
        "ancient temple at dawn Royalty Free Stock Image",
        "dog",
        "state-of-the-art kitchen with T-shirts on a chair",
        "USB-C cable, 2 m",
        "Ford Escort 1600 in front of a barn",
        "the man and the dog and the cat and the bird sit on the wall in the sun of the late day",
        "BMW M6",
        "Scunthorpe town centre",
    ],
)
def test_captions_that_say_something_have_no_flaw(caption):
    assert flaw_of(caption) is None


def test_words_of_scripts_with_and_without_spaces():
    assert words_of("don't panic, it's 3 o'clock") == ["don't", "panic", "it's", "3", "o'clock"]
    assert len(words_of("赤い丸")) == 3


def test_a_flaw_that_is_allowed_is_passed_over():
    measure = TextQuality(allow=("all caps",)).open(Context())
    answer = measure(Batch({"caption": ["STEEL CHAIN AND SPROCKET KIT", "IMG_2031.jpg"]}))
    assert answer.values == {"characters": [28, 12], "words": [5, 3], "flaw": [None, "file name"]}
    with pytest.raises(ValueError, match="allow names 'caps'; flaws are missing"):
        TextQuality(allow=("caps",))


@pytest.mark.parametrize("piece", ["a1", "buy ", "<a ", "1a", "a-", "&amp", "{{", "w w ", "a, ", "\u202e", "é "])
def test_a_caption_of_a_megabyte_costs_little(piece):
    """Patterns whose time grows with the square of the length would take minutes."""
    began = time.process_time()
    flaw_of(piece * (1_000_000 // len(piece)))
    assert time.process_time() - began < 2
