"""Hashes bit for bit against imagehash."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from stages.hashing import grey_32, phash64


def pictures():
    rng = np.random.default_rng(0)
    for mode, shape in (("RGB", (50, 70, 3)), ("RGB", (300, 200, 3)), ("L", (33, 32)), ("RGBA", (64, 64, 4))):
        for blur in (0, 3):
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
            yield picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
    yield Image.new("RGB", (40, 40), "white")
    yield Image.new("RGB", (40, 40), "red")
    yield Image.fromarray(rng.integers(0, 2, (64, 64), dtype=np.uint8) * 255).convert("1")
    yield Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).convert("P")
    yield Image.fromarray(rng.integers(0, 256, (60, 60, 4), dtype=np.uint8), "CMYK")
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(stream, "JPEG", quality=60)
    yield Image.open(stream)


def test_bits_are_those_of_imagehash():
    many = list(pictures())
    hashes = phash64([grey_32(picture) for picture in many])
    assert [f"{int(value):016x}" for value in hashes] == [str(imagehash.phash(picture)) for picture in many]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_batch_does_not_change_a_hash(size):
    greys = [grey_32(picture) for picture in pictures()]
    parts = [phash64(greys[i : i + size]) for i in range(0, len(greys), size)]
    assert np.array_equal(np.concatenate(parts), phash64(greys))
