"""The pixel reader is right about what was drawn, and says no to what was not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from pipelines.demo.checker import UNKNOWN, find_objects, judge
from pipelines.demo.world import COLOURS, SHAPES, Scene, Thing, background, draw, sample_scene


def drawings(count: int, size: int, seed: int) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return [(scene, np.asarray(draw(scene, size, rng))) for scene in scenes]


@pytest.mark.parametrize("size", [32, 96])
def test_it_reads_at_least_99_percent_of_fresh_drawings_right(size: int) -> None:
    verdicts = [judge(pixels, scene) for scene, pixels in drawings(400, size, seed=size)]
    assert np.mean([verdict.colour_ok for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.shape_ok for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.relation_ok is not False for verdict in verdicts]) >= 0.99


def test_it_reads_blurred_and_noisy_drawings() -> None:
    rng = np.random.default_rng(8)
    right = []
    for scene, pixels in drawings(200, 32, seed=7):
        soft = ndimage.gaussian_filter(pixels.astype(float), (0.8, 0.8, 0)) + rng.normal(0, 5, pixels.shape)
        right.append(judge(np.clip(soft, 0, 255).astype(np.uint8), scene).all_ok)
    assert np.mean(right) >= 0.98


def test_it_fails_every_wrong_colour_shape_and_relation() -> None:
    colours, shapes, relations, exchanged = [], [], [], []
    for scene, pixels in drawings(200, 32, seed=9):
        first = scene.things[0]
        free = next(colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things})
        other = next(shape for shape in SHAPES if shape != first.shape)
        colours.append(judge(pixels, Scene((replace(first, colour=free), *scene.things[1:]), scene.relation)).colour_ok)
        shapes.append(judge(pixels, Scene((replace(first, shape=other), *scene.things[1:]), scene.relation)).shape_ok)
        if scene.relation is not None:
            relations.append(judge(pixels, scene.with_relation_reversed()).relation_ok)
            exchanged.append(judge(pixels, scene.with_colours_exchanged()).all_ok)
    assert len(relations) > 100
    assert np.mean(colours) == 0
    assert np.mean(shapes) <= 0.01
    assert np.mean(relations) == 0
    assert np.mean(exchanged) == 0


def test_a_missing_or_an_extra_thing_fails() -> None:
    rng = np.random.default_rng(2)
    pair = Scene((Thing("red", "circle", "large"), Thing("blue", "square", "small")), "above")
    one = Scene(pair.things[:1])
    assert not judge(np.asarray(draw(one, 32, rng)), pair).colour_ok
    assert not judge(np.asarray(draw(pair, 32, rng)), one).colour_ok
    assert not judge(np.asarray(draw(pair, 32, rng)), one).count_ok


def test_it_finds_nothing_on_an_empty_ground_in_noise_or_in_darkness() -> None:
    rng = np.random.default_rng(3)
    scene = Scene((Thing("red", "circle", "large"),))
    empty = background(32, 32, rng).astype(np.uint8)
    assert find_objects(empty) == []
    noise = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    dark = np.full((32, 32, 3), 60, np.uint8)
    for pixels in (empty, noise, dark):
        assert not judge(pixels, scene).all_ok


def test_shapes_and_colours_of_no_world_are_unknown() -> None:
    ground = np.full((96, 96, 3), 225, np.uint8)
    bar = ground.copy()
    bar[44:52, 10:86] = COLOURS["red"]
    ring = ground.copy()
    y, x = np.mgrid[0:96, 0:96] - 47.5
    ring[np.abs(np.hypot(x, y) - 24) < 7] = COLOURS["blue"]
    brown = ground.copy()
    brown[30:66, 30:66] = (110, 70, 90)
    assert [(thing.colour, thing.shape) for thing in find_objects(bar)] == [("red", UNKNOWN)]
    assert [(thing.colour, thing.shape) for thing in find_objects(ring)] == [("blue", UNKNOWN)]
    assert [(thing.colour, thing.shape) for thing in find_objects(brown)] == [(UNKNOWN, "square")]


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        find_objects(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="at least 32x32"):
        find_objects(np.zeros((16, 16, 3), np.uint8))
