"""Answers as models give them, and the caption, status and reason that each comes to."""

from __future__ import annotations

import pytest

from stages.caption_cleaning import clean

CAPTION = "A red circle lies above a blue square."


@pytest.mark.parametrize(
    ("said", "change"),
    [
        (CAPTION, None),
        (f"Sure! Here is a caption for the image:\n\n{CAPTION}", "preamble"),
        (f"Here's a detailed description of the image: {CAPTION}", "preamble"),
        (f"Certainly! {CAPTION}", "preamble"),
        (f"Caption: {CAPTION}", "preamble"),
        (f"Image description: {CAPTION}", "preamble"),
        (f"**{CAPTION}**", "markdown"),
        (f"```text\n{CAPTION}\n```", "fence"),
        (f'"{CAPTION}"', "quotes"),
        (f"“{CAPTION}”", "quotes"),
        (f"The image shows {CAPTION[0].lower()}{CAPTION[1:]}", "lead"),
        (f"<think>It is red.\nIs it round?</think>{CAPTION}", "thinking"),
        (f"{CAPTION}<|im_end|></s>", "special tokens"),
        (f"{CAPTION} Let me know if you would like another one!", "closing"),
    ],
)
def test_wrapping_is_taken_off(said: str, change: str | None) -> None:
    cleaned = clean(said)
    assert (cleaned.status, cleaned.text) == ("success", CAPTION)
    assert cleaned.changes == ((change,) if change else ())


@pytest.mark.parametrize(
    "said",
    [
        "Here is where the river bends, seen from a bridge.",
        "Sorry sight: an abandoned car in a field of wheat.",
        "A sign that reads 'I cannot help you' hangs on a door.",
        "A very, very, very tall tower.",
        'A shop sign that says "Open" in red letters.',
        "The image of a saint, painted on wood, hangs above an altar.",
        "A cat. A dog. A cat.",
    ],
)
def test_captions_that_look_like_flaws_stay(said: str) -> None:
    assert clean(said).text == said
    assert clean(said).status == "success"


@pytest.mark.parametrize(
    "said",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot describe this image.",
        "As an AI language model, I have no eyes.",
        "I’m unable to view images.",
        "Unfortunately, I am not able to identify people.",
        "Please provide an image so that I can describe it.",
        "No image was provided.",
        "Sure! I can't see the picture.",
    ],
)
def test_refusals_are_told(said: str) -> None:
    assert (clean(said).status, clean(said).reason) == ("refused", "refusal")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"{CAPTION} " * 5, CAPTION),
        ("A street with shops and trees and cars, and trees and cars, and trees and cars, and trees and cars", None),
        ("Stripes: red red red red red red red red", "Stripes: red"),
    ],
)
def test_loops_are_cut(said: str, left: str | None) -> None:
    cleaned = clean(said)
    assert (cleaned.status, cleaned.reason) == ("truncated", "loop")
    assert len(cleaned.text) < len(said)
    assert left is None or cleaned.text == left


def test_truncated_answers_end_with_a_sentence() -> None:
    cleaned = clean(f"{CAPTION} Behind them there is a", "truncated", "cut at 12 tokens")
    assert (cleaned.status, cleaned.text, cleaned.reason) == ("truncated", CAPTION, "cut at 12 tokens")
    assert clean("A red circle lies above", "truncated").text == "A red circle lies above"


@pytest.mark.parametrize("said", ["", "  \n", "...", "<think>never ending", "</s>"])
def test_nothing_said_is_an_error(said: str) -> None:
    assert (clean(said).status, clean(said).reason) == ("error", "empty answer")


def test_wrong_languages_are_told() -> None:
    from stages.recaption import language_detector

    detect = language_detector()
    assert clean(CAPTION, language="en", detect=detect).status == "success"
    french = clean("Un cercle rouge se trouve au-dessus d'un carré bleu.", language="en", detect=detect)
    assert (french.status, french.reason) == ("error", "language fr, not en")
    assert clean("Un cercle rouge se trouve au-dessus d'un carré bleu.").status == "success"
    assert clean("Château Margaux", language="en", detect=detect).status == "success"


def test_a_long_answer_takes_no_long_time() -> None:
    import time

    began = time.process_time()
    for said in ("a" * 100_000, "very " * 20_000, "x y. " * 20_000, "<think>" * 10_000, "``` " * 20_000, '"' * 50_000):
        clean(said)
    assert time.process_time() - began < 2
