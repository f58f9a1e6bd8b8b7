"""GenEval's decisions on planted detections, and the made-up world's checker against the truth of its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.evaluation.composition import ASPECTS, Detection, PixelReader, can_judge, judge, stands_as
from training.evaluation.made_up import CATEGORIES, contradict, draw_truthfully, made_up_suite
from training.evaluation.suites import Asked, Prompt


def _at(thing: str, x: float, y: float, colour: str = "", size: float = 0.2) -> Detection:
    return Detection(thing, colour, x, y, size, size)


def _prompt(*asked: Asked, forbidden: tuple[Asked, ...] = ()) -> Prompt:
    return Prompt("", "test", "", asked, forbidden)


def test_objects_counts_and_colours() -> None:
    two_red = _prompt(Asked("cup", 2, "red"), forbidden=(Asked("cup", 3),))
    red, blue = _at("cup", 0.2, 0.5, "red"), _at("cup", 0.8, 0.5, "blue")
    assert judge(two_red, [red, red]).right
    wrong_colour = judge(two_red, [red, blue])
    assert (wrong_colour.object, wrong_colour.count, wrong_colour.colour) == (True, False, False)
    assert wrong_colour.reasons == ("1 of 2 red cups",)
    too_many = judge(two_red, [red, red, red])
    assert (too_many.colour, too_many.count) == (True, False)
    assert "at most 2 asked" in too_many.reasons[0]
    nothing = judge(two_red, [_at("dog", 0.5, 0.5)])
    assert (nothing.object, nothing.right) == (False, False)
    assert judge(_prompt(Asked("cup")), [red]).count is None  # it does not ask how many


@pytest.mark.parametrize(("relation", "x", "y"), [("left of", 0.1, 0.5), ("above", 0.5, 0.1), ("below", 0.5, 0.9)])
def test_positions(relation: str, x: float, y: float) -> None:
    asked = _prompt(Asked("dog", 1, "", relation, 1), Asked("cat"))
    cat = _at("cat", 0.5, 0.5)
    assert judge(asked, [_at("dog", x, y), cat]).position is True
    assert judge(asked, [_at("dog", 1 - x, 1 - y), cat]).position is False
    assert judge(asked, [_at("dog", 0.52, 0.48), cat]).position is False  # within the dead zone
    assert judge(asked, [_at("dog", x, y)]).position is False


def test_a_diagonal_is_both_and_a_slight_slope_is_one() -> None:
    one, other = _at("a", 0.1, 0.1, size=0.0), _at("b", 0.9, 0.9, size=0.0)
    assert stands_as("left of", one, other)
    assert stands_as("above", one, other)
    assert not stands_as("above", _at("a", 0.1, 0.45), _at("b", 0.9, 0.55))


def test_a_detector_judges_only_what_it_knows() -> None:
    reader = PixelReader()
    assert can_judge(reader, _prompt(Asked("circle")))
    assert not can_judge(reader, _prompt(Asked("bench")))
    assert not can_judge(reader, Prompt("a bench", "user"))


def test_the_made_up_suite_has_its_categories_and_counts_to_six() -> None:
    suite = made_up_suite(per_category=6)
    assert {prompt.category for prompt in suite.prompts} == set(CATEGORIES)
    assert max(one.count for prompt in suite.prompts for one in prompt.asked) == 6
    assert made_up_suite(per_category=6) == suite
    assert len({prompt.text for prompt in suite.prompts}) == len(suite.prompts)
    limited = suite.first(13)
    assert len(limited.prompts) == 13
    assert len({prompt.category for prompt in limited.prompts}) >= 11


def _agreement(scenes: int, size: int) -> tuple[int, int]:
    """(agreements, judgements): each true picture against its own prompt and against one that it contradicts."""
    suite, reader = made_up_suite(per_category=40), PixelReader()
    rng = np.random.default_rng(size)
    agreed = told = 0
    for number in range(scenes):
        prompt = suite.prompts[number % len(suite.prompts)]
        picture, truth = draw_truthfully(prompt, size, rng)
        assert judge(prompt, truth).right
        found = reader.detect(picture)
        for asked in (prompt, contradict(prompt, rng)):
            by_truth, by_pixels = judge(asked, truth), judge(asked, found)
            agreed += all(getattr(by_truth, aspect) == getattr(by_pixels, aspect) for aspect in ASPECTS)
            told += 1
    return agreed, told


def test_the_checker_agrees_with_the_truth() -> None:
    agreed, told = _agreement(150, 32)
    assert agreed >= 0.995 * told


@pytest.mark.full
@pytest.mark.parametrize("size", [32, 48, 128])
def test_the_checker_agrees_with_the_truth_of_two_thousand_scenes(size: int) -> None:
    agreed, told = _agreement(2000, size)
    assert told == 4000
    assert agreed >= 0.995 * told


def test_contradictions_are_seen() -> None:
    suite, rng = made_up_suite(per_category=8), np.random.default_rng(0)
    wrong = 0
    for prompt in suite.prompts:
        _, truth = draw_truthfully(prompt, 64, rng)
        wrong += not judge(contradict(prompt, rng), truth).right
    assert wrong > 0.9 * len(suite.prompts)


def test_an_object_detector_of_transformers(tmp_path: Path) -> None:
    """A small detector with random weights: boxes come out in shares of the picture, classes by the model's names."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=5, id2label={0: "bench", 1: "dog"}, label2id={"bench": 0, "dog": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    from training.evaluation.composition import ObjectDetector

    detector = ObjectDetector(tmp_path, threshold=0.0)
    assert detector.things == {"bench", "dog"}
    found = detector.detect(Image.new("RGB", (90, 60), "red"))
    assert found
    assert {one.thing for one in found} <= {"bench", "dog"}
    assert all(0 <= one.x <= 1.5 and one.width <= 1.5 for one in found)
    assert {one.colour for one in found if one.width > 0.1} <= {"red"}
