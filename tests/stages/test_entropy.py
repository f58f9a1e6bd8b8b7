"""Entropy of pictures whose grey levels can be counted by hand, and scipy's word for one that cannot."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.entropy import Entropy, entropy_bits, flat_share


def test_bits_of_levels_that_can_be_counted():
    assert entropy_bits(np.full((8, 8), 7, np.uint8)) == 0
    assert entropy_bits(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8
    assert entropy_bits(np.repeat([0, 255], 32).astype(np.uint8)) == 1


def test_bits_are_scipys():
    grey = np.random.default_rng(0).normal(128, 20, (128, 128)).clip(0, 255).astype(np.uint8)
    assert entropy_bits(grey) == pytest.approx(entropy(np.bincount(grey.ravel()), base=2))


def test_flat_tiles_are_counted():
    grey = np.full((128, 128), 90, np.uint8)
    assert flat_share(grey) == 1
    grey[:64, :64] = np.random.default_rng(0).integers(0, 256, (64, 64))
    assert flat_share(grey) == 0.75


def test_a_plain_picture_is_flat_and_a_photograph_of_noise_is_not():
    images = []
    noise = np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for picture in (Image.new("RGB", (300, 200), "teal"), Image.fromarray(noise)):
        stream = io.BytesIO()
        picture.save(stream, "JPEG")
        images.append(EncodedImage(stream.getvalue()))
    answer = Entropy().open(Context())(Batch({"uid": ["a", "b", "c"]}, [*images, EncodedImage(b"broken")]))
    assert answer.values["flat"] == [1, 0, None]
    assert answer.values["bits"][0] == 0
    assert answer.values["bits"][1] > 4
    assert answer.errors[2] == "not an image of a known format"
